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
from math import fsum, isnan, nan, sqrt
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

from mmbert.compare.variance import (
    ROUNDING,
    bootstrap_means,
    confidence_bounds,
    difference_variances,
    mean_variances,
    p_value,
    sum_over_images,
)


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
    runs = sum_over_images({"the strategy": items}, clusters)["the strategy"]
    variances = mean_variances([runs], runs.sums.mean(axis=0))
    mean = float(runs.scores.mean())
    low, high = confidence_bounds(mean, variances, len(runs.counts), level, lowest=0.0)
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
    parts = [sum_over_images({"the strategy": items}, clusters)["the strategy"]
             for items, clusters in ((first, first_clusters), (second, second_clusters))]  # fmt: skip
    gaps = parts[0].scores - parts[1].scores
    spread = float(gaps.std(ddof=1)) if len(gaps) > 1 else nan
    images = min(len(part.counts) for part in parts)
    variances = difference_variances(parts, gaps) if images > 1 else []
    low, high = confidence_bounds(float(gaps.mean()), variances, images, level, lowest=-1.0)
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
    runs = sum_over_images(items, clusters)
    pairs = list(itertools.combinations(runs, 2))
    if not pairs:
        return []
    differences = np.stack([runs[a].sums.mean(axis=0) - runs[b].sums.mean(axis=0) for a, b in pairs])  # (pairs, C)
    counts = next(iter(runs.values())).counts
    ranges = np.full((len(pairs), 2), nan)
    if resamples:
        tails = (0.5 - level / 2, 0.5 + level / 2)
        ranges = np.quantile(bootstrap_means(differences, counts, resamples, seed), tails, axis=0).T
    results = []
    for (a, b), difference, (item_low, item_high) in zip(pairs, differences, ranges, strict=True):
        first, second = runs[a], runs[b]
        gap = float(first.scores.mean() - second.scores.mean())
        variances = mean_variances([first, second], difference)
        low, high = confidence_bounds(gap, variances, len(counts), level, lowest=-1.0)
        results.append(
            TestResult(
                measure,
                a,
                b,
                gap,
                low,
                high,
                p=p_value(gap, variances, first, second),
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


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; expected a fraction between 0 and 1, for instance 0.95")
