"""Statistics of a comparison: hand-computed values, SciPy as oracle, 1,000 simulated comparisons per setting."""

import itertools
from collections.abc import Mapping, Sequence
from math import comb, isnan, nan
from typing import Any

import numpy as np
import pytest
from scipy import stats

from mmbert.compare.report.plots import pareto
from mmbert.compare.report.summary import FEW_SEEDS, describe_result, few_seeds_warning
from mmbert.compare.statistics import (
    TestResult,
    compare_all,
    compare_pairs,
    difference_between_items,
    holm,
    interval,
    interval_over_seeds,
)
from mmbert.compare.variance import FEW_RUNS_WEIGHT

ItemOutcomes = dict[str, list[np.ndarray]]
COMPARISONS = 1000
# Two runs each on four images of one item.
BY_HAND: ItemOutcomes = {
    "a": [np.array([1.0, 1, 1, 0]), np.array([1.0, 1, 1, 1])],
    "b": [np.array([0.0, 1, 0, 0]), np.array([0.0, 1, 1, 0])],
}


def random_items(runs: Sequence[int], images: int, each: int, seed: int = 0) -> tuple[ItemOutcomes, np.ndarray]:
    rng = np.random.default_rng(seed)
    names = [f"s{number}" for number in range(len(runs))]
    items = {name: [rng.random(images * each) for _ in range(count)] for name, count in zip(names, runs, strict=True)}
    return items, np.repeat(np.arange(images), each)


def test_pair_by_hand() -> None:
    # Means over runs: a 1 1 1 .5, b 0 1 .5 0; difference 1 0 .5 .5, mean 1/2. A variance over 4 images is the sum of
    # squares around the mean / (4 * 3).
    #   items: (1/4 + 1/4) / 12 = 1/24
    #   seeds of a: scores 3/4 and 1, variance 1/32, by 2 runs 1/64; seeds of b: 1/4 and 1/2, the same
    #   noise of a: run 0 is (0 0 0 -1/2) off its mean, squares around -1/8 sum to 3/16, / 12 = 1/64; run 1 alike; the
    #               sum 1/32 by 2 * 1 is 1/64; noise of b: (0 0 -1/2 0), the same
    #   variance 1/64 + 1/64 + (1/24 - 1/64 - 1/64) = 1/24
    #   its freedom (1/24)^2 / [2 (1/64)^2 / 1 + (1/24)^2 / 3 + 2 (1/64)^2 / 3] = 24/17
    (result,) = compare_pairs(BY_HAND, np.arange(4), measure="m", resamples=0)
    reach = stats.t.ppf(0.975, 24 / 17) / np.sqrt(24)
    assert (result.measure, result.a, result.b, result.difference) == ("m", "a", "b", 0.5)
    assert result.p == pytest.approx(2 * stats.t.sf(np.sqrt(6), 24 / 17), rel=1e-12)
    assert (result.low, result.high) == (pytest.approx(0.5 - reach), 1.0)  # 0.5 + reach is above 1
    assert result.p_holm == result.p and not result.significant and result.seeds == (2, 2)
    assert isnan(result.item_low) and isnan(result.item_high)


def test_seeds_that_agree_by_chance_by_hand() -> None:
    # Scores 3/4, 3/4 and 1/4, 1/4: no variance of scores, but the runs are right on other images.
    #   noise of a: means 1 .5 .5 1, both runs are 1/2 off on two images, (1/2) / 12 = 1/24 each, 1/24 in all; b alike
    #   items: difference 1 .5 0 .5 around 1/2, (1/2) / 12 = 1/24, less than the noise 1/12
    # So the seeds stand for all: variance 1/24 + 1/24, freedom (1/12)^2 / [2 (1/24)^2 / 1] = 2, t = (1/2) sqrt(12).
    items = {
        "a": [np.array([1.0, 1, 0, 1]), np.array([1.0, 0, 1, 1])],
        "b": [np.array([0.0, 0, 0, 1]), np.array([0.0, 0, 1, 0])],
    }
    (result,) = compare_pairs(items, np.arange(4), measure="m")
    assert result.p == pytest.approx(2 * stats.t.sf(np.sqrt(3), 2), rel=1e-12)


def test_interval_by_hand() -> None:
    # b: scores 1/4 and 1/2, spread sqrt(1/32). Items: means 0 1 .5 0 around 3/8, squares 11/16, / 12 = 11/192; noise
    # 1/64 (above), seeds 1/64. Variance 1/64 + 11/192 - 1/64 = 11/192, freedom of its parts as above.
    found = interval(BY_HAND["b"], np.arange(4), level=0.5)
    variance = 11 / 192
    freedom = variance**2 / ((1 / 64) ** 2 + variance**2 / 3 + (1 / 64) ** 2 / 3)
    reach = stats.t.ppf(0.75, freedom) * np.sqrt(variance)
    assert found == (
        pytest.approx(3 / 8),
        pytest.approx(3 / 8 - reach),
        pytest.approx(3 / 8 + reach),
        32**-0.5,
        2,
        True,
    )


def test_interval_over_seeds_by_hand() -> None:
    # 1, 2 and 3: spread 1, so that the mean is 2 +- t(2 degrees of freedom) / sqrt(3).
    found = interval_over_seeds([1.0, 2.0, 3.0])
    reach = stats.t.ppf(0.975, 2) / np.sqrt(3)
    assert found == (2, pytest.approx(2 - reach), pytest.approx(2 + reach), 1, 3, False)
    for scores in ([0.4], [0.4, 0.4, 0.4]):
        unknown = interval_over_seeds(scores)
        assert unknown.mean == pytest.approx(0.4) and isnan(unknown.low) and isnan(unknown.high)
    with pytest.raises(ValueError, match="no scores"):
        interval_over_seeds([])


def test_difference_between_items_has_both_samples_and_pairs_seeds() -> None:
    rng = np.random.default_rng(11)
    # One run: Welch's interval over two independent samples of images.
    some, others = rng.random(30), rng.random(50) / 2
    found = difference_between_items([some], np.arange(30), [others], np.arange(50))
    welch: Any = stats.ttest_ind(some, others, equal_var=False)
    assert found[:3] == pytest.approx((some.mean() - others.mean(), *welch.confidence_interval(0.95)))
    assert isnan(found.spread) and found.seeds == 1
    # No item differs from another: a paired t-test over seeds.
    one, two = rng.random(5), rng.random(5)
    found = difference_between_items(
        [np.full(30, x) for x in one], np.arange(30) // 2, [np.full(50, x) for x in two], np.arange(50)
    )
    paired: Any = stats.ttest_rel(one, two)
    low, high = np.clip(paired.confidence_interval(0.95), -1, 1)
    assert found == pytest.approx((np.mean(one - two), low, high, np.std(one - two, ddof=1), 5, True))
    assert difference_between_items([some], np.zeros(30, int), [others], np.arange(50))[1:3] == (-1, 1)
    with pytest.raises(ValueError, match="2 and 1 runs"):
        difference_between_items([some, some], np.arange(30), [others], np.arange(50))


def test_difference_between_items_by_hand() -> None:
    # a and b as if about other images. Scores 3/4 and 1, 1/4 and 1/2: both runs are 1/2 apart, no variance.
    #   items of a: 1 1 1 .5 around 7/8, squares 3/16, / 12 = 3/192; items of b: 11/192; noise 3/192 each (all as above)
    #   seeds: at least their noise, 6/192. Variance 6/192 + (14 - 6)/192 = 14/192
    #   its freedom 14^2 / [6^2 / 1 + 3^2 / 3 + 11^2 / 3 + 2 * 3^2 / 3] = 196 / (256 / 3)
    found = difference_between_items(BY_HAND["a"], np.arange(4), BY_HAND["b"], np.arange(4), level=0.5)
    reach = stats.t.ppf(0.75, 196 * 3 / 256) * np.sqrt(14 / 192)
    assert found == (0.5, pytest.approx(0.5 - reach), pytest.approx(0.5 + reach), 0.0, 2, True)


@pytest.mark.parametrize("options", [{}, {"model": 0.5}, {"noise": 0.0, "model": 0.0}, {"level": 1.5}], ids=str)
def test_interval_between_items_covers_the_difference(options: dict[str, float]) -> None:
    rng = np.random.default_rng(12)
    covered = 0
    for _ in range(COMPARISONS):
        # The same models on two halves of images that are drawn alike: the difference to be covered is 0.
        items, clusters = simulate(rng, (3,), 120, 2, **options)
        first = clusters < 50
        halves = [[run[chosen] for run in items["s0"]] for chosen in (first, ~first)]
        found = difference_between_items(halves[0], clusters[first], halves[1], clusters[~first])
        covered += found.low <= 0 <= found.high
    print(f"{options}: covered {covered / COMPARISONS}")
    assert covered >= 0.935 * COMPARISONS


@pytest.mark.parametrize("runs", [(5, 5), (3, 3), (3, 5), (4, 2)], ids=str)
def test_equals_welch_where_items_do_not_vary(runs: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    scores = [rng.random(count) for count in runs]
    items = {name: [np.full(60, score) for score in values] for name, values in zip("ab", scores, strict=True)}
    (result,) = compare_pairs(items, np.arange(60) // 3, measure="m")
    welch: Any = stats.ttest_ind(*scores, equal_var=False)
    freedom = welch.df
    if runs[0] != runs[1]:
        freedom = 1 / ((1 - FEW_RUNS_WEIGHT) / freedom + FEW_RUNS_WEIGHT / (min(runs) - 1))
        assert min(runs) - 1 < freedom < welch.df
    assert result.p == pytest.approx(2 * stats.t.sf(abs(welch.statistic), freedom), rel=1e-9)
    reach = stats.t.ppf(0.975, freedom) * abs(result.difference / welch.statistic)
    expected = np.clip((result.difference - reach, result.difference + reach), -1, 1)
    assert (result.low, result.high) == pytest.approx(expected)


def test_equals_paired_t_test_over_images_where_seeds_do_not_vary() -> None:
    items, clusters = random_items([1, 1], images=30, each=4)
    items = {name: runs * 4 for name, runs in items.items()}
    (result,) = compare_pairs(items, clusters, measure="m")
    a, b = (np.reshape(items[name][0], (30, 4)).mean(axis=1) for name in ("s0", "s1"))
    assert result.p == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-9)
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (result.low, result.high) == pytest.approx((expected.low, expected.high))


def test_closed_form_agrees_with_bootstrap_over_images() -> None:
    # Images of 1 to 6 items that stand or fall together; one run, so that the interval is of items only.
    rng = np.random.default_rng(2)
    clusters = np.repeat(np.arange(400), rng.integers(1, 7, 400))
    common = rng.random(400)[clusters]
    items = {name: [(rng.random(len(clusters)) * 0.5 + common * 0.5) ** power] for name, power in (("a", 1), ("b", 2))}
    (result,) = compare_pairs(items, clusters, measure="m", resamples=4000)
    sums = np.bincount(clusters, items["a"][0] - items["b"][0])
    counts = np.bincount(clusters)
    oracle = stats.bootstrap(
        (sums, counts),
        lambda s, n, axis: s.sum(axis=axis) / n.sum(axis=axis),
        paired=True,
        n_resamples=4000,
        method="percentile",
        rng=np.random.default_rng(3),
    )
    width = result.high - result.low
    by_scipy = oracle.confidence_interval
    assert (result.item_low, result.item_high) == pytest.approx((by_scipy.low, by_scipy.high), abs=0.03 * width)
    assert (result.low, result.high) == pytest.approx((by_scipy.low, by_scipy.high), abs=0.03 * width)
    assert width / (2 * stats.t.ppf(0.975, 399)) == pytest.approx(oracle.standard_error, rel=0.04)


def test_bootstrap_does_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    items, clusters = random_items([2, 2], images=50, each=2)
    (whole,) = compare_pairs(items, clusters, measure="m", resamples=3000)
    assert compare_pairs(items, clusters, measure="m", resamples=3000) == [whole]
    monkeypatch.setattr("mmbert.compare.variance.BLOCK_ELEMENTS", 50 * 700)
    (parts,) = compare_pairs(items, clusters, measure="m", resamples=3000)
    width = whole.item_high - whole.item_low
    assert (parts.item_low, parts.item_high) == pytest.approx((whole.item_low, whole.item_high), abs=0.1 * width)


def test_repeated_items_of_an_image_add_no_evidence() -> None:
    items, clusters = random_items([3, 4], images=40, each=1)
    repeated = {name: [np.repeat(run, 5) for run in runs] for name, runs in items.items()}
    (once,) = compare_pairs(items, clusters, measure="m")
    (often,) = compare_pairs(repeated, np.repeat(clusters, 5), measure="m")
    assert often[3:7] == pytest.approx(once[3:7], rel=1e-9)
    assert interval(repeated["s0"], np.repeat(clusters, 5)) == pytest.approx(interval(items["s0"], clusters), rel=1e-9)


def test_order_of_seeds_and_items_and_names_of_images_do_not_matter() -> None:
    items, clusters = random_items([3, 5, 3], images=25, each=3)
    order = np.random.default_rng(4).permutation(len(clusters))
    mixed = {name: [run[order] for run in reversed(runs)] for name, runs in items.items()}
    renamed = (7 * clusters[order] - 90).astype(np.int32)
    plain = compare_pairs(items, clusters, measure="m", resamples=0)
    other = compare_pairs(mixed, renamed, measure="m", resamples=0)
    for one, two in zip(plain, other, strict=True):
        assert one[:3] == two[:3] and one[3:8] == pytest.approx(two[3:8], rel=1e-9)
    swapped = compare_pairs(dict(reversed(items.items())), clusters, measure="m", resamples=0)
    back = {(v.b, v.a): v for v in swapped}
    for one in plain:
        two = back[one.a, one.b]
        assert (one.difference, one.low, one.high) == pytest.approx((-two.difference, -two.high, -two.low), rel=1e-9)
        assert one.p == pytest.approx(two.p, rel=1e-9)


def test_holm_by_hand() -> None:
    # Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1: 0.04, 0.06, 0.06, 0.04; none may be below the one before it.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([0.02, nan, 0.01]) == pytest.approx([0.02, nan, 0.02], nan_ok=True)
    assert len(holm([])) == 0
    with pytest.raises(ValueError, match=r"span -0.1 to 0.5"):
        holm([0.5, -0.1])


def test_families_are_primary_measures_and_the_rest() -> None:
    items = {f"m{i}": random_items([3, 3, 3], images=20, each=2, seed=i)[0] for i in range(5)}
    clusters = {measure: np.repeat(np.arange(20), 2) for measure in items}
    results = compare_all(items, clusters, primary=["m1", "m3", "never measured"])
    pairs = [("s0", "s1"), ("s0", "s2"), ("s1", "s2")]
    assert [(v.measure, v.a, v.b) for v in results] == [(m, *pair) for m, pair in itertools.product(items, pairs)]
    primary = [v for v in results if v.measure in ("m1", "m3")]
    rest = [v for v in results if v.measure not in ("m1", "m3")]
    for family in (primary, rest):
        assert [v.p_holm for v in family] == list(holm([v.p for v in family]))
    for measure in items:
        alone = compare_pairs(items[measure], clusters[measure], measure=measure)
        assert [v.p for v in alone] == [v.p for v in results if v.measure == measure]
        assert [v.p_holm for v in alone] == list(holm([v.p for v in alone]))


def test_identical_strategies_differ_in_nothing() -> None:
    items, clusters = random_items([3], images=10, each=2)
    ones = [np.ones(20)] * 3
    for runs in (items["s0"], ones):
        (result,) = compare_pairs({"a": runs, "b": list(reversed(runs))}, clusters, measure="m")
        assert result.p == result.p_holm == 1.0 and not result.significant
        assert result.difference == pytest.approx(0, abs=1e-15) and result.low < 0 < result.high


def test_scores_without_variance_have_the_clopper_pearson_interval() -> None:
    right = interval([np.ones(40)] * 5, np.arange(40))
    low, high = stats.binomtest(40, 40).proportion_ci(0.95, method="exact")
    assert right == (1.0, pytest.approx(low), pytest.approx(high), 0.0, 5, True)
    wrong = interval([np.zeros(40)] * 5, np.arange(40))
    assert (wrong.low, wrong.high) == pytest.approx((1 - high, 1 - low))


@pytest.mark.parametrize(("runs", "images", "p"), [(3, 100, 2 / comb(6, 3)), (5, 100, 2 / comb(10, 5)), (5, 3, 1 / 4)])
def test_smallest_p_value_follows_from_the_number_of_runs_and_images(runs: int, images: int, p: float) -> None:
    items = {"a": [np.ones(images)] * runs, "b": [np.zeros(images)] * runs}
    (result,) = compare_pairs(items, np.arange(images), measure="m")
    assert result.p == pytest.approx(p) and result.significant == (p < 0.05)
    assert result.difference == 1.0 and result.low < result.high == 1.0 and (result.low > 0) == (images > 3)


def test_one_seed_gives_no_test() -> None:
    rng = np.random.default_rng(5)
    items = {"a": [np.ones(50)], "b": [np.zeros(50)], "c": [rng.random(50) for _ in range(5)]}
    clusters = np.arange(50)
    for result in compare_pairs(items, clusters, measure="m"):
        assert isnan(result.p) and isnan(result.p_holm) and not result.significant
        assert -1 <= result.low <= result.difference <= result.high <= 1
        assert "no significant difference" in describe_result(result) and "one seed" in describe_result(result)
    run = items["c"][0]
    single = interval([run], clusters)
    expected = stats.ttest_1samp(run, 0).confidence_interval(0.95)
    assert isnan(single.spread) and single.seeds == 1
    assert (single.low, single.high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("count", [1, 7])
def test_one_image_gives_no_test(count: int) -> None:
    rng = np.random.default_rng(6)
    items = {"a": [np.ones(count)] * 5, "b": [rng.random(count) / 10 for _ in range(5)]}
    (result,) = compare_pairs(items, np.zeros(count, int), measure="m")
    assert isnan(result.p) and not result.significant and (result.low, result.high) == (-1, 1)
    assert interval(items["b"], np.zeros(count, int))[1:3] == (0, 1)


def test_one_strategy_has_no_pairs() -> None:
    assert compare_pairs({"a": [np.ones(3)] * 3}, np.arange(3), measure="m") == []


@pytest.mark.parametrize(
    ("items", "clusters", "reason"),
    [
        ({"late": []}, np.arange(3), "late has no runs"),
        (
            {"early": [np.ones(3)], "late": [np.ones(3), np.ones(4)]},
            np.arange(3),
            r"late, run 1, .*\(4,\).* 3 clusters",
        ),
        ({"late": [np.array([0, 1, 2.0])]}, np.arange(3), "late, run 0, has 2.0 at item 2; expected values 0 to 1"),
        ({"late": [np.array([0, np.nan, 1])]}, np.arange(3), "late, run 0, has nan at item 1"),
        ({"late": [np.ones(3)]}, np.ones(3), "clusters has shape .* float64; expected"),
        ({"late": [np.ones(0)]}, np.ones(0, int), "at least one"),
    ],
)
def test_invalid_input_raises(items: Mapping[str, list[np.ndarray]], clusters: np.ndarray, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        compare_pairs(items, clusters, measure="m")


def test_invalid_level_and_missing_clusters_raise() -> None:
    with pytest.raises(ValueError, match="level is 95; expected"):
        interval([np.ones(3)], np.arange(3), level=95)
    with pytest.raises(ValueError, match="'m' has items but no clusters"):
        compare_all({"m": {}}, {}, primary=[])


def test_describe_result() -> None:
    result = TestResult("foils/swap", "late", "hybrid", -0.031, -0.043, -0.019, 0.002, 0.004, significant=True)
    names = {"foils/swap": "foils that swap attributes"}
    assert describe_result(result, names) == (
        "hybrid is better than late on foils that swap attributes by 3.1 points "
        "(95 % interval 1.9 to 4.3, p = 0.004 after Holm)"
    )
    assert "p < 0.001 after Holm" in describe_result(result._replace(p_holm=0.0004))
    assert "90 % interval" in describe_result(result._replace(level=0.9))
    unclear = TestResult("vqa", "hybrid", "late", 0.004, -0.011, 0.019, 0.6, 0.8, significant=False)
    assert describe_result(unclear, {"late": "late fusion"}) == (
        "no significant difference between hybrid and late fusion on vqa "
        "(difference 0.4 points, 95 % interval -1.1 to 1.9)"
    )
    assert "difference 0.0 points" in describe_result(unclear._replace(difference=-0.0001))


def test_few_seeds_are_warned_of() -> None:
    assert few_seeds_warning(FEW_SEEDS) == few_seeds_warning(9) == ""
    assert few_seeds_warning(3).startswith("3 seeds are few: ")
    assert "no conclusion is drawn" in few_seeds_warning(1)


def test_pareto_front() -> None:
    points = [(1, 0.5), (2, 0.4), (2, 0.7), (3, 0.7), (2, 0.7), (0.5, nan), (4, 0.9), (4, 0.8)]
    assert pareto(points) == [0, 2, 4, 6]
    assert pareto([]) == []


def simulate(
    rng: np.random.Generator,
    seeds: Sequence[int],
    images: int,
    each: int,
    *,
    gap: float = 0.0,
    model: float = 0.1,
    own: float = 0.5,
    noise: float = 0.6,
    spreads: Sequence[float] | None = None,
    kinds: Sequence[float] | None = None,
    level: float = 0.5,
) -> tuple[ItemOutcomes, np.ndarray]:
    """Hits of one comparison: an item is right where ability exceeds difficulty.

    Images and their items differ in difficulty (standard deviation 1 in all), each strategy has images and items it
    is good at (`own`), each run its luck with the whole (`model`, times the strategy's of `spreads`) and with every
    image and item (`noise`). With `kinds` a run of a strategy is also as much better or worse, by the toss of a coin.
    Equal on average besides the first strategy, which is better by `gap`.
    """
    clusters = np.repeat(np.arange(images), each)

    def over_items(spread: float) -> np.ndarray:
        half = spread * np.sqrt(0.5)
        return rng.normal(0, half, images)[clusters] + rng.normal(0, half, len(clusters))

    def toss(number: int) -> float:
        return kinds[number] * (2 * rng.integers(2) - 1) if kinds else 0.0

    easy = level + over_items(1.0)
    items: ItemOutcomes = {}
    for number, count in enumerate(seeds):
        ability = easy + over_items(own) + (gap if number == 0 else 0.0)
        spread = model * (spreads[number] if spreads else 1.0)
        items[f"s{number}"] = [
            (ability + rng.normal(0, spread) + toss(number) + over_items(noise) > 0).astype(float) for _ in range(count)
        ]
    return items, clusters


SETTINGS = {
    "3 seeds, few images": ((3, 3, 3), 30, 2, {}),
    "5 seeds, few images": ((5, 5, 5), 30, 2, {}),
    "3 seeds": ((3, 3, 3), 100, 4, {}),
    "5 seeds": ((5, 5, 5), 100, 4, {}),
    "5 and 3 seeds": ((5, 5, 3, 3), 100, 4, {}),
    "seeds alone vary": ((5, 5, 5), 100, 4, {"model": 0.5, "own": 0.0, "noise": 0.0}),
    "items alone vary": ((5, 5, 5), 100, 4, {"model": 0.0, "own": 0.7, "noise": 0.0}),
    "noise alone varies": ((5, 5, 5), 100, 4, {"model": 0.0, "own": 0.0}),
    "unequal spreads": ((5, 5, 3), 100, 4, {"spreads": (1, 4, 4)}),
    "nearly all right": ((5, 5, 5), 100, 2, {"level": 2.2}),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_false_positive_rate_of_equal_strategies(setting: str) -> None:
    seeds, images, each, options = SETTINGS[setting]
    rng = np.random.default_rng(7)
    any_significant, by_pair = 0, np.zeros(comb(len(seeds), 2))
    for _ in range(COMPARISONS):
        items, clusters = simulate(rng, seeds, images, each, **options)
        results = compare_pairs(
            items, clusters, measure="m", resamples=0
        )  # the bootstrap can only make fewer results significant
        any_significant += any(v.significant for v in results)
        by_pair += [v.p < 0.05 for v in results]
    print(f"{setting}: family {any_significant / COMPARISONS}, pairs {by_pair / COMPARISONS}")
    assert any_significant <= 0.065 * COMPARISONS
    assert by_pair.max() <= 0.065 * COMPARISONS


@pytest.mark.parametrize(("seeds", "least", "most"), [(3, 0.15, 0.25), (5, 0.0, 0.09)])
def test_known_limit_false_positives_if_seeds_collapse(seeds: int, least: float, most: float) -> None:
    # Every other run of the second strategy collapses: two kinds of seeds, five times the spread of the first's.
    rng = np.random.default_rng(13)
    significant = 0
    for _ in range(COMPARISONS):
        items, clusters = simulate(rng, (seeds, seeds), 100, 4, kinds=(0.0, 0.5), level=0.0)
        significant += compare_pairs(items, clusters, measure="m", resamples=0)[0].significant
    print(f"{seeds} seeds: {significant / COMPARISONS}")
    assert least * COMPARISONS <= significant <= most * COMPARISONS


def test_tests_over_seeds_alone_or_items_alone_have_too_many_false_positives() -> None:
    # The simulation must detect a test that ignores one of the two sources of variance.
    rng = np.random.default_rng(8)
    by_seeds = by_items = 0
    for _ in range(COMPARISONS):
        items, _ = simulate(rng, (5, 5), 100, 4)
        scores = [np.mean(runs, axis=1) for runs in items.values()]
        by_seeds += stats.ttest_ind(*scores, equal_var=False).pvalue < 0.05
        means = [np.mean(runs, axis=0).reshape(100, 4).mean(axis=1) for runs in items.values()]
        by_items += stats.ttest_rel(*means).pvalue < 0.05
    print(f"seeds alone {by_seeds / COMPARISONS}, items alone {by_items / COMPARISONS}")
    assert by_seeds > 0.08 * COMPARISONS
    assert by_items > 0.08 * COMPARISONS


def test_p_value_is_at_least_that_of_seeds_alone_and_items_alone() -> None:
    rng = np.random.default_rng(10)
    for _ in range(200):
        items, clusters = simulate(rng, (3, 3), 50, 2, model=0.5)
        (result,) = compare_pairs(items, clusters, measure="m", resamples=0)
        welch: Any = stats.ttest_ind(*(np.mean(runs, axis=1) for runs in items.values()), equal_var=False)
        means = [np.mean(runs, axis=0).reshape(50, 2).mean(axis=1) for runs in items.values()]
        paired: Any = stats.ttest_rel(*means)
        assert result.p >= max(welch.pvalue, paired.pvalue) * (1 - 1e-9)


def shift_of(
    difference: float, *, level: float = 0.5, model: float = 0.1, own: float = 0.5, noise: float = 0.6
) -> float:
    """The `gap` in ability that makes this difference in the share of right items."""
    scale = np.sqrt(1 + own**2 + model**2 + noise**2)
    return scale * float(stats.norm.ppf(stats.norm.cdf(level / scale) + difference)) - level


@pytest.mark.parametrize("seeds", [(5, 5), (5, 5, 5), (5, 5, 3, 3)], ids=str)
def test_power_for_a_difference_of_five_seed_deviations(seeds: tuple[int, ...]) -> None:
    rng = np.random.default_rng(9)
    pilot = [runs for _ in range(100) for runs in simulate(rng, (5, 5), 100, 4)[0].values()]
    spread = np.sqrt(np.mean([np.mean(runs, axis=1).var(ddof=1) for runs in pilot]))  # of runs on one test set
    gap = shift_of(5 * spread)
    found = differences = 0.0
    for _ in range(COMPARISONS):
        items, clusters = simulate(rng, seeds, 100, 4, gap=gap)
        result = compare_pairs(items, clusters, measure="m", resamples=200)[0]
        found += result.significant
        differences += result.difference
    print(f"{seeds}: spread {spread:.4f}, found {found / COMPARISONS}")
    assert differences / COMPARISONS == pytest.approx(5 * spread, rel=0.05)
    assert found >= 0.8 * COMPARISONS
