"""Paired significance tests and confidence intervals over seeds and test images.

A score varies with the seed (another model) and with the test set (other images). A t-test over seeds ignores the
second source, a bootstrap over items the first; both then have a far too high false positive rate. Here items are
shared by all runs (paired) and each seed belongs to one run of one strategy, as readers and cases do in radiology:
Obuchowski & Rockette (1995, doi:10.1080/03610919508813243) with the degrees of freedom of Hillis (2007,
doi:10.1002/sim.2532), and Welch's treatment of unequal variances. With `noise` = the variance that a seed adds to
single images:

    variance of a difference of means = seeds of a + seeds of b + max(items - noise, 0)

Seeds: the variance of the runs' means divided by the number of runs, at least its noise. Items: the variance over
images of the difference averaged over seeds; it contains the noise that the seeds' part already counts, hence the
subtraction (two-way clustering, Cameron, Gelbach & Miller 2011, doi:10.1198/jbes.2010.07136). A difference must also be
significant against the seeds' part alone and the items' part alone: with hits the items' part grows with the observed
difference and has many degrees of freedom, so adding it would make three runs that agree by chance look certain. All
parts are in closed form and items of one image form a cluster, so the same rows give the same p-value everywhere.

Shapes: R runs (one per seed) of a strategy, I items, C images.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from math import comb, fsum, isnan, nan, sqrt
from typing import NamedTuple

import numpy as np
from scipy.special import stdtr, stdtrit

from mmbert.runtime.randomness import numpy_generator

ROUNDING = 1e-24
"""Variances up to this are rounding errors: one hit among a million items is 1e-12."""

CAUTION = 0.4
"""Weight of the smaller number of runs - 1 in the degrees of freedom where two strategies have unequal numbers of runs.

With 5 runs against 3 of four times the standard deviation, Satterthwaite's degrees of freedom alone give 8 to 9 % false
positives at the 5 % level, with this weight 5 to 6 %; the power for a difference of 5 seed deviations among 3
strategies drops from 93 % to 89 %.
"""

BLOCK_ELEMENTS = 1 << 22
"""Bootstrap weights in memory at once; 8 bytes each."""


class Interval(NamedTuple):
    """Mean score of a strategy with its confidence interval; all fractions.

    `low` to `high` generalizes to other seeds and other images of the same kind; with one seed (`seeds` is 1) to other
    images only, and `spread` is then NaN.
    """

    mean: float
    low: float
    high: float
    spread: float  # standard deviation of the runs' means
    seeds: int
    over_items: bool = True  # whether it includes the variance over images; else over seeds alone


class TestResult(NamedTuple):
    """Result of a paired test of strategies `a` and `b` on one measure; fractions, `difference` is a minus b.

    `low` to `high` is the confidence interval over seeds and images. `p` and `p_holm` are NaN where no test is
    possible: one seed, or items of one image. `item_low` to `item_high` is the paired bootstrap interval over images
    for these runs; NaN without resamples.
    """

    __test__ = False  # pytest would collect it by its name

    measure: str
    a: str
    b: str
    difference: float
    low: float
    high: float
    p: float
    p_holm: float
    significant: bool
    item_low: float = nan
    item_high: float = nan
    level: float = 0.95
    seeds: tuple[int, int] = (0, 0)  # of a and of b


class _Variance(NamedTuple):
    variance: float
    freedom: float  # degrees of freedom of the estimate


class _Images(NamedTuple):
    """Outcomes of the runs of one strategy, summed over the items of each image."""

    sums: np.ndarray  # (R, C)
    counts: np.ndarray  # (C,) items of each image

    @property
    def runs(self) -> int:
        return len(self.sums)

    @property
    def scores(self) -> np.ndarray:
        """(R,) means over items."""
        return self.sums.sum(axis=1) / self.counts.sum()


def interval(items: Sequence[np.ndarray], clusters: np.ndarray, *, level: float = 0.95) -> Interval:
    """Mean of a strategy over seeds and items, with a confidence interval over both.

    Where nothing varies, for instance if all items are right in all runs, it is the Clopper-Pearson interval for C
    successes among C images. With items of one image only it is 0 to 1.

    Args:
        items: One (I,) array of values 0 to 1 for each seed.
        clusters: (I,) integers; items of one image have the same.
        level: Confidence level, between 0 and 1.

    Raises:
        ValueError: No runs, lengths differ, a value is not 0 to 1, or `level` is not between 0 and 1.
    """
    _check_level(level)
    runs = _runs({"the strategy": items}, clusters)["the strategy"]
    variances = _variances([runs], runs.sums.mean(axis=0))
    mean = float(runs.scores.mean())
    low, high = _bounds(mean, variances, len(runs.counts), level, lowest=0.0)
    spread = float(runs.scores.std(ddof=1)) if runs.runs > 1 else nan
    return Interval(mean, low, high, spread, runs.runs)


def interval_over_seeds(scores: Sequence[float], *, level: float = 0.95) -> Interval:
    """Mean of one score per seed with Student's t interval, for scores without per-item outcomes.

    It generalizes to other seeds only. Bounds are NaN with one seed, and where all scores are equal.

    Raises:
        ValueError: No scores, or `level` is not between 0 and 1.
    """
    _check_level(level)
    if not len(scores):
        raise ValueError("no scores; expected one for at least one seed")
    mean = fsum(scores) / len(scores)
    spread = float(np.std(scores, ddof=1)) if len(scores) > 1 else nan
    half_width = nan
    if spread**2 > ROUNDING:  # NaN is not
        half_width = float(stdtrit(len(scores) - 1, 0.5 + level / 2)) * spread / sqrt(len(scores))
    return Interval(mean, mean - half_width, mean + half_width, spread, len(scores), over_items=False)


def difference_between_items(
    first: Sequence[np.ndarray],
    first_clusters: np.ndarray,
    second: Sequence[np.ndarray],
    second_clusters: np.ndarray,
    *,
    level: float = 0.95,
) -> Interval:
    """Mean of a strategy on some items minus its mean on items of other images.

    Run r of `first` and of `second` is the same model, so seeds are paired; the items are two independent samples. The
    interval has the parts named in the module's docstring: seeds of the runs' differences, and items and noise of both
    samples added.

    Raises:
        ValueError: As `interval`, or the numbers of runs differ.
    """
    _check_level(level)
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} runs; expected both samples of items of every run")
    parts = [_runs({"the strategy": items}, clusters)["the strategy"]
             for items, clusters in ((first, first_clusters), (second, second_clusters))]  # fmt: skip
    gaps = parts[0].scores - parts[1].scores
    spread = float(gaps.std(ddof=1)) if len(gaps) > 1 else nan
    images = min(len(part.counts) for part in parts)
    variances = _variances_between(parts, gaps) if images > 1 else []
    low, high = _bounds(float(gaps.mean()), variances, images, level, lowest=-1.0)
    return Interval(float(gaps.mean()), low, high, spread, len(gaps))


def compare_pairs(
    items: Mapping[str, Sequence[np.ndarray]],
    clusters: np.ndarray,
    *,
    measure: str,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> list[TestResult]:
    """Test all pairs of strategies on one measure, Holm-corrected over these pairs.

    A result is significant if `p_holm` is below 1 - `level` and neither its interval nor the bootstrap's contains 0.

    Args:
        items: For each strategy one (I,) array of values 0 to 1 per seed, items in the same order everywhere.
            Strategies may have different numbers of seeds.
        clusters: (I,) integers; items of one image have the same.
        measure: Name of the measure, for the results.
        level: Confidence level, between 0 and 1.
        resamples: Number of resamples of the paired bootstrap over images; 0 skips it.
        seed: Seed of the bootstrap.

    Returns:
        A result for each pair, in the order of `items`.

    Raises:
        ValueError: A strategy without runs, lengths differ, a value is not 0 to 1, or `level` is not between 0 and 1.
    """
    return compare_all(
        {measure: items}, {measure: clusters}, primary=[measure], level=level, resamples=resamples, seed=seed
    )


def compare_all(
    items: Mapping[str, Mapping[str, Sequence[np.ndarray]]],
    clusters: Mapping[str, np.ndarray],
    *,
    primary: Iterable[str],
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> list[TestResult]:
    """Test all pairs of strategies on all measures, Holm-corrected over two families.

    One family is every pair on every primary measure, named before the comparison because its conclusions rest on
    them. The other is every pair on every other measure. So the family-wise error rate is about 1 - `level` at most
    among the primary measures, and the same among the rest.

    The tests assume scores that are roughly normal over seeds. Where some seeds of a strategy collapse and others
    don't, all of a few seeds are often on one side by chance: for equal strategies with 3 seeds, one of them with two
    kinds of seeds, the false positive rate in simulations was 10 to 24 %, with 5 seeds 6 to 8 %. Look at the seeds.

    Args:
        items: Measure -> strategy -> one (I,) array per seed, as for `compare_pairs`.
        clusters: Measure -> (I,) image numbers.
        primary: Names of primary measures; those without items are ignored.
        level: Confidence level, between 0 and 1.
        resamples: Number of resamples of the paired bootstrap over images; 0 skips it.
        seed: Seed of the bootstrap.

    Returns:
        Results in the order of `items`.

    Raises:
        ValueError: As `compare_pairs`, or a measure has no clusters.
    """
    _check_level(level)
    chosen = set(primary)
    results: list[TestResult] = []
    for measure, strategies in items.items():
        if measure not in clusters:
            raise ValueError(f"measure {measure!r} has items but no clusters; expected the image number of each item")
        results += _test_pairs(strategies, clusters[measure], measure, level, resamples, seed)
    for family in (True, False):
        members = [i for i, result in enumerate(results) if (result.measure in chosen) == family]
        for i, p in zip(members, holm([results[i].p for i in members]), strict=True):
            results[i] = results[i]._replace(p_holm=float(p), significant=_is_significant(results[i], float(p)))
    return results


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Holm's step-down correction (1979), which controls the family-wise error rate.

    NaN (no test was possible) stays NaN and is not counted.

    Returns:
        (N,) corrected p-values in the order given.

    Raises:
        ValueError: A p-value outside 0 to 1.
    """
    p = np.asarray(p_values, dtype=float)
    tested = np.flatnonzero(~np.isnan(p))
    if len(tested) and (p[tested].min() < 0 or p[tested].max() > 1):
        raise ValueError(f"p-values span {p[tested].min()} to {p[tested].max()}; expected 0 to 1")
    order = tested[np.argsort(p[tested], kind="stable")]
    steps = p[order] * np.arange(len(order), 0, -1)
    corrected = np.full(len(p), nan)
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return corrected


def _test_pairs(
    items: Mapping[str, Sequence[np.ndarray]],
    clusters: np.ndarray,
    measure: str,
    level: float,
    resamples: int,
    seed: int,
) -> list[TestResult]:
    """Test results of one measure, `p_holm` and `significant` not yet set."""
    runs = _runs(items, clusters)
    pairs = list(itertools.combinations(runs, 2))
    if not pairs:
        return []
    differences = np.stack([runs[a].sums.mean(axis=0) - runs[b].sums.mean(axis=0) for a, b in pairs])  # (pairs, C)
    counts = next(iter(runs.values())).counts
    ranges = np.full((len(pairs), 2), nan)
    if resamples:
        tails = (0.5 - level / 2, 0.5 + level / 2)
        ranges = np.quantile(_resampled_means(differences, counts, resamples, seed), tails, axis=0).T
    results = []
    for (a, b), difference, (item_low, item_high) in zip(pairs, differences, ranges, strict=True):
        first, second = runs[a], runs[b]
        gap = float(first.scores.mean() - second.scores.mean())
        variances = _variances([first, second], difference)
        low, high = _bounds(gap, variances, len(counts), level, lowest=-1.0)
        results.append(
            TestResult(
                measure,
                a,
                b,
                gap,
                low,
                high,
                p=_p_value(gap, variances, first, second),
                p_holm=nan,
                significant=False,
                item_low=float(item_low),
                item_high=float(item_high),
                level=level,
                seeds=(first.runs, second.runs),
            )
        )
    return results


def _is_significant(result: TestResult, p_holm: float) -> bool:
    if not p_holm < 1 - result.level or result.low <= 0 <= result.high:  # NaN is never below
        return False
    return isnan(result.item_low) or not result.item_low <= 0 <= result.item_high


def _variances(strategies: Sequence[_Images], contrast: np.ndarray) -> list[_Variance]:
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
    items = _Variance(float(_item_variance(contrast, counts)), images - 1)
    if any(strategy.runs < 2 for strategy in strategies):
        return [items]
    scores: list[_Variance] = []
    seeds: list[_Variance] = []
    noise: list[_Variance] = []
    for strategy in strategies:
        runs = strategy.runs
        apart = strategy.sums - strategy.sums.mean(axis=0)
        alone = float(_item_variance(apart, counts).sum()) / (runs * (runs - 1))
        scores.append(_Variance(float(strategy.scores.var(ddof=1)) / runs, runs - 1))
        # Seeds that agree by chance have at least the variance that single images have between them.
        seeds.append(_Variance(max(scores[-1].variance, alone), runs - 1))
        noise.append(_Variance(-alone, (runs - 1) * (images - 1)))
    # If items add no variance beyond the noise in the seeds, the seeds' part covers both.
    both = [*seeds, items, *noise] if items.variance + sum(part.variance for part in noise) > 0 else seeds
    # Unadjusted scores too: raising the part of the strategy with less variance adds degrees of freedom.
    return [_total(both, seeds), _total(seeds, seeds), _total(scores, seeds), items]


def _variances_between(samples: Sequence[_Images], gaps: np.ndarray) -> list[_Variance]:
    """As `_variances`, for the differences (R,) `gaps` of the same runs on two samples of images."""
    runs = len(gaps)
    items: list[_Variance] = []
    noise: list[_Variance] = []
    for sample in samples:
        mean, freedom = sample.sums.mean(axis=0), len(sample.counts) - 1
        items.append(_Variance(float(_item_variance(mean, sample.counts)), freedom))
        if runs > 1:
            alone = float(_item_variance(sample.sums - mean, sample.counts).sum()) / (runs * (runs - 1))
            noise.append(_Variance(-alone, (runs - 1) * freedom))
    if runs < 2:
        return [_total(items, items[:1])]
    scores = _Variance(float(gaps.var(ddof=1)) / runs, runs - 1)
    seeds = scores._replace(variance=max(scores.variance, -sum(part.variance for part in noise)))
    varied = sum(part.variance for part in [*items, *noise]) > 0
    both = [seeds, *items, *noise] if varied else [seeds]
    return [_total(both, [seeds]), seeds, scores, _total(items, items[:1])]


def _total(parts: Sequence[_Variance], seeds: Sequence[_Variance]) -> _Variance:
    """Sum of independent variances, some negative, with Satterthwaite's degrees of freedom."""
    total = sum(part.variance for part in parts)
    if total <= ROUNDING:
        return _Variance(total, 1.0)
    inverse = sum(part.variance**2 / part.freedom for part in parts) / total**2
    fewest = min(part.freedom for part in seeds)
    if any(part.freedom != fewest for part in seeds):
        # Against more runs of a strategy with less variance, few runs that agree by chance would count too much.
        inverse = (1 - CAUTION) * inverse + CAUTION / fewest
    return _Variance(total, 1 / inverse)


def _item_variance(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Variance of a mean over items under sampling of images: (..., C) sums over each image's items -> (...)."""
    images, total = len(counts), counts.sum()
    # An image with more items moves the mean by the deviation of its items from the mean, not by their number.
    apart = sums - sums.sum(axis=-1, keepdims=True) / total * counts
    return images / (images - 1) * (apart**2).sum(axis=-1) / total**2


def _bounds(
    mean: float, variances: Sequence[_Variance], images: int, level: float, *, lowest: float
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


def _p_value(gap: float, variances: Sequence[_Variance], first: _Images, second: _Images) -> float:
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


def _resampled_means(sums: np.ndarray, counts: np.ndarray, resamples: int, seed: int) -> np.ndarray:
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


def _runs(items: Mapping[str, Sequence[np.ndarray]], clusters: np.ndarray) -> dict[str, _Images]:
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
        found[strategy] = _Images(np.add.reduceat(np.stack(values)[:, order], starts, axis=1), counts)
    return found


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; expected a fraction between 0 and 1, for instance 0.95")
