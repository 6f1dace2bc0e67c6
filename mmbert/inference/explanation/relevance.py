"""Relevance by attention: the rules of Chefer et al. (arXiv:2103.15679, Sec. 3) for rows of hidden states.

The paper keeps four maps: of text and image tokens to text and image tokens. Here a row of hidden states holds its
relevance to all N = T + P input tokens in one vector, so that one rule serves sequences of both modalities (early
fusion), two streams, and shared tokens that belong to neither.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class RelevanceRows(NamedTuple):
    """Relevance of the N input tokens for each of L rows of hidden states."""

    relevance: Tensor  # (L, N)
    initial: Tensor  # (L, N) before any attention: 1 at the input token of the row; 0 where the row has none

    def select(self, weights: Tensor) -> "RelevanceRows":
        """Combine rows by (K, L) weights."""
        return RelevanceRows(weights @ self.relevance, weights @ self.initial)


def mean_positive_attention(weights: Tensor, gradients: Tensor) -> Tensor:
    """Average attention over the heads, each weighted by its gradient, without negative parts (Eq. 5).

    Args:
        weights: (H, L, S) attention weights.
        gradients: (H, L, S) gradient of the explained score with respect to them.

    Returns:
        (L, S).
    """
    return (weights * gradients).clamp(min=0).mean(dim=0)


def attend_relevance(rows: RelevanceRows, context: RelevanceRows, attention: Tensor, num_text: int) -> RelevanceRows:
    """Add to the relevance of the rows what they attend to.

    Args:
        rows: L rows that attend.
        context: S rows that are attended to.
        attention: (L, S) by `mean_positive_attention`.
        num_text: Number of text tokens T, which come first among the N input tokens.

    Returns:
        The L rows after the layer. Where the rows are tokens of one modality and the context those of the other, by
        Eq. 8 to 11; else by Eq. 6 and 7.
    """
    text, image = slice(0, num_text), slice(num_text, None)
    for own, other in ((text, image), (image, text)):
        if _is_of(rows, other) or _is_of(context, own):
            continue
        relevance = rows.relevance.clone()
        relevance[:, own] += attention @ context.relevance[:, own]  # Eq. 11
        mixed = _normalized(rows, own).T @ attention @ _normalized(context, other)  # Eq. 10: (own, other)
        relevance[:, other] += rows.initial[:, own] @ mixed
        return RelevanceRows(relevance, rows.initial)
    return RelevanceRows(rows.relevance + attention @ context.relevance, rows.initial)


def _is_of(rows: RelevanceRows, modality: slice) -> bool:
    """Whether a row has an input token of a modality, or none of either."""
    return bool((rows.initial[:, modality] > 0).any() or (rows.initial.sum(dim=1) == 0).any())


def _normalized(rows: RelevanceRows, columns: slice) -> Tensor:
    """Scale what attention added within the rows' own modality to a sum of 1 in each row (Eq. 8 and 9)."""
    initial = rows.initial[:, columns]
    added = rows.relevance[:, columns] - initial
    total = added.sum(dim=1, keepdim=True)
    return torch.where(total > 0, added / total.clamp(min=torch.finfo(added.dtype).tiny), 0.0) + initial
