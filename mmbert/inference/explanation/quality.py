"""Measure how faithful explanations are: perturbation curves, and the pointing game."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from mmbert.data.images import ImageSource
from mmbert.inference.explanation.occlusion import Occlusion
from mmbert.inference.explanation.targets import target_of

ORDERS = ("most_relevant_first", "random", "least_relevant_first")
RESAMPLES = 2000


class Box(NamedTuple):
    """Rectangle in an image, as fractions of its width and height."""

    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True)
class Case:
    """A text with its image, the score to explain, and where the object is that the text is about."""

    image: ImageSource
    text: str
    target: str | None = None
    box: Box | None = None


class Interval(NamedTuple):
    """Mean with a 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class PerturbationCurves:
    """Probability (cosine for itc) of the explained score while patches of the image are removed.

    A faithful explanation has the smallest area where the most relevant patches are removed first.
    """

    curves: dict[str, np.ndarray]
    """Order in `ORDERS` -> (cases, patches + 1) values."""

    def areas(self) -> dict[str, Interval]:
        """Compute the mean area under each curve, over a width of 1, by order."""
        return {order: bootstrap_mean(_areas(curves)) for order, curves in self.curves.items()}

    def differences(self) -> dict[str, Interval]:
        """Compute the mean of an order's area minus that of most_relevant_first, on the same cases."""
        first = _areas(self.curves[ORDERS[0]])
        return {order: bootstrap_mean(_areas(self.curves[order]) - first) for order in ORDERS[1:]}


def _areas(curves: np.ndarray) -> np.ndarray:
    return (curves[:, 1:] + curves[:, :-1]).mean(axis=1) / 2  # trapezoids


def bootstrap_mean(values: Sequence[float] | np.ndarray, *, seed: int = 0) -> Interval:
    """Compute a mean with its 95 % bootstrap interval over cases."""
    values = np.asarray(values, dtype=float)
    if not len(values):
        return Interval(np.nan, np.nan, np.nan)
    rows = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.percentile(values[rows].mean(axis=1), [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high))


def perturbation_curves(
    model: Any, cases: Sequence[Case], relevance: Sequence[np.ndarray], *, seed: int = 0
) -> PerturbationCurves:
    """Remove the patches of each image in three orders, and follow the explained score.

    Args:
        model: Result of `mmbert.load`.
        cases: Texts with their images.
        relevance: (rows, columns) relevance of the patches of each.
        seed: Seed of the random order.
    """
    rng = np.random.default_rng(seed)
    curves: dict[str, list[np.ndarray]] = {order: [] for order in ORDERS}
    for case, patches in zip(cases, relevance, strict=True):
        target, pixels = target_of(model, case.image, case.text, case.target), model.processor.pixel_values(case.image)
        occlusion = Occlusion(model.core, model.processor, target, pixels, patches.shape)
        ranked = (-patches).argsort(axis=None, kind="stable")
        orders = dict(zip(ORDERS, (ranked, rng.permutation(ranked), ranked[::-1]), strict=True))
        # (orders, patches + 1, patches): in step s the patches of the first s positions are removed.
        positions = np.stack([order.argsort() for order in orders.values()])
        kept = torch.from_numpy(positions[:, None] >= np.arange(len(ranked) + 1)[None, :, None]).flatten(0, 1)
        pairs = torch.stack([torch.zeros(len(kept), dtype=torch.int64), torch.arange(len(kept))], dim=1)
        scores = occlusion.scores([[True] * len(occlusion.token_places)], kept, pairs)
        for order, values in zip(orders, target.display(scores).reshape(len(orders), -1), strict=True):
            curves[order].append(values.float().numpy())
    return PerturbationCurves({order: np.stack(rows) for order, rows in curves.items()})


@dataclass(frozen=True)
class PointingGame:
    """Fraction of cases whose most relevant patch overlaps the box of the object that the text is about."""

    hits: np.ndarray
    """(cases,) bool."""
    chance: float
    """The same of a random patch."""

    def accuracy(self) -> Interval:
        """Compute the fraction of hits."""
        return bootstrap_mean(self.hits)


def pointing_game(cases: Sequence[Case], relevance: Sequence[np.ndarray]) -> PointingGame:
    """Play the pointing game (arXiv:1608.00507, Sec. 4.2) with the most relevant patch in place of a point.

    Args:
        cases: Cases with a box.
        relevance: (rows, columns) relevance of the patches of each.
    """
    hits, chances = [], []
    for case, patches in zip(cases, relevance, strict=True):
        assert case.box is not None
        inside = overlaps(patches.shape, case.box)
        hits.append(inside.flat[patches.argmax()])
        chances.append(inside.mean())
    return PointingGame(np.array(hits), float(np.mean(chances)))


def overlaps(grid: tuple[int, ...], box: Box) -> np.ndarray:
    """Return (rows, columns) bool: whether a patch overlaps a box."""
    top, left = np.arange(grid[0])[:, None] / grid[0], np.arange(grid[1])[None] / grid[1]
    below, right = top + 1 / grid[0], left + 1 / grid[1]
    return (top < box.bottom) & (below > box.top) & (left < box.right) & (right > box.left)
