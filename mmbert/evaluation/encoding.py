"""Encode images and texts once, and compute matching scores of their pairs from the stored tokens."""

import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from mmbert.data.images import ImageSource
from mmbert.data.processor import MMBertProcessor, pad
from mmbert.data.samples import stack_images
from mmbert.errors import UsageError
from mmbert.model.modeling import MMBertForPreTraining, MMBertModel
from mmbert.model.objectives.late_interaction import pair_similarities, similarities
from mmbert.model.tokens import Tokens
from mmbert.runtime.distributed import all_reduce_max, gather_in_order, run_sharded, shard_jobs
from mmbert.runtime.memory import free_memory
from mmbert.runtime.signals import StopSignals

log = logging.getLogger(__name__)

PAIRS_PER_BATCH = 128
"""Pairs fused in one call, at most: bounds its memory. On a CPU the time per pair is the same with 16 and doubles with
512."""
MAX_PADDING = 1 / 8
"""Texts are fused together if their lengths differ by at most this fraction of the tokens of a pair."""


LoadImage = Callable[..., Tensor]
"""An image to (3, S, S) uint8, or to its (P, W) hidden states from an encoder cache."""


@dataclass(frozen=True)
class EncodedCandidates:
    """Encoder outputs of N images and M texts, on the CPU.

    Texts with the same token ids are encoded and scored once, so their scores are equal to the bit.
    """

    images: Tensor | None
    """(N, P, W) packed tokens, see `pack`; None without `keep_tokens`."""
    texts: list[Tensor]
    """(T, W) packed tokens of each of the U distinct texts, without padding; empty without `keep_tokens`."""
    image_vectors: Tensor | None
    """(N, E) unit vectors of the objective itc, or (N, P, E) of its tokens; None without it."""
    text_vectors: Tensor | None
    """(U, E) or (U, T, E), the same of the distinct texts."""
    text_index: Tensor
    """(M,) int64, number of the distinct text of each text."""
    image_passes: int
    """Number of images that were encoded."""
    text_passes: int
    """Number of texts that were encoded."""

    def similarities(self) -> Tensor:
        """Compare the vectors of all images with those of all distinct texts: (N, U)."""
        assert self.image_vectors is not None and self.text_vectors is not None
        return similarities(self.image_vectors, self.text_vectors)

    def pair_similarities(self, pairs: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """Compare the vectors of (K, 2) pairs of image and distinct text: (K,); see `pair_similarities`."""
        images, texts = self.image_vectors, self.text_vectors
        assert images is not None and texts is not None
        parts = pairs.split(PAIRS_PER_BATCH)  # vectors of tokens take memory
        return torch.cat([pair_similarities(images[x[:, 0]], texts[x[:, 1]], dtype=dtype) for x in parts])

    def select(self, images: slice, texts: Tensor) -> "EncodedCandidates":
        """Select images, and texts by their numbers (K,), without copying the tokens of images."""
        distinct, text_index = self.text_index[texts].unique(return_inverse=True)
        return EncodedCandidates(
            None if self.images is None else self.images[images],
            [self.texts[i] for i in distinct.tolist()] if self.texts else [],
            None if self.image_vectors is None else self.image_vectors[images],
            None if self.text_vectors is None else self.text_vectors[distinct],
            text_index,
            self.image_passes,
            self.text_passes,
        )


class _Images(Dataset[Tensor]):
    def __init__(self, images: Sequence[ImageSource], load: LoadImage):
        self.images, self.load = images, load

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.load(self.images[index])


@torch.no_grad()
def encode(
    model: MMBertForPreTraining,
    processor: MMBertProcessor,
    images: Sequence[ImageSource],
    texts: Sequence[str],
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    keep_tokens: bool = True,
    half_tokens: bool = False,
    load: LoadImage | None = None,
) -> EncodedCandidates:
    """Encode every image and every distinct text once, distributed over all processes.

    Args:
        model: In evaluation mode.
        processor: The processor of the model.
        images: N images, each of a kind that `load_image` takes; at least one.
        texts: M texts; at least one.
        batch_size: Images or texts per encoder call.
        num_workers: Processes that decode images.
        keep_tokens: Keep the tokens, which fusion needs, besides the contrastive vectors.
        half_tokens: Keep them in fp16, in half the memory; matching scores change with their rounding.
        load: Loads an image, or what an encoder cache holds of it; None: decodes it.

    Raises:
        BadImageError: An image that can't be read.
    """
    device = model.mmbert.word_embeddings.device
    contrast: Any = model.objectives["itc"] if "itc" in model.objectives else None

    batches = _batches(range(len(images)), batch_size)
    loader = DataLoader(
        _Images(images, load or processor.pixel_values),
        batch_sampler=shard_jobs(batches),
        num_workers=num_workers,
        collate_fn=list,
        worker_init_fn=StopSignals.worker_init_fn(),
        generator=torch.Generator(),  # so that the global generator of the caller does not advance
    )

    def packed(tokens: Tokens) -> Tensor:
        found = pack(tokens).cpu()
        return found.half() if half_tokens else found

    def encode_images(loaded: list[Tensor]) -> dict[str, Tensor]:
        tokens = encode_loaded(model.mmbert, processor, loaded)
        kept = {"tokens": packed(tokens)} if keep_tokens else {}
        return kept if contrast is None else {**kept, "vectors": contrast.embed_image(tokens).cpu()}

    of_image: dict[str, Tensor] = {}
    for rows, found in zip(batches, gather_in_order(map(encode_images, loader), len(batches)), strict=True):
        for name, value in found.items():  # written in place: concatenating a list would need twice the memory
            if name not in of_image:
                of_image[name] = allocate((len(images), *value.shape[1:]), value.dtype)
            of_image[name][rows] = value

    numbers: dict[tuple[int, ...], int] = {}
    text_index = torch.tensor([numbers.setdefault(tuple(processor.encode(text)), len(numbers)) for text in texts])
    ids = list(numbers)

    def encode_texts(rows: list[int]) -> dict[str, list[Tensor]]:
        input_ids, mask = (x.to(device) for x in pad([ids[i] for i in rows], processor.pad_token_id))
        tokens = model.mmbert.encode_text(input_ids, mask)
        # Cloned, since a view would keep its batch in memory.
        states = zip(rows, packed(tokens), strict=True) if keep_tokens else ()
        kept = {"tokens": [x[: len(ids[i])].clone() for i, x in states]} if keep_tokens else {}
        return kept if contrast is None else {**kept, "vectors": [*contrast.embed_text(tokens).cpu()]}

    of_text: dict[str, list[Tensor]] = {}
    batches = _batches(sorted(range(len(ids)), key=lambda i: len(ids[i])), batch_size)
    for rows, found in zip(batches, run_sharded(encode_texts, batches), strict=True):
        for name, values in found.items():
            by_text = of_text.setdefault(name, [torch.empty(0)] * len(ids))
            for i, value in zip(rows, values, strict=True):
                by_text[i] = value

    return EncodedCandidates(
        of_image.get("tokens"),
        of_text.get("tokens", []),
        of_image.get("vectors"),
        pad_sequence(of_text["vectors"], batch_first=True) if contrast is not None else None,
        text_index,
        image_passes=len(images),
        text_passes=len(ids),
    )


def allocate(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Make an empty tensor on the CPU: in memory, or in a temporary file if half of the free memory is too small.

    Raises:
        UsageError: The file would not fit the disk either.
    """
    size = math.prod(shape) * dtype.itemsize
    if size <= free_memory(torch.device("cpu")) // 2:
        return torch.empty(*shape, dtype=dtype)
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UsageError(
            f"the encoders' outputs take {size / 1e9:.1f} GB, more than half of the free memory, and {folder} has "
            f"{free / 1e9:.1f} GB left: set TMPDIR to a larger disk, or rank with --scorer itc, which keeps no tokens."
        )
    log.info("the encoders' outputs take %.1f GB and are kept in a temporary file in %s", size / 1e9, folder)
    handle, name = tempfile.mkstemp(prefix="mmbert-tokens-")
    os.close(handle)
    try:
        return torch.from_file(name, shared=True, size=math.prod(shape), dtype=dtype).view(*shape)
    finally:
        Path(name).unlink()  # the mapping stays until the tensor is dropped


def encode_loaded(model: MMBertModel, processor: MMBertProcessor, loaded: Sequence[Tensor]) -> Tokens:
    """Encode images that a `LoadImage` returned, each pixels or hidden states: (B, P, D) tokens in their order."""
    is_decoded = [image.dtype == torch.uint8 for image in loaded]
    rows = [[row for row, decoded in enumerate(is_decoded) if decoded is kind] for kind in {*is_decoded}]
    parts: list[Tokens] = []
    for part in rows:
        batch = {k: x.to(model.word_embeddings.device) for k, x in stack_images([loaded[i] for i in part]).items()}
        if "pixel_values" in batch:
            batch["pixel_values"] = processor.image_settings.normalize(batch["pixel_values"])
        parts.append(model.encode_batch_images(batch))
    if len(parts) == 1:
        return parts[0]
    order = torch.tensor([*chain(*rows)], device=model.word_embeddings.device).argsort()
    states = (torch.cat(layer) for layer in zip(*([p.hidden_states, *p.intermediate] for p in parts), strict=True))
    hidden_states, *intermediate = (x[order] for x in states)
    return Tokens(hidden_states, torch.cat([p.mask for p in parts]), tuple(intermediate))


def pack(tokens: Tokens) -> Tensor:
    """Concatenate hidden states and the intermediate layers that the fusion strategy reads: (B, L, W)."""
    return torch.cat([tokens.hidden_states, *tokens.intermediate], dim=-1) if tokens.intermediate else tokens[0]


def unpack(packed: Tensor, mask: Tensor, width: int, layer_width: int) -> Tokens:
    """Split what `pack` returned; `width` is that of the hidden states, `layer_width` that of the layers."""
    layers = packed[..., width:].split(layer_width, dim=-1) if packed.shape[-1] > width else ()
    return Tokens(packed[..., :width], mask, tuple(layers))


@torch.no_grad()
def pair_scores(
    model: MMBertForPreTraining,
    images: Tensor,
    texts: Sequence[Tensor],
    pairs: Tensor,
) -> Tensor:
    """Compute the ITM scores of pairs from encoded images and texts, distributed over all processes.

    It proceeds image by image, among texts of about equal length, so that the tokens of an image are gathered once for
    all of its texts. Besides the tokens it takes the memory of one batch (see `pairs_per_batch`). The same `pairs` give
    the same batches, and so scores that are equal to the bit.

    Args:
        model: With the objective itm, in evaluation mode.
        images: (N, P, W) packed tokens.
        texts: (T, W) packed tokens each, without padding.
        pairs: (K, 2) int64, numbers of image and text.

    Returns:
        (K,) logits (log-odds) that image and text match, on the CPU.
    """
    core = model.mmbert
    device, width = core.word_embeddings.device, core.config.hidden_size
    lengths = torch.tensor([len(text) for text in texts])
    order = _batch_order(pairs, lengths, images.shape[1])
    # Tokens in fp16 on request; under autocast half precision is the model's own.
    kind = core.word_embeddings.dtype if not torch.is_autocast_enabled(device.type) else None

    def to_device(states: Tensor) -> Tensor:
        return states.to(device, kind if states.dtype == torch.float16 else None)

    def fuse(chunk: Tensor) -> Tensor:
        (image_rows, image_at), (text_rows, text_at) = (x.unique(return_inverse=True) for x in chunk.T)
        image_states = to_device(images[image_rows])
        image_mask = image_states.new_ones(image_states.shape[:2], dtype=torch.bool)
        image = unpack(image_states, image_mask, width, core.image_encoder.width)
        text_states = to_device(pad_sequence([texts[i] for i in text_rows.tolist()], batch_first=True))
        text_mask = (torch.arange(text_states.shape[1]) < lengths[text_rows, None]).to(device)
        text = unpack(text_states, text_mask, width, core.text_encoder.width)
        return model.match_scores(text.rows(text_at.to(device)), image.rows(image_at.to(device))).cpu()

    if not len(pairs):
        return torch.empty(0)
    size = pairs_per_batch(model, images.shape[1] + int(lengths.max()))
    scores = torch.cat([*run_sharded(fuse, pairs[order].split(size))])
    return torch.empty_like(scores).index_copy_(0, order, scores)


def _batch_order(pairs: Tensor, lengths: Tensor, image_tokens: int) -> Tensor:
    """Sort (K, 2) pairs by the class of their text's length, then by image, then by length: (K,) positions."""
    own = lengths[pairs[:, 1]]
    step = max(1, int(MAX_PADDING * (image_tokens + int(own.min())))) if len(own) else 1
    order = own.argsort(stable=True)
    for key in (pairs[:, 0], own // step):
        order = order[key[order].argsort(stable=True)]
    return order


def pairs_per_batch(model: MMBertForPreTraining, tokens: int) -> int:
    """Choose the number of pairs of a batch: `PAIRS_PER_BATCH`, fewer where half of the free memory is too small.

    A pair takes about 4 L (16 D + H L) bytes while it is fused: 16 activations of each token and the attention scores.

    Args:
        model: The model.
        tokens: L, of image and text together.
    """
    config = model.config
    free = free_memory(model.mmbert.word_embeddings.device)
    fits = free // 2 // (4 * tokens * (16 * config.hidden_size + config.num_attention_heads * tokens))
    return -all_reduce_max(-min(PAIRS_PER_BATCH, max(1, fits)))[0]  # equal in all processes


def _batches(rows: Sequence[int], size: int) -> list[list[int]]:
    return [list(rows[i : i + size]) for i in range(0, len(rows), size)]
