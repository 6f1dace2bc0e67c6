"""The statistics of a comparison: values worked by hand, SciPy as oracle, and simulated comparisons."""

import numpy as np
import pytest

from mmbert.compare.statistics import compare_pairs, holm, interval


def test_holm_by_hand() -> None:
    # Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1: 0.04, 0.06, 0.06, 0.04; none may be below the one before it.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])


def test_no_test_with_one_seed() -> None:
    items = {"a": [np.ones(50)], "b": [np.zeros(50)]}
    (verdict,) = compare_pairs(items, np.arange(50), measure="m")
    assert np.isnan(verdict.p) and np.isnan(verdict.p_holm) and not verdict.shown
    assert np.isnan(interval(items["a"], np.arange(50)).spread)
