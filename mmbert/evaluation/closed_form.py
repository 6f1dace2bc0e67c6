"""The closed form of ITC: projections solved from the encoders' outputs on training pairs, without a training step."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mmbert.data.examples import Example
from mmbert.data.images import BadImageError, ImageSource
from mmbert.data.processor import MMBertProcessor, pad
from mmbert.data.samples import View
from mmbert.errors import UsageError
from mmbert.evaluation.encoding import EncodedCandidates, LoadImage, encode_loaded
from mmbert.evaluation.retrieval import Candidates
from mmbert.model.modeling import MMBertForPreTraining
from mmbert.model.objectives.closed_form import LinearMaps, canonical_maps
from mmbert.model.objectives.pooling import Pooling
from mmbert.runtime.distributed import gather_in_order, run_sharded, shard_jobs
from mmbert.runtime.randomness import permutation
from mmbert.runtime.signals import StopSignals

MAX_PAIRS = 20_000
"""Training pairs that are used unless another number is given."""
BASELINE_RIDGE = 0.3
"""Ridge of the baseline, see `canonical_maps`."""
BASELINE_DIRECTIONS, BASELINE_POOLING = 128, Pooling("first_and_mean", "first_and_mean")
"""Width of the common space and features of the baseline."""


class PooledFeatures(NamedTuple):
    """Pooled encoder outputs of N images and M texts, on the CPU."""

    images: Tensor  # (N, F)
    texts: Tensor  # (M, F)
    is_readable: Tensor  # (N,) bool; False only where unreadable images are skipped


class _Images(Dataset[Tensor | BadImageError]):
    """Data set of loaded images; an unreadable one is its error, which the caller raises or skips."""

    def __init__(self, images: Sequence[ImageSource], load: LoadImage, views: Sequence[View | None]):
        self.images, self.load, self.views = images, load, views

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor | BadImageError:
        image, view = self.images[index], self.views[index]
        try:
            return self.load(image) if view is None else self.load(image, view)
        except BadImageError as error:
            return error


def choose_pairs(examples: Sequence[Example], count: int | None, *, seed: int) -> list[tuple[int, int]]:
    """Draw the pairs of the closed form: a fixed random sample of all images with all of their captions.

    Args:
        examples: Of the training split.
        count: Number of pairs; None: all, at most `MAX_PAIRS`.
        seed: The run's seed.

    Returns:
        Number of the example and of its caption, in the order of the examples.

    Raises:
        UsageError: More pairs than there are.
    """
    every = [(i, j) for i, example in enumerate(examples) for j in range(len(example.captions))]
    if count is not None and count > len(every):
        raise UsageError(
            f"objectives.itc.init_samples={count:,}: the training data has {len(every):,} pairs; choose at most as "
            "many, or null for all."
        )
    chosen = permutation(seed, "closed form", 0, len(every))[: MAX_PAIRS if count is None else count]
    return [every[i] for i in sorted(chosen.tolist())]


def solve_closed_form(
    model: MMBertForPreTraining,
    processor: MMBertProcessor,
    examples: Sequence[Example],
    pairs: Sequence[tuple[int, int]],
    *,
    pooling: Pooling,
    directions: int,
    ridge: float,
    num_workers: int = 0,
    skip_unreadable: bool = False,
    load: LoadImage | None = None,
    views_of: Callable[[str], Sequence[View | None]] | None = None,
) -> LinearMaps:
    """Solve ITC's projections from training pairs; the same for every number of processes.

    Args:
        model: In evaluation mode.
        processor: The model's.
        examples: Of the training split.
        pairs: As from `choose_pairs`.
        pooling: Features to pool.
        directions: Width of the common space.
        ridge: See `canonical_maps`.
        num_workers: Processes that decode images.
        skip_unreadable: Leave out pairs whose image can't be read.
        load: See `pooled_features`.
        views_of: Caption -> augmented views of its image, each of which is a pair with it; None: the image as it is.

    Raises:
        UsageError: An encoder without layers, or too few pairs or features for the directions.
        BadImageError: An image that can't be read, unless `skip_unreadable`.
    """
    config = model.config
    if config.text_layers == 0 or config.image_layers == 0:
        raise UsageError(
            f"the closed form compares the outputs of the two encoders, but text_layers={config.text_layers} and "
            f"image_layers={config.image_layers}: both need at least 1 layer."
        )
    texts = [examples[i].captions[j] for i, j in pairs]
    seen = [
        (i, view, text)
        for (i, _), text in zip(pairs, texts, strict=True)
        for view in (views_of(text) if views_of else [None])
    ]
    image_numbers = {key: row for row, key in enumerate(dict.fromkeys((i, view) for i, view, _ in seen))}
    text_numbers = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    features = pooled_features(
        model,
        processor,
        [examples[i].image for i, _ in image_numbers],
        [*text_numbers],
        pooling=pooling,
        num_workers=num_workers,
        skip_unreadable=skip_unreadable,
        load=load,
        views=[view for _, view in image_numbers],
    )
    image_rows = torch.tensor([image_numbers[i, view] for i, view, _ in seen])
    text_rows = torch.tensor([text_numbers[text] for _, _, text in seen])
    used = features.is_readable[image_rows]
    return canonical_maps(
        features.texts[text_rows[used]], features.images[image_rows[used]], directions=directions, ridge=ridge
    )


def closed_form_candidates(
    model: MMBertForPreTraining,
    processor: MMBertProcessor,
    examples: Sequence[Example],
    candidates: Candidates,
    encoded: EncodedCandidates,
    num_workers: int = 0,
    load: LoadImage | None = None,
) -> EncodedCandidates:
    """Replace the contrastive vectors of encoded candidates by those of the closed form, a baseline for ranking.

    Args:
        model: In evaluation mode; only its encoders are used.
        processor: The model's.
        examples: Training pairs that the closed form is solved from.
        candidates: What `encoded` was made from.
        encoded: From `mmbert.evaluation.encoding.encode`.
        num_workers: Processes that decode images.
        load: See `pooled_features`.

    Raises:
        UsageError: An encoder without layers.
    """
    pairs = choose_pairs(examples, None, seed=0)
    directions = min(BASELINE_DIRECTIONS, 2 * model.config.hidden_size, len(pairs))
    maps = solve_closed_form(
        model, processor, examples, pairs, pooling=BASELINE_POOLING, directions=directions, ridge=BASELINE_RIDGE,
        num_workers=num_workers, load=load,
    )  # fmt: skip
    distinct = {number: text for number, text in zip(encoded.text_index.tolist(), candidates.texts, strict=True)}
    texts = [distinct[number] for number in sorted(distinct)]
    found = pooled_features(
        model, processor, candidates.images, texts, pooling=BASELINE_POOLING, num_workers=num_workers, load=load
    )
    return replace(
        encoded,
        image_vectors=unit_vectors(found.images, maps.image_weight, maps.image_bias),
        text_vectors=unit_vectors(found.texts, maps.text_weight, maps.text_bias),
    )


@torch.no_grad()
def pooled_features(
    model: MMBertForPreTraining,
    processor: MMBertProcessor,
    images: Sequence[ImageSource],
    texts: Sequence[str],
    *,
    pooling: Pooling,
    batch_size: int = 64,
    num_workers: int = 0,
    skip_unreadable: bool = False,
    load: LoadImage | None = None,
    views: Sequence[View | None] | None = None,
) -> PooledFeatures:
    """Encode images and texts, distributed over all processes, and pool their tokens.

    Args:
        model: In evaluation mode.
        processor: The model's.
        images: N images.
        texts: M texts.
        pooling: Features to pool.
        batch_size: Images or texts per encoder call.
        num_workers: Processes that decode images.
        skip_unreadable: Leave unreadable images out.
        load: Loads an image, or what an encoder cache holds of it; None: decodes it.
        views: Augmented view of each image, with which `load` is called then; None: none.

    Raises:
        BadImageError: An image that can't be read, unless `skip_unreadable`.
    """
    device = model.mmbert.word_embeddings.device
    image_batches = _batches([*range(len(images))], batch_size)
    loader = DataLoader(
        _Images(images, load or processor.pixel_values, views or [None] * len(images)),
        batch_sampler=shard_jobs(image_batches),
        num_workers=num_workers,
        collate_fn=list,
        worker_init_fn=StopSignals.worker_init_fn(),
        generator=torch.Generator(),  # so that the global generator of the caller does not advance
    )

    def encode_images(batch: list[Tensor | BadImageError]) -> list[Tensor | None]:
        readable = [x for x in batch if isinstance(x, Tensor)]
        for error in batch:
            if isinstance(error, BadImageError) and not skip_unreadable:
                raise error
        if not readable:
            return [None] * len(batch)
        found = iter(pooling.features("image", encode_loaded(model.mmbert, processor, readable)).cpu())
        return [next(found) if isinstance(x, Tensor) else None for x in batch]

    of_images = [row for rows in gather_in_order(map(encode_images, loader), len(image_batches)) for row in rows]
    width = next((len(row) for row in of_images if row is not None), 0)
    is_readable = torch.tensor([row is not None for row in of_images])
    stacked = torch.stack([torch.zeros(width) if row is None else row for row in of_images])

    ids = [processor.encode(text) for text in texts]

    def encode_texts(rows: list[int]) -> Tensor:
        input_ids, mask = (x.to(device) for x in pad([ids[i] for i in rows], processor.pad_token_id))
        return pooling.features("text", model.mmbert.encode_text(input_ids, mask)).cpu()

    by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    found = torch.cat([*run_sharded(encode_texts, _batches(by_length, batch_size))])
    return PooledFeatures(stacked, torch.empty_like(found).index_copy_(0, torch.tensor(by_length), found), is_readable)


def unit_vectors(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Map (N, F) features by the weight (E, F) and bias (E,) of a side to (N, E) unit vectors, fp32."""
    return torch.nn.functional.normalize(features.double() @ weight.T + bias, dim=-1).float()


def _batches(rows: Sequence[Any], size: int) -> list[list[Any]]:
    return [list(rows[i : i + size]) for i in range(0, len(rows), size)]
