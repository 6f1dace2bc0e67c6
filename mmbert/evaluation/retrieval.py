"""Image-text retrieval with three scorers, from cheap to exact, on images and texts that are encoded once."""

import math
import time
from collections import Counter
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
from mmbert.evaluation.cost import log_fusion_cost
from mmbert.evaluation.encoding import EncodedCandidates, pair_scores
from mmbert.metrics.outcomes import ItemOutcomes
from mmbert.metrics.retrieval import equal_text_relevance, ranks, recall_at_k
from mmbert.model.modeling import MMBertForPreTraining
from mmbert.runtime.memory import peak_memory, reset_peak_memory

PAIRS_PER_CHUNK = 2_000_000
"""Pairs that are listed at a time, about: 100 MB. All pairs of an image are in one list."""
MEASURED_IMAGES = 64
"""Images from whose pairs the time of all is estimated."""


@dataclass(frozen=True)
class Candidates:
    """N images and M texts to rank against each other."""

    images: Sequence[ImageSource]
    texts: Sequence[str]
    image_of_text: Sequence[int]
    """(M,) number of the image of each text."""

    @classmethod
    def from_examples(cls, examples: Sequence[Example]) -> "Candidates":
        """Take all images of a split with all of their captions."""
        return cls(
            [example.image for example in examples],
            [caption for example in examples for caption in example.captions],
            [number for number, example in enumerate(examples) for _ in example.captions],
        )

    def captions_per_image(self) -> str:
        """Name the protocol: "5 captions per image", or "1 to 5 captions per image"."""
        counts = Counter(self.image_of_text)
        least, most = min(counts.values(), default=0), max(counts.values(), default=0)
        least = 0 if len(counts) < len(self.images) else least
        amount = str(most) if least == most else f"{least} to {most}"
        return f"{amount} caption{'' if most == 1 else 's'} per image"


class ScoreMatrix(NamedTuple):
    """Scores of all images with all distinct texts, and the number of fusion passes they took."""

    scores: Tensor  # (N, U), higher = better match
    fusion_passes: int


class Ranking(NamedTuple):
    """Metrics of one scorer, and the outcome of every query."""

    metrics: dict[str, Any]
    outcomes: dict[str, ItemOutcomes]


Scorer = Callable[[MMBertForPreTraining, EncodedCandidates, int, float], ScoreMatrix]


def contrastive(model: MMBertForPreTraining, encoded: EncodedCandidates, k: int, itc_weight: float) -> ScoreMatrix:
    """Score by the cosine of the contrastive vectors: one matrix product, no fusion (CLIP, arXiv:2103.00020)."""
    return ScoreMatrix(encoded.similarities(), 0)


def exhaustive(model: MMBertForPreTraining, encoded: EncodedCandidates, k: int, itc_weight: float) -> ScoreMatrix:
    """Score every image with every text by the matching head: N x U fusion passes (ViLT, arXiv:2102.03334)."""
    assert encoded.images is not None
    every = torch.ones(len(encoded.images), len(encoded.texts), dtype=torch.bool)
    scores = fuse_selected(model, encoded, every, name="itm")
    return ScoreMatrix(scores.view(every.shape), len(scores))


def two_stage(model: MMBertForPreTraining, encoded: EncodedCandidates, k: int, itc_weight: float) -> ScoreMatrix:
    """Score the k nearest texts of each image and the k nearest images of each text by the matching head.

    As ALBEF (arXiv:2107.07651, Sec. 5), except that a pair on the shortlist of either side is fused once and counts in
    both directions: at most k(N + U) fusion passes. All other pairs rank below those, by contrastive score. With
    k = N every pair is fused, and the scores are those of `exhaustive`. The contrastive logit times `itc_weight` is
    added to the matching score (BLIP, arXiv:2201.12086, adds both): a large weight keeps the order of the shortlist.
    """
    near = contrastive(model, encoded, k, itc_weight).scores
    chosen = shortlist(near, k)
    fused = fuse_selected(model, encoded, chosen, name=f"two_stage, k={k}").double()
    if itc_weight:
        contrast: Any = model.objectives["itc"]
        fused += itc_weight * float(contrast.scale.detach()) * near[chosen].double()
    scores = near.double()  # fp64 keeps the order of cosines after the subtraction
    del near  # of 5,000 images and 25,000 texts half a GB
    scores += fused.min() - 3  # a cosine is 1 at most
    scores[chosen] = fused
    return ScoreMatrix(scores, len(fused))


SCORERS: dict[str, Scorer] = {"itc": contrastive, "itm": exhaustive, "two_stage": two_stage}
"""Name -> (model, encoded, k, itc_weight) to `ScoreMatrix`."""

REQUIRED_OBJECTIVES = {"itc": ("itc",), "itm": ("itm",), "two_stage": ("itc", "itm")}
"""Scorer -> objectives whose heads it needs."""


def choose_scorer(model: MMBertForPreTraining, name: str = "auto") -> str:
    """Choose a scorer that the model has the objectives for.

    Args:
        model: Any pretrained model.
        name: A name in `SCORERS`; "auto": two_stage, or the only scorer that the model has.

    Raises:
        UsageError: An unknown scorer, or the model has not the objectives that it needs.
    """
    can = [scorer for scorer, needed in REQUIRED_OBJECTIVES.items() if all(n in model.objectives for n in needed)]
    has = ", ".join(model.objectives)
    if not can:
        raise UsageError(f"a model with the objectives {has} can't rank: train one with itm, itc or both.")
    if name == "auto":
        return can[-1]
    if name not in SCORERS:
        raise UsageError(f"scorer='{name}'; allowed are auto, {', '.join(SCORERS)}.")
    if name not in can:
        config = model.config
        shallow = not config.text_layers or not config.image_layers
        why = (
            f" (itc is impossible with text_layers={config.text_layers} and image_layers={config.image_layers})"
            if shallow and "itc" in REQUIRED_OBJECTIVES[name]
            else ""
        )
        needed = " and ".join(REQUIRED_OBJECTIVES[name])
        raise UsageError(
            f"scorer='{name}' needs the objectives {needed}, but the model has {has}{why}; "
            f"allowed are {', '.join(can)}."
        )
    return name


def default_scorers(model: MMBertForPreTraining) -> list[str]:
    """Scorers of `--scorer auto`, the cheap one first: itc if the model has it, then two_stage; or itm alone.

    Raises:
        UsageError: The model has neither itc nor itm.
    """
    best = choose_scorer(model)
    return ["itc", "two_stage"] if best == "two_stage" else [best]


def check_ranking_options(num_images: int, *, k: int, folds: int, itc_weight: float = 0.0) -> None:
    """Check the options of `rank_candidates`.

    Raises:
        UsageError: k, folds or itc_weight out of range.
    """
    if not 0 <= itc_weight < math.inf:
        raise UsageError(f"itc_weight={itc_weight}: must be a number of 0 or more.")
    if k < 1:
        raise UsageError(f"k={k}: the shortlist needs 1 candidate or more.")
    if not 1 <= folds <= num_images:
        raise UsageError(f"folds={folds}: allowed are 1 to {num_images}, the number of images.")


def rank_candidates(
    model: MMBertForPreTraining,
    encoded: EncodedCandidates,
    candidates: Candidates,
    scorer: str,
    *,
    k: int = 32,
    folds: int = 1,
    equal_texts: bool = False,
    itc_weight: float = 0.0,
) -> Ranking:
    """Rank all candidates with one scorer, and compute recall in both directions.

    Args:
        model: In evaluation mode.
        encoded: The candidates, from `encode`.
        candidates: Images and texts to rank.
        scorer: A name in `SCORERS` that the model has the objectives for.
        k: Shortlist of two_stage, in texts per image and images per text.
        folds: Consecutive parts of the images that are ranked separately; 5 of COCO's 5,000 is its 1k protocol. The
            metrics are means over the folds.
        equal_texts: Count a text as correct for every image with an equal text (up to case and spaces).
        itc_weight: Factor of the contrastive logit that two_stage adds to the matching score.

    Returns:
        Metrics: the keys of `recall_at_k`, and scorer, k and itc_weight (0 unless two_stage), folds, num_images,
        num_texts, captions_per_image, image_passes, text_passes, fusion_passes, scoring_seconds, peak_memory (bytes,
        of this process). Outcomes: `image_to_text/R@1` and `text_to_image/R@1` of every query.

    Raises:
        UsageError: k, folds or itc_weight out of range.
    """
    num_images = len(candidates.images)
    check_ranking_options(num_images, k=k, folds=folds, itc_weight=itc_weight)
    started = time.perf_counter()
    reset_peak_memory()
    owner = torch.tensor(candidates.image_of_text)
    keys = [text_key(text) for text in candidates.texts] if equal_texts else []
    results, fusion_passes = [], 0
    outcomes: dict[str, tuple[list[float], list[int]]] = {"image_to_text/R@1": ([], []), "text_to_image/R@1": ([], [])}
    for fold in range(folds):
        first, last = (number * num_images // folds for number in (fold, fold + 1))
        texts = ((owner >= first) & (owner < last)).nonzero()[:, 0]
        part = encoded.select(slice(first, last), texts)
        scored = SCORERS[scorer](model, part, k, itc_weight)
        own = owner[texts] - first
        relevant = None
        if equal_texts:
            relevant = equal_text_relevance([keys[i] for i in texts.tolist()], own.tolist(), last - first)
        scores = scored.scores[:, part.text_index]
        results.append(recall_at_k(scores, own, relevant=relevant))
        fusion_passes += scored.fusion_passes
        by_image, by_text = ranks(scores, own, relevant=relevant)
        queries = (by_image, range(first, last)), (by_text, owner[texts].tolist())
        for (hits, images), (query_ranks, query_images) in zip(outcomes.values(), queries, strict=True):
            for rank, image in zip(query_ranks.tolist(), query_images, strict=True):
                if rank:  # 0: an image without a text is no query
                    hits.append(float(rank == 1))
                    images.append(image)
    metrics = {
        "scorer": scorer,
        "k": k if scorer == "two_stage" else 0,
        "itc_weight": itc_weight if scorer == "two_stage" else 0.0,
        "folds": folds,
        "num_images": num_images,
        "num_texts": len(candidates.texts),
        "captions_per_image": candidates.captions_per_image(),
        **{name: fmean(result[name] for result in results) for name in results[0]},
        "image_passes": encoded.image_passes,
        "text_passes": encoded.text_passes,
        "fusion_passes": fusion_passes,
        "scoring_seconds": time.perf_counter() - started,
        "peak_memory": peak_memory(),
    }
    return Ranking(metrics, {name: ItemOutcomes(*found) for name, found in outcomes.items()})


def shortlist(scores: Tensor, k: int) -> Tensor:
    """Select the k best texts of each image and the k best images of each text, (N, U) bool from (N, U) scores."""
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen.scatter_(1, scores.topk(min(k, scores.shape[1]), dim=1).indices, True)
    return chosen.scatter_(0, scores.topk(min(k, scores.shape[0]), dim=0).indices, True)


def fuse_selected(model: MMBertForPreTraining, encoded: EncodedCandidates, selected: Tensor, *, name: str) -> Tensor:
    """Compute the matching scores of the `selected` pairs, (N, U) bool with K True: (K,), image by image."""
    assert encoded.images is not None
    rows = max(1, PAIRS_PER_CHUNK // max(1, selected.shape[1]))
    blocks = torch.arange(len(selected)).split(rows)
    middle = blocks[len(blocks) // 2][:MEASURED_IMAGES]
    count = int(selected.sum())
    log_fusion_cost(name, model, encoded.images, encoded.texts, _selected_pairs(selected, middle), count)
    return torch.cat(
        [pair_scores(model, encoded.images, encoded.texts, _selected_pairs(selected, images)) for images in blocks]
    )


def _selected_pairs(selected: Tensor, images: Tensor) -> Tensor:
    """List the selected pairs of some images: (K, 2)."""
    found = selected[images].nonzero()
    return torch.stack([images[found[:, 0]], found[:, 1]], dim=1)
