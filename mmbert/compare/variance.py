"""Variances of mean scores over seeds and images, and the intervals and p-values that follow from them.

`mmbert.compare.statistics` describes the method. Shapes: R runs (one per seed), I items, C images.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import comb, nan, sqrt
from typing import NamedTuple

import numpy as np
from scipy.special import stdtr, stdtrit

from mmbert.runtime.randomness import numpy_generator

ROUNDING = 1e-24
"""Variances up to this are rounding errors: one hit among a million items is 1e-12."""

FEW_RUNS_WEIGHT = 0.4
"""Weight of the smaller number of runs - 1 in the degrees of freedom where two strategies have unequal numbers of runs.

With 5 runs against 3 of four times the standard deviation, Satterthwaite's degrees of freedom alone give 8 to 9 % false
positives at the 5 % level, with this weight 5 to 6 %; the power for a difference of 5 seed deviations among 3
strategies drops from 93 % to 89 %.
"""

BLOCK_ELEMENTS = 1 << 22
"""Bootstrap weights in memory at once; 8 bytes each."""


class Variance(NamedTuple):
    """Estimate of a variance with its degrees of freedom."""

    variance: float
    freedom: float  # degrees of freedom of the estimate


class ImageSums(NamedTuple):
    """Outcomes of the runs of one strategy, summed over the items of each image."""

    sums: np.ndarray  # (R, C)
    counts: np.ndarray  # (C,) items of each image

    @property
    def runs(self) -> int:
        """R, number of runs."""
        return len(self.sums)

    @property
    def scores(self) -> np.ndarray:
        """(R,) means over items."""
        return self.sums.sum(axis=1) / self.counts.sum()


def mean_variances(strategies: Sequence[ImageSums], contrast: np.ndarray) -> list[Variance]:
    """Variances of a mean or a difference of means: of both parts, seeds, scores, items; a test must pass each.

    Args:
        strategies: One or two.
        contrast: (C,) Mean or difference over seeds, summed over each image's items.

    Returns:
        Items alone if a strategy has one run; empty if there is only one image.
    """
    counts = strategies[0].counts
    images = len(counts)
    if images < 2:
        return []
    items = Variance(float(_item_variance(contrast, counts)), images - 1)
    if any(strategy.runs < 2 for strategy in strategies):
        return [items]
    scores: list[Variance] = []
    seeds: list[Variance] = []
    noise: list[Variance] = []
    for strategy in strategies:
        runs = strategy.runs
        apart = strategy.sums - strategy.sums.mean(axis=0)
        alone = float(_item_variance(apart, counts).sum()) / (runs * (runs - 1))
        scores.append(Variance(float(strategy.scores.var(ddof=1)) / runs, runs - 1))
        # Seeds that agree by chance have at least the variance that single images have between them.
        seeds.append(Variance(max(scores[-1].variance, alone), runs - 1))
        noise.append(Variance(-alone, (runs - 1) * (images - 1)))
    # If items add no variance beyond the noise in the seeds, the seeds' part covers both.
    both = [*seeds, items, *noise] if items.variance + sum(part.variance for part in noise) > 0 else seeds
    # Unadjusted scores too: raising the part of the strategy with less variance adds degrees of freedom.
    return [_sum_variances(both, seeds), _sum_variances(seeds, seeds), _sum_variances(scores, seeds), items]


def difference_variances(samples: Sequence[ImageSums], gaps: np.ndarray) -> list[Variance]:
    """As `mean_variances`, for the differences (R,) `gaps` of the same runs on two samples of images."""
    runs = len(gaps)
    items: list[Variance] = []
    noise: list[Variance] = []
    for sample in samples:
        mean, freedom = sample.sums.mean(axis=0), len(sample.counts) - 1
        items.append(Variance(float(_item_variance(mean, sample.counts)), freedom))
        if runs > 1:
            alone = float(_item_variance(sample.sums - mean, sample.counts).sum()) / (runs * (runs - 1))
            noise.append(Variance(-alone, (runs - 1) * freedom))
    if runs < 2:
        return [_sum_variances(items, items[:1])]
    scores = Variance(float(gaps.var(ddof=1)) / runs, runs - 1)
    seeds = scores._replace(variance=max(scores.variance, -sum(part.variance for part in noise)))
    varied = sum(part.variance for part in [*items, *noise]) > 0
    both = [seeds, *items, *noise] if varied else [seeds]
    return [_sum_variances(both, [seeds]), seeds, scores, _sum_variances(items, items[:1])]


def _sum_variances(parts: Sequence[Variance], seeds: Sequence[Variance]) -> Variance:
    """Sum of independent variances, some negative, with Satterthwaite's degrees of freedom."""
    total = sum(part.variance for part in parts)
    if total <= ROUNDING:
        return Variance(total, 1.0)
    inverse = sum(part.variance**2 / part.freedom for part in parts) / total**2
    fewest = min(part.freedom for part in seeds)
    if any(part.freedom != fewest for part in seeds):
        # Against more runs of a strategy with less variance, few runs that agree by chance would count too much.
        inverse = (1 - FEW_RUNS_WEIGHT) * inverse + FEW_RUNS_WEIGHT / fewest
    return Variance(total, 1 / inverse)


def _item_variance(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Variance of a mean over items under sampling of images: (..., C) sums over each image's items -> (...)."""
    images, total = len(counts), counts.sum()
    # An image with more items moves the mean by the deviation of its items from the mean, not by their number.
    apart = sums - sums.sum(axis=-1, keepdims=True) / total * counts
    return images / (images - 1) * (apart**2).sum(axis=-1) / total**2


def confidence_bounds(
    mean: float, variances: Sequence[Variance], images: int, level: float, *, lowest: float
) -> tuple[float, float]:
    """Confidence interval around `mean`, clipped to `lowest` to 1."""
    if not variances:
        return lowest, 1.0
    half_widths = [stdtrit(part.freedom, 0.5 + level / 2) * sqrt(part.variance) for part in variances]
    half_width = float(max(half_widths))
    if half_width**2 <= ROUNDING:
        # No image differs from the rest; up to this share of all images might still differ, by the maximum.
        share = 1 - (0.5 - level / 2) ** (1 / images)
        return (1 - share) * mean + share * lowest, (1 - share) * mean + share
    return max(mean - half_width, lowest), min(mean + half_width, 1.0)


def p_value(gap: float, variances: Sequence[Variance], first: ImageSums, second: ImageSums) -> float:
    """Two-sided p-value of a difference; NaN where no test is possible."""
    if not variances or first.runs < 2 or second.runs < 2:
        return nan
    if gap**2 <= ROUNDING:
        return 1.0
    varied = [part for part in variances if part.variance > ROUNDING]
    if not varied:
        # Only the strategy varies: the smallest p-values of an exact test over seeds and of one over images.
        return min(1.0, max(2 / comb(first.runs + second.runs, first.runs), 2.0 ** (1 - len(first.counts))))
    return float(max(2 * stdtr(part.freedom, -abs(gap) / sqrt(part.variance)) for part in varied))


def bootstrap_means(sums: np.ndarray, counts: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Bootstrap means over items of resampled images, the same resamples for all rows: (N, C) -> (resamples, N)."""
    rows = max(1, BLOCK_ELEMENTS // len(counts))
    means = []
    for block, start in enumerate(range(0, resamples, rows)):
        drawn = _draws(len(counts), min(rows, resamples - start), seed, block)  # (rows, C)
        means.append(drawn @ sums.T / (drawn @ counts)[:, None])
    return np.concatenate(means)


@lru_cache(maxsize=1)
def _draws(images: int, rows: int, seed: int, block: int) -> np.ndarray:
    """(rows, images) number of times that each image is drawn in each resample."""
    # The name of the random stream is part of the seed: with another one stored studies would not reproduce.
    generator = numpy_generator(seed, "bootstrap over pictures", block)
    return generator.multinomial(images, np.full(images, 1 / images), size=rows).astype(float)


def sum_over_images(items: Mapping[str, Sequence[np.ndarray]], clusters: np.ndarray) -> dict[str, ImageSums]:
    """Validate the runs of all strategies and sum them over the items of each image."""
    clusters = np.asarray(clusters)
    if clusters.ndim != 1 or not len(clusters) or clusters.dtype.kind not in "iu":
        raise ValueError(
            f"clusters has shape {clusters.shape} and type {clusters.dtype}; expected (items,) integers, the "
            f"image of each item, at least one"
        )
    order = np.argsort(clusters, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(clusters[order]) != 0])
    counts = np.diff(np.r_[starts, len(clusters)])
    found = {}
    for strategy, runs in items.items():
        if not len(runs):
            raise ValueError(f"{strategy} has no runs; expected an array of items for at least one seed")
        values = [np.asarray(run, dtype=float) for run in runs]
        for number, run in enumerate(values):
            if run.shape != clusters.shape:
                raise ValueError(
                    f"{strategy}, run {number}, has items of shape {run.shape} but there are {len(clusters)} clusters; "
                    f"expected ({len(clusters)},): every run answers the same items"
                )
            wrong = ~((run >= -1e-6) & (run <= 1 + 1e-6))
            if wrong.any():
                place = int(wrong.argmax())
                raise ValueError(f"{strategy}, run {number}, has {run[place]} at item {place}; expected values 0 to 1")
        found[strategy] = ImageSums(np.add.reduceat(np.stack(values)[:, order], starts, axis=1), counts)
    return found
