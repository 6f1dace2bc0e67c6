"""Foils: does the model prefer a true caption to one with a small part made false?"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmbert.data.processor import MMBertProcessor
from mmbert.data.readers.foils import Foil
from mmbert.errors import UsageError
from mmbert.evaluation.encoding import EncodedCandidates, encode, pair_scores
from mmbert.model.modeling import MMBertForPreTraining
from mmbert.runtime.randomness import permutation

OVERALL = "overall"


def foil_metrics(
    model: MMBertForPreTraining,
    processor: MMBertProcessor,
    foils: Sequence[Foil],
    *,
    scorer: str = "auto",
    seed: int = 0,
    batch_size: int = 64,
    num_workers: int = 0,
) -> dict[str, dict[str, float | None]]:
    """Share of records whose true caption scores above the foil; `foil_hits` has arguments and errors.

    Returns:
        Category -> `count`, `accuracy`, `blank` (the same with an image of one color) and `shuffled` (with another
        image of the same file; None where the file has one image). Last comes `OVERALL`, over all records.
    """
    hits = foil_hits(model, processor, foils, scorer=scorer, seed=seed, batch_size=batch_size, num_workers=num_workers)

    def report(rows: list[int]) -> dict[str, float | None]:
        shares: dict[str, float | None] = {"count": len(rows)}
        for name, hit in hits.items():
            counted = [hit[row] for row in rows if hit[row] is not None]
            shares[name] = sum(map(bool, counted)) / len(counted) if counted else None
        return shares

    by_category: dict[str, list[int]] = {}
    for row, foil in enumerate(foils):
        by_category.setdefault(foil.category, []).append(row)
    return {**{name: report(rows) for name, rows in by_category.items()}, OVERALL: report([*range(len(foils))])}


def foil_hits(
    model: MMBertForPreTraining,
    processor: MMBertProcessor,
    foils: Sequence[Foil],
    *,
    scorer: str = "auto",
    seed: int = 0,
    batch_size: int = 64,
    num_workers: int = 0,
) -> dict[str, list[bool | None]]:
    """Whether each record's true caption scores above the foil, with the right image and without it.

    Args:
        model: In evaluation mode.
        processor: The model's.
        foils: At least one record.
        scorer: "itm", "itc", or "auto": itm where the model has it.
        seed: Of the wrong images.
        batch_size: Images, or texts, encoded in one call.
        num_workers: Processes that decode images.

    Returns:
        `accuracy`, `blank` and `shuffled`, in the order of the records; None where there is no other image.

    Raises:
        UsageError: The model can't score like that.
    """
    scorer = choose_foil_scorer(model, scorer)
    images = list(dict.fromkeys(foil.image for foil in foils))
    number = {image: i for i, image in enumerate(images)}
    texts = [text for foil in foils for text in (foil.caption, foil.foil)]
    encoded = encode(
        model,
        processor,
        [*images, _blank(processor)],
        texts,
        batch_size=batch_size,
        num_workers=num_workers,
        keep_tokens=scorer == "itm",
    )
    own = [number[foil.image] for foil in foils]
    other = shuffled_images(foils, seed)
    shown = {
        "accuracy": torch.tensor(own),
        "blank": torch.full((len(foils),), len(images)),
        "shuffled": torch.tensor([i if o is None else number[o] for i, o in zip(own, other, strict=True)]),
    }
    captions = encoded.text_index.view(-1, 2)  # (K, 2): true, false
    pairs = torch.stack(
        [torch.stack([rows[:, None].expand(-1, 2), captions], dim=-1) for rows in shown.values()]
    )  # (3, K, 2, 2)
    distinct, where = pairs.view(-1, 2).unique(dim=0, return_inverse=True)  # equal texts must give equal scores
    scores = _scores(model, encoded, distinct, scorer)[where].view(len(shown), len(foils), 2)
    hits: dict[str, list[bool | None]] = dict(zip(shown, (scores[..., 0] > scores[..., 1]).tolist(), strict=True))
    hits["shuffled"] = [None if o is None else hit for o, hit in zip(other, hits["shuffled"], strict=True)]
    return hits


def choose_foil_scorer(model: MMBertForPreTraining, name: str = "auto") -> str:
    """The scorer of that name if the model can do it; "auto": itm, else itc.

    Raises:
        UsageError: The model lacks the objective.
    """
    can = [scorer for scorer in ("itm", "itc") if scorer in model.objectives]
    if name == "auto" and can:
        return can[0]
    if name not in can:
        has, known = ", ".join(model.objectives), " or ".join(can) or "neither itm nor itc"
        raise UsageError(f"scorer='{name}' for a model with the objectives {has}; it can do {known}.")
    return name


def shuffled_images(foils: Sequence[Foil], seed: int) -> list[Any]:
    """For each record another image of its file, the same for records of one image; None if there is no other."""
    other: dict[tuple[str, Any], Any] = {}
    by_file: dict[str, dict[Any, None]] = {}
    for foil in foils:
        by_file.setdefault(foil.file, {})[foil.image] = None
    for file, found in by_file.items():
        images = list(found)
        order = permutation(seed, "foils", 0, len(images)).tolist()
        for i, at in enumerate(order):  # each takes the next one of a shuffled circle, so never itself
            after = order[(i + 1) % len(order)]
            other[file, images[at]] = None if at == after else images[after]
    return [other[foil.file, foil.image] for foil in foils]


def _blank(processor: MMBertProcessor) -> Any:
    """An image of the mean color, which is 0 after normalisation but for rounding to 8 bits."""
    side = processor.image_settings.image_size
    red, green, blue = (round(255 * value) for value in processor.image_settings.mean)
    return Image.new("RGB", (side, side), (red, green, blue))


@torch.no_grad()
def _scores(model: MMBertForPreTraining, encoded: EncodedCandidates, pairs: Tensor, scorer: str) -> Tensor:
    """(K,) scores of (K, 2) pairs of image and distinct text."""
    if scorer == "itm":
        assert encoded.images is not None
        return pair_scores(model, encoded.images, encoded.texts, pairs)
    assert encoded.image_vectors is not None and encoded.text_vectors is not None
    return (encoded.image_vectors[pairs[:, 0]] * encoded.text_vectors[pairs[:, 1]]).sum(dim=1)
