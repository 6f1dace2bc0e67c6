"""Recall@K of image-text retrieval, in both directions, from one score matrix."""

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 22
"""Scores compared at once; bounds the temporary memory to a few times this number of bytes."""


def recall_at_k(
    scores: Tensor | np.ndarray,
    image_of_text: Tensor | np.ndarray | Sequence[int],
    ks: Sequence[int] = (1, 5, 10),
    *,
    relevant: Tensor | np.ndarray | None = None,
) -> dict[str, float]:
    """Recall@K of both directions from a score matrix: how often a correct partner is among the first K.

    See `ranks` for the arguments and further errors.

    Args:
        scores: (images, texts), higher = better match.
        image_of_text: (texts,) the row of the image each text belongs to.
        ks: Cut-offs K, in ranks from 1.
        relevant: (images, texts) bool, or None.

    Returns:
        `image_to_text/R@K` and `text_to_image/R@K` as fractions, `.../median_rank` (1 = first),
        `images_without_text` (left out of the image queries) and, for `ks` 1, 5, 10, `rsum`: the sum of
        the six recalls in percent.

    Raises:
        ValueError: `ks` are not ranks; or see `ranks`.
    """
    if not ks or any(int(k) != k or k < 1 for k in ks):
        raise ValueError(f"ks is {ks!r}; expected whole numbers of at least 1")
    image_ranks, text_ranks = ranks(scores, image_of_text, relevant=relevant)
    answerable = image_ranks[image_ranks > 0]
    result: dict[str, float] = {}
    for name, found in (("image_to_text", answerable), ("text_to_image", text_ranks)):
        result |= {f"{name}/R@{k}": int((found <= k).sum()) / len(found) for k in ks}
        result[f"{name}/median_rank"] = float(np.median(found))
    if tuple(ks) == (1, 5, 10):
        result["rsum"] = 100 * sum(value for name, value in result.items() if "/R@" in name)
    result["images_without_text"] = len(image_ranks) - len(answerable)
    return result


def ranks(
    scores: Tensor | np.ndarray,
    image_of_text: Tensor | np.ndarray | Sequence[int],
    *,
    relevant: Tensor | np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Rank of each query's best correct partner, 1 = first.

    Image to text: the best rank over all texts of the image counts, as is usual for five captions per image.
    Text to image: every text is a query. Ties are pessimistic: an incorrect candidate with an equal score ranks
    before a correct one, so a constant score has recall 0.

    Args:
        scores: (images, texts), higher = better match.
        image_of_text: (texts,) the row of the image each text belongs to.
        relevant: (images, texts) bool, True = correct partners; replaces `image_of_text`, for instance to
            count equal texts as correct (see `equal_text_relevance`).

    Returns:
        (images,) and (texts,) int64; 0 for an image without a text.

    Raises:
        ValueError: a shape does not fit, an index is outside the images, a score is NaN, there is no text,
            or a text has no correct image.
    """
    scores = torch.as_tensor(scores).detach()
    if scores.ndim != 2 or 0 in scores.shape:
        raise ValueError(f"scores has shape {tuple(scores.shape)}; expected (images, texts), both at least 1")
    num_images, num_texts = scores.shape
    owner = torch.as_tensor(image_of_text, device=scores.device)
    if owner.shape != (num_texts,) or owner.is_floating_point() or owner.dtype == torch.bool:
        raise ValueError(
            f"image_of_text has shape {tuple(owner.shape)} and type {owner.dtype}; expected {num_texts} "
            f"whole numbers, one per text (column of scores)"
        )
    if owner.min() < 0 or owner.max() >= num_images:
        raise ValueError(
            f"image_of_text holds {int(owner.min())} to {int(owner.max())}; expected rows of scores, "
            f"0 to {num_images - 1}"
        )
    if relevant is not None:
        relevant = torch.as_tensor(relevant, device=scores.device)
        if relevant.shape != scores.shape or relevant.dtype != torch.bool:
            raise ValueError(
                f"relevant has shape {tuple(relevant.shape)} and type {relevant.dtype}; expected bool of "
                f"shape {tuple(scores.shape)}, True = correct partners"
            )
        if not relevant.any(dim=0).all():
            unmatched = int(torch.nonzero(~relevant.any(dim=0))[0])
            raise ValueError(f"relevant has no image for text {unmatched}; expected at least one for every text")

    return _ranks(scores, owner, relevant, by_text=False), _ranks(scores, owner, relevant, by_text=True)


def equal_text_relevance(texts: Sequence[Hashable], image_of_text: Sequence[int], num_images: int) -> Tensor:
    """Relevance matrix that counts equal texts as correct, for `recall_at_k(relevant=...)`.

    A text is correct for every image that has an equal text. Needed where captions repeat, as in UCM-Captions,
    where most test captions belong to several images.

    Returns:
        (images, texts) bool.

    Raises:
        ValueError: `texts` and `image_of_text` differ in length.
    """
    if len(texts) != len(image_of_text):
        raise ValueError(f"{len(texts)} texts but image_of_text has {len(image_of_text)}; expected one each")
    number: dict[Hashable, int] = {}
    group = torch.tensor([number.setdefault(text, len(number)) for text in texts], dtype=torch.long)
    has_text = torch.zeros(num_images, len(number), dtype=torch.bool)  # (images, distinct texts)
    has_text[torch.as_tensor(image_of_text, dtype=torch.long), group] = True
    return has_text[:, group]  # (images, texts)


def _ranks(scores: Tensor, owner: Tensor, relevant: Tensor | None, *, by_text: bool) -> np.ndarray:
    """Rank of each query's best correct candidate, 1 = first; 0 for a query without one.

    Queries are the rows of `scores` or, with `by_text`, the columns.
    """
    num_images = scores.shape[0]
    if by_text:
        scores = scores.T
        relevant = None if relevant is None else relevant.T
    num_queries, num_candidates = scores.shape
    step = max(1, CHUNK_ELEMENTS // num_candidates)
    images = torch.arange(num_images, device=scores.device)
    parts = []
    for start in range(0, num_queries, step):
        rows = slice(start, start + step)
        chunk = scores[rows]  # (queries, candidates)
        if chunk.is_floating_point() and chunk.isnan().any():
            query, candidate = (int(i) for i in torch.nonzero(chunk.isnan())[0])
            image, text = (candidate, start + query) if by_text else (start + query, candidate)
            raise ValueError(f"scores[{image}, {text}] is NaN; expected numbers that can be ranked")
        if relevant is not None:
            correct = relevant[rows]
        elif by_text:
            correct = owner[rows, None] == images
        else:
            correct = images[rows, None] == owner
        lowest = -torch.inf if chunk.is_floating_point() else torch.iinfo(chunk.dtype).min
        best = chunk.masked_fill(~correct, lowest).amax(dim=1, keepdim=True)  # (queries, 1)
        ahead = ((chunk >= best) & ~correct).sum(dim=1)
        parts.append(torch.where(correct.any(dim=1), ahead + 1, 0))
    return torch.cat(parts).cpu().numpy()
