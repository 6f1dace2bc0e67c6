"""Image-text retrieval: three ways to score images with texts, from cheap to exact, on outputs encoded once."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmbert.data.examples import Example
from mmbert.data.images import ImageSource
from mmbert.data.pairs import text_key
from mmbert.errors import UsageError
from mmbert.evaluation.encoding import EncodedCandidates, pair_scores
from mmbert.metrics.outcomes import ItemOutcomes
from mmbert.metrics.retrieval import equal_text_relevance, ranks, recall_at_k
from mmbert.model.modeling import MMBertForPreTraining
from mmbert.runtime.memory import peak_memory, reset_peak_memory

TEXTS_AT_ONCE = 256
"""Distinct texts whose pairs are listed at once; bounds the memory of the lists."""


@dataclass(frozen=True)
class Candidates:
    """N different images and M texts to rank against each other."""

    images: Sequence[ImageSource]
    texts: Sequence[str]
    image_of_text: Sequence[int]
    """(M,) number of the image that each text belongs to."""

    @classmethod
    def from_examples(cls, examples: Sequence[Example]) -> "Candidates":
        """All images of a split, each with all its captions."""
        return cls(
            [example.image for example in examples],
            [caption for example in examples for caption in example.captions],
            [number for number, example in enumerate(examples) for _ in example.captions],
        )


class ScoreMatrix(NamedTuple):
    """What a scorer gives."""

    scores: Tensor  # (N, U) images and distinct texts, higher = better match
    fusion_passes: int


Scorer = Callable[[MMBertForPreTraining, EncodedCandidates, int], ScoreMatrix]


def contrastive(model: MMBertForPreTraining, encoded: EncodedCandidates, k: int) -> ScoreMatrix:
    """Cosine of the contrastive vectors: one matrix product, no fusion (CLIP, arXiv:2103.00020)."""
    assert encoded.image_vectors is not None and encoded.text_vectors is not None
    return ScoreMatrix(encoded.image_vectors @ encoded.text_vectors.T, 0)


def exhaustive(model: MMBertForPreTraining, encoded: EncodedCandidates, k: int) -> ScoreMatrix:
    """Matching score of every image with every text: N x U fusions (ViLT, arXiv:2102.03334)."""
    assert encoded.images is not None
    return _fused(model, encoded, torch.ones(len(encoded.images), len(encoded.texts), dtype=torch.bool))


def two_stage(model: MMBertForPreTraining, encoded: EncodedCandidates, k: int) -> ScoreMatrix:
    """Matching score of the k texts nearest to each image and the k images nearest to each text.

    As ALBEF (arXiv:2107.07651, Sec. 5), but a pair that either side chose is fused once and counts in both
    directions: at most k(N + U) fusions. A pair that nobody chose ranks below all that were, by contrastive score. So
    with k = N every pair is fused, and the scores are those of `exhaustive`.
    """
    near = contrastive(model, encoded, k).scores
    chosen = torch.zeros_like(near, dtype=torch.bool)
    chosen.scatter_(1, near.topk(min(k, near.shape[1]), dim=1).indices, True)
    chosen.scatter_(0, near.topk(min(k, near.shape[0]), dim=0).indices, True)
    fused = _fused(model, encoded, chosen)
    scores = fused.scores.double()  # fp64 keeps the order of cosines after the subtraction
    below = scores[chosen].min() - 3  # a cosine is 1 at most
    return ScoreMatrix(torch.where(chosen, scores, near + below), fused.fusion_passes)


SCORERS: dict[str, Scorer] = {"itc": contrastive, "itm": exhaustive, "two_stage": two_stage}
"""Name -> (model, encoded, k) to `ScoreMatrix`."""

REQUIRED_OBJECTIVES = {"itc": ("itc",), "itm": ("itm",), "two_stage": ("itc", "itm")}
"""Scorer -> the objectives whose heads it reads."""


def choose_scorer(model: MMBertForPreTraining, name: str = "auto") -> str:
    """The scorer of that name if the model can do it; "auto": two_stage, else the one that it can do.

    Raises:
        UsageError: The model lacks the objective, or knows none that ranks.
    """
    can = [scorer for scorer, needed in REQUIRED_OBJECTIVES.items() if all(n in model.objectives for n in needed)]
    has = ", ".join(model.objectives)
    if not can:
        raise UsageError(f"a model with the objectives {has} ranks nothing: train one with itm, itc or both.")
    if name == "auto":
        return can[-1]
    if name not in SCORERS:
        raise UsageError(f"scorer='{name}'; allowed are auto, {', '.join(SCORERS)}.")
    if name not in can:
        config = model.config
        shallow = not config.text_layers or not config.image_layers
        why = (
            f" (and can't have itc, with text_layers={config.text_layers} and image_layers={config.image_layers})"
            if shallow and "itc" in REQUIRED_OBJECTIVES[name]
            else ""
        )
        raise UsageError(
            f"scorer='{name}' reads the objectives {' and '.join(REQUIRED_OBJECTIVES[name])}, but the model has {has}{why}; "
            f"it can do {', '.join(can)}."
        )
    return name


def retrieve(
    model: MMBertForPreTraining,
    encoded: EncodedCandidates,
    candidates: Candidates,
    scorer: str,
    *,
    k: int = 32,
    folds: int = 1,
    equal_texts: bool = False,
) -> dict[str, Any]:
    """Ranks all candidates with one scorer, or the mean over folds of them; `rank_candidates` has arguments and errors.

    Returns:
        The keys of `recall_at_k`, and scorer, k (0 where it has no part), folds, num_images, num_texts, image_passes,
        text_passes, fusion_passes, scoring_seconds, peak_memory (bytes, of this process).
    """
    return rank_candidates(model, encoded, candidates, scorer, k=k, folds=folds, equal_texts=equal_texts)[0]


def rank_candidates(
    model: MMBertForPreTraining,
    encoded: EncodedCandidates,
    candidates: Candidates,
    scorer: str,
    *,
    k: int = 32,
    folds: int = 1,
    equal_texts: bool = False,
) -> tuple[dict[str, Any], dict[str, ItemOutcomes]]:
    """Ranks all candidates with one scorer, and tells of each query whether it found a right partner first.

    Args:
        model: In evaluation mode.
        encoded: The candidates, from `encode`.
        candidates: What is ranked.
        scorer: A name in `SCORERS` that the model can do.
        k: Shortlist of two_stage, in texts an image and in images a text.
        folds: Consecutive parts of the images that are ranked by themselves; 5 of COCO's 5,000 is its 1k protocol.
        equal_texts: Count a text as right for every image that carries an equal one (case and spaces aside).

    Returns:
        What `retrieve` returns; and `image_to_text/R@1` and `text_to_image/R@1` of every query.

    Raises:
        UsageError: k or folds out of range.
    """
    num_images = len(candidates.images)
    if k < 1:
        raise UsageError(f"k={k}: a shortlist has 1 candidate or more.")
    if not 1 <= folds <= num_images:
        raise UsageError(f"folds={folds}: from 1 to the {num_images} images.")
    started = time.perf_counter()
    reset_peak_memory()
    owner = torch.tensor(candidates.image_of_text)
    keys = [text_key(text) for text in candidates.texts] if equal_texts else []
    results, fusion_passes = [], 0
    items: dict[str, tuple[list[float], list[int]]] = {"image_to_text/R@1": ([], []), "text_to_image/R@1": ([], [])}
    for fold in range(folds):
        first, last = (number * num_images // folds for number in (fold, fold + 1))
        texts = ((owner >= first) & (owner < last)).nonzero()[:, 0]
        part = encoded.part(slice(first, last), texts)
        scored = SCORERS[scorer](model, part, k)
        own = owner[texts] - first
        relevant = None
        if equal_texts:
            relevant = equal_text_relevance([keys[i] for i in texts.tolist()], own.tolist(), last - first)
        scores = scored.scores[:, part.text_of]
        results.append(recall_at_k(scores, own, relevant=relevant))
        fusion_passes += scored.fusion_passes
        by_image, by_text = ranks(scores, own, relevant=relevant)
        asked = (by_image, range(first, last)), (by_text, owner[texts].tolist())
        for (hits, about), (query_ranks, images) in zip(items.values(), asked, strict=True):
            for rank, image in zip(query_ranks.tolist(), images, strict=True):
                if rank:  # 0: an image without a text asks nothing
                    hits.append(float(rank == 1))
                    about.append(image)
    report = {
        "scorer": scorer,
        "k": k if scorer == "two_stage" else 0,
        "folds": folds,
        "num_images": num_images,
        "num_texts": len(candidates.texts),
        **{name: fmean(result[name] for result in results) for name in results[0]},
        "image_passes": encoded.image_passes,
        "text_passes": encoded.text_passes,
        "fusion_passes": fusion_passes,
        "scoring_seconds": time.perf_counter() - started,
        "peak_memory": peak_memory(),
    }
    return report, {name: ItemOutcomes(*found) for name, found in items.items()}


def _fused(model: MMBertForPreTraining, encoded: EncodedCandidates, chosen: Tensor) -> ScoreMatrix:
    """Matching scores of the `chosen` pairs, (N, U) bool; 0 elsewhere."""
    assert encoded.images is not None
    scores = torch.zeros(chosen.shape)
    by_length = torch.tensor([len(text) for text in encoded.texts]).argsort(stable=True)
    for texts in by_length.split(TEXTS_AT_ONCE):
        found = chosen[:, texts].nonzero()
        pairs = torch.stack([found[:, 0], texts[found[:, 1]]], dim=1)
        values = pair_scores(model, encoded.images, encoded.texts, pairs)
        scores = scores.to(values.dtype)
        scores[pairs[:, 0], pairs[:, 1]] = values
    return ScoreMatrix(scores, int(chosen.sum()))
