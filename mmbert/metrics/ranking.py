"""Ranking quality of one score for two classes."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def auroc(scores: Tensor | np.ndarray | Sequence[float], labels: Tensor | np.ndarray | Sequence[int]) -> float:
    """Area under the ROC curve: the probability that a positive scores above a negative, ties counting half.

    Computed from integer ranks (the Mann-Whitney U statistic), so the result is exact.

    Args:
        scores: (N,) higher = more likely positive.
        labels: (N,) bool or 0/1, 1 = positive.

    Raises:
        ValueError: shapes differ, a score is NaN, a label is neither 0 nor 1, or a class is missing.
    """
    score = _array(scores)
    label = _array(labels)
    if score.ndim != 1 or score.shape != label.shape:
        raise ValueError(f"scores has shape {score.shape}, labels {label.shape}; expected the same (N,)")
    if np.isnan(score).any():
        raise ValueError(f"scores[{int(np.isnan(score).argmax())}] is NaN; expected numbers")
    wrong = (label != 0) & (label != 1)
    if wrong.any():
        raise ValueError(f"labels holds {label[wrong][0]}; expected 0 (negative) and 1 (positive) only")
    positive = score[label == 1]
    negative = np.sort(score[label == 0])
    if not len(positive) or not len(negative):
        raise ValueError(f"{len(positive)} positives and {len(negative)} negatives; expected some of each")
    below = np.searchsorted(negative, positive, side="left")
    not_above = np.searchsorted(negative, positive, side="right")
    return (int(below.sum()) + int(not_above.sum())) / (2 * len(positive) * len(negative))


def _array(values: Tensor | np.ndarray | Sequence[float]) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        # NumPy has no bfloat16; float32 holds every half-precision number exactly.
        return (values.float() if values.dtype in (torch.bfloat16, torch.float16) else values).numpy()
    return np.asarray(values)
