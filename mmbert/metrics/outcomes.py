"""Results of single test items, which paired statistics need: a mean alone can't say what is noise."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np


class ItemOutcomes(NamedTuple):
    """What became of each item of a test split, in its order; the mean of the values is the result of that name."""

    values: Sequence[float]  # (N,) hits, or scores up to 1
    images: Sequence[int]  # (N,) number of the image that an item is about; items of one image depend on each other


def write_outcomes(file: Path, items: Mapping[str, ItemOutcomes]) -> None:
    """Writes `NAME` (N,) float64 and `NAME:image` (N,) int32 of every result to a compressed .npz."""
    arrays: dict[str, np.ndarray] = {}
    for name, found in items.items():
        arrays[name] = np.asarray(found.values, dtype=np.float64)
        arrays[f"{name}:image"] = np.asarray(found.images, dtype=np.int32)
    with file.open("wb") as target:
        np.savez_compressed(target, allow_pickle=False, **arrays)


def read_outcomes(file: Path) -> dict[str, ItemOutcomes]:
    """What `write_outcomes` wrote."""
    with np.load(file, allow_pickle=False) as arrays:
        names = [name for name in arrays.files if not name.endswith(":image")]
        return {name: ItemOutcomes(arrays[name], arrays[f"{name}:image"]) for name in names}
