"""Foils: how often the model scores a true caption above one with a small part made false."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmbert.data.processor import MMBertProcessor
from mmbert.data.readers.foils import Foil
from mmbert.errors import UsageError
from mmbert.evaluation.cost import log_fusion_cost
from mmbert.evaluation.encoding import EncodedCandidates, LoadImage, encode, pair_scores
from mmbert.evaluation.options import FOIL_SCORERS
from mmbert.model.modeling import MMBertForPreTraining
from mmbert.runtime.randomness import permutation

OVERALL = "overall"
"""Row of `foil_metrics` over all records."""


def foil_metrics(
    model: MMBertForPreTraining,
    processor: MMBertProcessor,
    foils: Sequence[Foil],
    *,
    scorer: str = "auto",
    seed: int = 0,
    batch_size: int = 64,
    num_workers: int = 0,
    load: LoadImage | None = None,
) -> dict[str, dict[str, float | None]]:
    """Compute the fraction of records whose true caption scores above the foil, by category.

    See `foil_hits` for the arguments and errors.

    Returns:
        Category -> `count`, `accuracy`, `blank` (accuracy with an image of one color) and `shuffled` (accuracy with
        another image of the same file; None where the file has one image). `OVERALL` comes last.
    """
    hits = foil_hits(
        model, processor, foils, scorer=scorer, seed=seed, batch_size=batch_size, num_workers=num_workers, load=load
    )

    def metrics(rows: list[int]) -> dict[str, float | None]:
        found: dict[str, float | None] = {"count": len(rows)}
        for name, hit in hits.items():
            valid = [hit[row] for row in rows if hit[row] is not None]
            found[name] = sum(map(bool, valid)) / len(valid) if valid else None
        return found

    by_category: dict[str, list[int]] = {}
    for row, foil in enumerate(foils):
        by_category.setdefault(foil.category, []).append(row)
    return {**{name: metrics(rows) for name, rows in by_category.items()}, OVERALL: metrics([*range(len(foils))])}


def foil_hits(
    model: MMBertForPreTraining,
    processor: MMBertProcessor,
    foils: Sequence[Foil],
    *,
    scorer: str = "auto",
    seed: int = 0,
    batch_size: int = 64,
    num_workers: int = 0,
    load: LoadImage | None = None,
) -> dict[str, list[bool | None]]:
    """Test for each record whether the true caption scores above the foil, with three kinds of image.

    Args:
        model: In evaluation mode.
        processor: The processor of the model.
        foils: At least one record.
        scorer: "itm", "itc", or "auto": itm if the model has it, else itc.
        seed: Seed of the shuffled images.
        batch_size: Images or texts per encoder call.
        num_workers: Processes that decode images.
        load: Loads an image, or what an encoder cache holds of it; None: decodes it.

    Returns:
        `accuracy` (the image of the record), `blank` (an image of one color) and `shuffled` (another image of the same
        file), in the order of the records; None where the file has no other image. Ties are misses.

    Raises:
        UsageError: The model has not the objective of the scorer.
    """
    scorer = choose_foil_scorer(model, scorer)
    images = list(dict.fromkeys(foil.image for foil in foils))
    index_of = {image: i for i, image in enumerate(images)}
    texts = [text for foil in foils for text in (foil.caption, foil.foil)]
    encoded = encode(
        model,
        processor,
        [*images, blank_image(processor)],
        texts,
        batch_size=batch_size,
        num_workers=num_workers,
        keep_tokens=scorer == "itm",
        load=load,
    )
    own = [index_of[foil.image] for foil in foils]
    other = shuffled_images(foils, seed)
    image_rows = {
        "accuracy": torch.tensor(own),
        "blank": torch.full((len(foils),), len(images)),
        "shuffled": torch.tensor([i if o is None else index_of[o] for i, o in zip(own, other, strict=True)]),
    }
    captions = encoded.text_index.view(-1, 2)  # (K, 2): true caption, foil
    pairs = torch.stack(
        [torch.stack([rows[:, None].expand(-1, 2), captions], dim=-1) for rows in image_rows.values()]
    )  # (3, K, 2, 2)
    # Distinct pairs only, so that equal texts get equal scores.
    distinct, inverse = pairs.view(-1, 2).unique(dim=0, return_inverse=True)
    scores = _scores(model, encoded, distinct, scorer)[inverse].view(len(image_rows), len(foils), 2)
    hits: dict[str, list[bool | None]] = dict(zip(image_rows, (scores[..., 0] > scores[..., 1]).tolist(), strict=True))
    hits["shuffled"] = [None if o is None else hit for o, hit in zip(other, hits["shuffled"], strict=True)]
    return hits


def choose_foil_scorer(model: MMBertForPreTraining, name: str = "auto") -> str:
    """Choose the objective that scores pairs.

    Args:
        model: Any pretrained model.
        name: "itm", "itc", or "auto": itm if the model has it, else itc.

    Raises:
        UsageError: The model has not the objective.
    """
    possible = [scorer for scorer in FOIL_SCORERS if scorer in model.objectives]
    if name == "auto" and possible:
        return possible[0]
    if name not in possible:
        has, allowed = ", ".join(model.objectives), ", ".join(possible)
        needed = f"allowed are {allowed}" if allowed else "train one with itm, itc or both"
        raise UsageError(f"scorer='{name}' for a model with the objectives {has}; {needed}.")
    return name


def shuffled_images(foils: Sequence[Foil], seed: int) -> list[Any]:
    """Assign each record another image of its file, the same one to all records of an image; None if there is none."""
    other: dict[tuple[str, Any], Any] = {}
    by_file: dict[str, dict[Any, None]] = {}
    for foil in foils:
        by_file.setdefault(foil.file, {})[foil.image] = None
    for file, found in by_file.items():
        images = list(found)
        order = permutation(seed, "foils", 0, len(images)).tolist()
        for i, this in enumerate(order):  # each gets the next one of a random cycle, so never itself
            following = order[(i + 1) % len(order)]
            other[file, images[this]] = None if this == following else images[following]
    return [other[foil.file, foil.image] for foil in foils]


def blank_image(processor: MMBertProcessor) -> Image.Image:
    """Make an image of the mean color, whose normalized pixel values are 0 up to the rounding to 8 bits."""
    side = processor.image_settings.image_size
    red, green, blue = (round(255 * value) for value in processor.image_settings.mean)
    return Image.new("RGB", (side, side), (red, green, blue))


@torch.no_grad()
def _scores(model: MMBertForPreTraining, encoded: EncodedCandidates, pairs: Tensor, scorer: str) -> Tensor:
    """Score (K, 2) pairs of image and distinct text: (K,)."""
    if scorer == "itm":
        assert encoded.images is not None
        log_fusion_cost("foils by itm", model, encoded.images, encoded.texts, pairs, len(pairs))
        return pair_scores(model, encoded.images, encoded.texts, pairs)
    return encoded.pair_similarities(pairs)
