"""AUROC: hand-computed values and SciPy's Mann-Whitney U as oracle."""

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu

from mmbert.metrics.ranking import auroc


@pytest.mark.parametrize(
    ("scores", "labels", "expected"),
    [
        ([0.1, 0.9], [0, 1], 1.0),
        ([0.9, 0.1], [0, 1], 0.0),
        ([0.5, 0.5, 0.5], [0, 1, 1], 0.5),
        # Positives 3, 2 against negatives 2, 1: wins 3>2, 3>1, 2>1 and half of 2=2.
        ([3, 2, 2, 1], [1, 1, 0, 0], 3.5 / 4),
        ([-np.inf, 0.0, np.inf], [0, 1, 0], 0.5),
    ],
)
def test_hand_computed(scores: list[float], labels: list[int], expected: float) -> None:
    assert auroc(scores, labels) == expected
    assert auroc(torch.tensor(scores), torch.tensor(labels, dtype=torch.bool)) == expected


def test_equals_mann_whitney() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        scores = rng.integers(0, rng.choice([2, 5, 1000]), rng.integers(2, 60)).astype(np.float32)
        labels = rng.integers(0, 2, len(scores))
        labels[:2] = [0, 1]
        positive, negative = scores[labels == 1], scores[labels == 0]
        expected = mannwhitneyu(positive, negative).statistic / (len(positive) * len(negative))
        assert auroc(scores, labels) == pytest.approx(expected, abs=1e-15)


def test_half_precision_scores() -> None:
    assert auroc(torch.tensor([1.0, 2.0, 3.0]).bfloat16(), torch.tensor([0, 1, 1])) == 1.0


def test_double_precision_scores_are_not_rounded() -> None:
    close = torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64)
    assert auroc(close, torch.tensor([0, 1])) == 1.0
    assert auroc(close, torch.tensor([1, 0])) == 0.0


@pytest.mark.parametrize(
    ("scores", "labels", "reason"),
    [
        ([0.1, np.nan], [0, 1], r"scores\[1\] is NaN"),
        ([0.1, 0.2], [1, 1], "2 positives and 0 negatives"),
        ([0.1, 0.2], [0, 0], "0 positives and 2 negatives"),
        ([0.1, 0.2], [0, 2], "labels holds 2"),
        ([0.1, 0.2], [0], "expected the same"),
        ([[0.1, 0.2]], [[0, 1]], "expected the same"),
    ],
)
def test_wrong_input_is_rejected(scores: list[float], labels: list[int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        auroc(scores, labels)
