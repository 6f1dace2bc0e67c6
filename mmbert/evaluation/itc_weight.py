"""Choice of two_stage's weight of the contrastive logit on validation rankings."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mmbert.data.pairs import text_key
from mmbert.evaluation.encoding import EncodedCandidates
from mmbert.evaluation.retrieval import Candidates, contrastive, fuse_selected, shortlist
from mmbert.metrics.retrieval import equal_text_relevance
from mmbert.model.modeling import MMBertForPreTraining

WEIGHTS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0)
"""Weights to choose from."""
KEEPS_SHORTLIST = 1e6
"""Weight under which the order of the shortlist stays as it is."""
ONE_SIDED_95 = 1.645
"""Standard errors below the mean: the lower end of a one-sided interval of 95 %."""


class ChosenWeight(NamedTuple):
    """A weight, with the gain in log-likelihood over the order of the shortlist that validation shows for it."""

    itc_weight: float
    gain: float  # nats a query
    lower_bound: float  # of the gain, in nats a query
    num_images: int

    def describe(self, split: str) -> str:
        """Say in a sentence what was chosen and why."""
        where = f"{self.num_images} images of split {split}"
        if self.itc_weight == KEEPS_SHORTLIST:
            return f"itc_weight=auto: {where} show no gain of the fusion, so two_stage keeps the order of the shortlist"
        return (
            f"itc_weight=auto: {self.itc_weight:g}, a gain over the shortlist of {self.gain:.4f} nats a query "
            f"(lower bound {self.lower_bound:.4f}) on {where}"
        )


@torch.no_grad()
def choose_itc_weight(
    model: MMBertForPreTraining, encoded: EncodedCandidates, candidates: Candidates, *, k: int, equal_texts: bool
) -> ChosenWeight:
    """Choose how far the fusion may change the order of the shortlist.

    A weak fusion improves the ranking of some queries and spoils others, and a recall over a few hundred queries does
    not tell which weight is best. So every weight is judged by the log-likelihood of the correct candidates among the
    shortlist of each query, a softmax of the scores whose temperature is fitted for each weight, and the one
    is chosen whose gain over the contrastive scores alone is surest: it has the largest lower bound of a one-sided 95 %
    interval over images. Where no bound is above 0, the order of the shortlist is kept.

    Args:
        model: In evaluation mode, with itc and itm.
        encoded: The validation candidates, from `encode` with their tokens.
        candidates: Validation images and texts.
        k: Shortlist of two_stage.
        equal_texts: Count a text as correct for every image with an equal text.
    """
    near = contrastive(model, encoded, k, 0.0).scores  # (N, U)
    listed = shortlist(near, k)
    fused = near.new_zeros(near.shape, dtype=torch.float64)
    fused[listed] = fuse_selected(model, encoded, listed, name=f"validation, two_stage, k={k}").double()
    contrast = near.double() * float(model.objectives["itc"].scale.detach())  # pyright: ignore
    columns, owner = encoded.text_index, torch.tensor(candidates.image_of_text)
    keys = [text_key(text) for text in candidates.texts] if equal_texts else range(len(candidates.texts))
    relevant = equal_text_relevance(list(keys), owner.tolist(), len(near))  # (N, M)
    fused, contrast, listed = fused[:, columns], contrast[:, columns], listed[:, columns]

    def losses(scores: Tensor) -> Tensor:
        return fitted_losses(scores, listed, relevant, owner)

    before = losses(contrast)
    best = ChosenWeight(KEEPS_SHORTLIST, 0.0, 0.0, len(near))
    for weight in WEIGHTS:
        gains = before - losses(fused + weight * contrast)
        gain, error = float(gains.mean()), float(gains.std()) / math.sqrt(len(gains))
        lower_bound = gain - ONE_SIDED_95 * error
        if lower_bound > best.lower_bound:
            best = ChosenWeight(weight, gain, lower_bound, len(gains))
    return best


def fitted_losses(scores: Tensor, listed: Tensor, relevant: Tensor, owner: Tensor) -> Tensor:
    """Compute the negative log-likelihood of the correct candidates of each image's queries, at the best temperature.

    A query is an image, among its texts on the shortlist, or a text, among its images; one without a correct candidate
    on the shortlist, or without a wrong one, has a loss of 0 under any score.

    Args:
        scores: (N, M) fp64.
        listed: (N, M) bool, pairs on a shortlist.
        relevant: (N, M) bool, correct pairs.
        owner: (M,) int64, the image of each text.

    Returns:
        (N,) nats of each image: its loss as a query, plus the mean of its texts'.
    """
    correct = listed & relevant
    counts = torch.bincount(owner, minlength=len(scores)).clamp(min=1)

    def of_factor(factor: float) -> Tensor:
        found = []
        for dim in (1, 0):
            every = (factor * scores).masked_fill(~listed, -math.inf).logsumexp(dim)
            right = (factor * scores).masked_fill(~correct, -math.inf).logsumexp(dim)
            found.append(torch.where(correct.any(dim), every - right, 0.0))
        of_texts = torch.zeros_like(found[0]).index_add(0, owner, found[1]) / counts
        return found[0] + of_texts

    low, high = 0.0, 8.0  # the mean loss is convex in the factor where each query has one correct candidate
    for _ in range(30):
        third = (high - low) / 3
        if of_factor(low + third).mean() < of_factor(high - third).mean():
            high -= third
        else:
            low += third
    return of_factor((low + high) / 2)
