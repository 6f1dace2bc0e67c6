"""Per-item outcomes survive the file, and equal outcomes give equal bytes."""

from pathlib import Path

import numpy as np

from mmbert.metrics.outcomes import ItemOutcomes, read_outcomes, write_outcomes


def test_items_come_back_and_the_same_items_give_the_same_bytes(tmp_path: Path) -> None:
    items = {"vqa_accuracy": ItemOutcomes([0.3, 1.0, 0.0], [0, 0, 7]), "retrieval/R@1": ItemOutcomes([], [])}
    for name in ("a.npz", "b.npz"):
        write_outcomes(tmp_path / name, items)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    found = read_outcomes(tmp_path / "a.npz")
    assert list(found) == list(items)
    assert np.array_equal(found["vqa_accuracy"].values, [0.3, 1.0, 0.0])
    assert found["vqa_accuracy"].images.tolist() == [0, 0, 7] and len(found["retrieval/R@1"].values) == 0
