"""Per-item outcomes of a test split, as paired statistics need them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np


class ItemOutcomes(NamedTuple):
    """Outcome of each item of a test split, in its order; the mean of the values is the metric."""

    values: Sequence[float]  # (N,) hits, or scores up to 1
    images: Sequence[int]  # (N,) index of the image of each item; items of one image are not independent


def write_outcomes(file: Path, items: Mapping[str, ItemOutcomes]) -> None:
    """Write `NAME` (N,) float64 and `NAME:image` (N,) int32 of every metric to a compressed .npz file."""
    arrays: dict[str, np.ndarray] = {}
    for name, found in items.items():
        arrays[name] = np.asarray(found.values, dtype=np.float64)
        arrays[f"{name}:image"] = np.asarray(found.images, dtype=np.int32)
    with file.open("wb") as target:
        np.savez_compressed(target, allow_pickle=False, **arrays)


def read_outcomes(file: Path) -> dict[str, ItemOutcomes]:
    """Read the outcomes that `write_outcomes` wrote."""
    with np.load(file, allow_pickle=False) as arrays:
        names = [name for name in arrays.files if not name.endswith(":image")]
        return {name: ItemOutcomes(arrays[name], arrays[f"{name}:image"]) for name in names}
