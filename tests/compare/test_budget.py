"""Budgets matched by each rule, on hand-computed numbers, then on the real parameters of every strategy."""

import functools
import itertools
import json
import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_config

from mmbert.compare.budget import (
    TOLERANCE,
    WIDTH_RANGE,
    WIDTH_STEP,
    Budget,
    Shape,
    allocate_budgets,
    describe_budget,
    match_parameters,
)
from mmbert.compare.cost import count_parameters
from mmbert.data.sampling import TrainBatches
from mmbert.errors import UsageError
from mmbert.model.fusion import FUSIONS

SHAPES = {"late": Shape(2, 64, 1000), "early": Shape(2, 64, 1020), "hybrid": Shape(2, 64, 1500)}
FLOPS = {"late": 2e6, "early": 3e6, "hybrid": 5e6}
SECONDS = {"late": 0.5, "early": 0.4, "hybrid": 1.0}


def steps(budgets: dict[str, Budget]) -> dict[str, int]:
    return {name: budget.steps for name, budget in budgets.items()}


# --- steps ---------------------------------------------------------------------------------------------------------


def test_equal_flops_by_steps() -> None:
    found = allocate_budgets("flops", SHAPES, FLOPS, steps=100, seconds=SECONDS)
    assert steps(found) == {"late": 100, "early": 67, "hybrid": 40}  # 2e8 / 3e6 = 66.67
    assert found["early"] == Budget("flops", 67, 2, 64, 1020, 3e6, 67 * 3e6, pytest.approx(201 / 200 - 1))
    assert found["late"].missed_by == found["hybrid"].missed_by == 0
    assert all(budget.is_met for budget in found.values())


def test_equal_time_by_steps() -> None:
    found = allocate_budgets("time", SHAPES, FLOPS, steps=100, seconds=SECONDS)
    assert steps(found) == {"late": 100, "early": 125, "hybrid": 50}
    assert found["hybrid"].training_flops == 50 * 5e6


def test_reference_is_the_first_unless_named() -> None:
    found = allocate_budgets("flops", SHAPES, FLOPS, steps=100, reference="hybrid")
    assert steps(found) == {"late": 250, "early": 167, "hybrid": 100}
    assert list(found) == list(SHAPES)


def test_first_stage_takes_equal_steps_and_the_rest_equal_flops() -> None:
    """By hand: hybrid 20 + 80 steps; 80 x 5 FLOPs are 400 steps of late at 1, besides its 20 of the first stage."""
    shapes = {"hybrid": SHAPES["hybrid"], "late": SHAPES["late"]}
    flops = {"hybrid": 5.0, "late": 1.0}
    found = allocate_budgets("flops", shapes, flops, steps=100, first_steps=20, first_flops=0.5)
    assert steps(found) == {"hybrid": 100, "late": 420}
    assert {budget.training_flops for budget in found.values()} == {20 * 0.5 + 400}
    with pytest.raises(UsageError, match=r"steps=100: the first stage takes optim\.first_stage_steps=100 of them"):
        allocate_budgets("flops", shapes, flops, steps=100, first_steps=100)


def test_what_is_computed_once_is_charged_once() -> None:
    """By hand: late 100 x 2 + 50 = 250 FLOPs; early has 250 - 70 = 180 left, so 60 steps of 3."""
    shapes, flops = {"late": SHAPES["late"], "early": SHAPES["early"]}, {"late": 2.0, "early": 3.0}
    found = allocate_budgets("flops", shapes, flops, steps=100, once_flops={"late": 50.0, "early": 70.0})
    assert steps(found) == {"late": 100, "early": 60}
    assert {budget.training_flops for budget in found.values()} == {250.0}
    assert steps(allocate_budgets("time", shapes, flops, steps=9, seconds=flops, once_flops={"late": 5.0})) == {
        "late": 9,
        "early": 6,
    }


@pytest.mark.parametrize("match", ["steps", "parameters"])
def test_other_rules_give_all_strategies_the_same_steps(match: str) -> None:
    assert set(steps(allocate_budgets(match, SHAPES, FLOPS, steps=100)).values()) == {100}


def test_parameters_have_a_gap_of_their_own() -> None:
    found = allocate_budgets("parameters", SHAPES, FLOPS, steps=100)
    assert {name: budget.missed_by for name, budget in found.items()} == pytest.approx(
        {"late": 0, "early": 0.02, "hybrid": 0.5}
    )
    assert [name for name, budget in found.items() if not budget.is_met] == ["hybrid"]


def test_gap_of_too_few_steps_is_described() -> None:
    found = allocate_budgets("flops", SHAPES, {"late": 1.0, "early": 0.7, "hybrid": 5.0}, steps=2)
    assert steps(found) == {"late": 2, "early": 3, "hybrid": 1}  # one step is the least
    assert found["hybrid"].missed_by == pytest.approx(1.5) and found["early"].missed_by == pytest.approx(0.05)
    assert "misses the budget: 150.0% more training FLOPs than the reference" in describe_budget(found["hybrid"])
    assert "beyond the 5% allowed" in describe_budget(found["hybrid"])


@given(
    match=st.sampled_from(["flops", "time"]),
    costs=st.lists(st.floats(1e-3, 1e15), min_size=1, max_size=6),
    own=st.integers(1, 10**6),
)
def test_every_gap_is_at_most_rounding(match: str, costs: list[float], own: int) -> None:
    shapes = {str(i): Shape(1, 8, 10) for i in range(len(costs))}
    cost = {str(i): x for i, x in enumerate(costs)}
    found = allocate_budgets(match, shapes, cost, steps=own, seconds=cost)
    for name, budget in found.items():
        exact = own * costs[0] / cost[name]
        assert budget.steps * cost[name] / (own * costs[0]) - 1 == pytest.approx(budget.missed_by, rel=1e-9, abs=1e-9)
        assert abs(budget.steps - exact) <= max(0.5, 1 - exact) * (1 + 1e-9)
        assert budget.is_met or exact < 0.5 / TOLERANCE + 1


def test_description_has_the_chosen_shape_and_the_sign_of_the_gap() -> None:
    budget = Budget("parameters", 936, 2, 1536, 1834567, 1.2e10, 936 * 1.2e10, 0.0)
    chosen = "936 steps, fusion_layers=2, intermediate_size=1536: 1,834,567 parameters, 1.12e+13 training FLOPs; "
    assert describe_budget(budget) == chosen + "parameters as the reference"
    assert describe_budget(budget._replace(missed_by=-0.031)) == chosen + "parameters as the reference, 3.1% less"
    fewer = describe_budget(budget._replace(missed_by=-0.123))
    assert fewer.endswith("misses the budget: 12.3% less parameters than the reference, beyond the 5% allowed")
    assert describe_budget(budget._replace(match="steps")).endswith("equal steps, nothing else is matched")
    tuned = describe_budget(budget, {"vqa": budget._replace(match="flops", steps=5, missed_by=-0.075)})
    assert " | vqa: 5 steps; misses the budget: 7.5% less training FLOPs than the reference" in tuned


def test_budget_is_plain_json() -> None:
    budget = allocate_budgets("flops", SHAPES, FLOPS, steps=7)["early"]
    assert json.loads(json.dumps(budget._asdict())) == budget._asdict()
    assert set(budget._asdict()) >= {
        *("match", "steps", "flops_per_step", "training_flops", "parameters", "fusion_layers", "missed_by")
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"match": "flop"}, "match='flop'; allowed are parameters, flops, time, steps. Did you mean 'flops'?"),
        ({"reference": "hybird"}, "reference='hybird' is none of the compared strategies: late, early, hybrid."),
        ({"steps": 0}, "steps=0: the reference needs 1 or more."),
        ({"match": "time"}, "that of 'late' is missing"),
        ({"match": "time", "seconds": {**SECONDS, "early": math.nan}}, "that of 'early' is missing"),
        ({"flops": {**FLOPS, "hybrid": 0}}, "that of 'hybrid' is missing"),
        ({"shapes": {}}, "there are no strategies to compare"),
    ],
)
def test_invalid_budgets_raise(options: dict, message: str) -> None:
    with pytest.raises(UsageError) as error:
        allocate_budgets(**{"match": "flops", "shapes": SHAPES, "flops": FLOPS, "steps": 10, **options})
    assert message in str(error.value)


# --- parameters ----------------------------------------------------------------------------------------------------


def counter(layer: int, per_width: int, *, base: int = 1000, deepest: int = 10**9):
    """Parameters of a made-up strategy, and the candidates that were requested."""
    requested: list[tuple[int, int]] = []

    def count(strategy: str, layers: int, width: int) -> int:
        if strategy == "reference":
            return 50_000
        requested.append((layers, width))
        if layers > deepest:
            raise UsageError("too deep")
        return base + layers * (layer + per_width * width)

    return count, requested


def solve(count, requested: tuple[int, int]) -> Shape:
    return match_parameters({"reference": (3, 72), "other": requested}, count)["other"]


def test_reference_keeps_the_requested_shape() -> None:
    count, _ = counter(1000, 10)
    requested: list[tuple[str, int, int]] = []

    def recorded(*candidate: Any) -> int:
        requested.append(candidate)
        return count(*candidate)

    found = match_parameters({"other": (3, 72), "reference": (5, 40)}, recorded, reference="reference")
    assert found["reference"] == Shape(5, 40, 50_000) and list(found) == ["other", "reference"]
    assert [candidate for candidate in requested if candidate[0] == "reference"] == [("reference", 5, 40)]


def test_depth_comes_first_then_width() -> None:
    count, _ = counter(3000, 30)  # a layer of width 100 has 6000: 8 of them come to 49,000, 9 to 55,000
    # 50,000 = 1000 + 8 * (3000 + 30 w) at w = 104.17
    assert solve(count, (2, 100)) == Shape(8, 104, 49_960)


def test_depth_alone_where_width_changes_nothing() -> None:
    count, _ = counter(9000, 0)  # 5 layers: 46,000; 6: 55,000
    assert solve(count, (2, 100)) == Shape(5, 100, 46_000)


def test_an_exact_depth_leaves_the_width() -> None:
    count, _ = counter(7000, 0, base=1000)
    assert solve(count, (1, 100)) == Shape(7, 100, 50_000)
    count, requested = counter(3900, 10)
    assert solve(count, (1, 100)) == Shape(10, 100, 50_000) and all(width == 100 for _, width in requested)


def test_width_stays_within_its_range() -> None:
    count, _ = counter(10, 1, base=45_000, deepest=2)  # at most 2 layers: 2 * (10 + w) = 5000 would need w = 2490
    found = solve(count, (1, 100))
    assert found == Shape(2, 400, 45_820)
    count, _ = counter(40_000, 1000)  # one layer is too much already
    assert solve(count, (1, 100)) == Shape(1, 32, 1000 + 40_000 + 32_000)  # 25 is no multiple of 8


def test_too_deep_is_not_chosen() -> None:
    count, requested = counter(3000, 30, deepest=5)
    found = solve(count, (2, 100))
    assert found.fusion_layers == 5 and found.parameters == pytest.approx(50_000, rel=0.03)
    assert (8, 100) in requested  # tried, and rejected


def test_no_layer_stays_no_layer_only_if_requested() -> None:
    count, _ = counter(60_000, 0, base=49_000)
    assert solve(count, (0, 100)).fusion_layers == 0
    assert solve(count, (2, 100)).fusion_layers == 1


def test_depth_without_effect_is_kept() -> None:
    assert solve(lambda name, layers, width: 50_000 if name == "reference" else 30_000, (3, 100)) == Shape(
        3, 100, 30_000
    )


def test_shape_that_cannot_be_built_raises() -> None:
    count, _ = counter(1, 1, deepest=0)
    with pytest.raises(UsageError, match="too deep"):
        solve(count, (1, 100))


@given(st.integers(1, 10_000), st.integers(0, 50), st.integers(0, 60_000), st.integers(1, 12), st.integers(8, 400))
def test_no_shape_near_by_is_nearer_and_none_is_counted_twice(
    layer: int, per_width: int, base: int, layers: int, width: int
) -> None:
    count, requested = counter(layer, per_width, base=base)
    found = solve(count, (layers, width))
    assert len(requested) == len(set(requested)) <= 24
    gap = abs(found.parameters - 50_000)
    for depth in {max(1, found.fusion_layers - 1), found.fusion_layers + 1}:
        if depth <= 256:  # beyond it none is tried
            assert gap <= abs(count("other", depth, width) - 50_000)
    for other in (found.intermediate_size - WIDTH_STEP, found.intermediate_size + WIDTH_STEP):
        if found.intermediate_size != width and width / WIDTH_RANGE <= other <= width * WIDTH_RANGE:
            assert gap <= abs(count("other", found.fusion_layers, other) - 50_000)


@pytest.mark.parametrize("reference", ["early", "late", "hybrid"])
def test_real_strategies_come_as_near_as_they_can(reference: str) -> None:
    """Fusion parts beside which the encoders are small, so that nothing hides the gap."""
    config = tiny_config(hidden_size=64, text_hidden_size=16, text_layers=2, image_layers=2, objectives={"mlm": 1.0})
    count = functools.partial(count_parameters, config)
    requested = {name: (6 if name == "late" else 2, 256) for name in FUSIONS}
    before = {name: count(name, *shape) for name, shape in requested.items()}
    shapes = match_parameters(requested, count, reference=reference)
    found = allocate_budgets("parameters", shapes, dict.fromkeys(FUSIONS, 1.0), steps=10, reference=reference)
    assert shapes[reference][:2] == requested[reference] and before["hybrid"] > 1.3 * before["early"]
    for name, (layers, width, total) in shapes.items():
        assert total == count(name, layers, width)
        assert total / before[reference] - 1 == pytest.approx(found[name].missed_by)
        for other in {(max(1, layers - 1), width), (layers + 1, width), (layers, width + 8), (layers, width - 8)}:
            if name != reference and 64 <= other[1] <= 1024:
                assert nearer(count, name, total, other, before[reference])
    # Late goes by depth alone: within half a layer of 4 D^2 + 2 D.
    assert abs(shapes["late"].parameters - before[reference]) <= (4 * 64 * 64 + 2 * 64) / 2
    assert found["early"].is_met and found["hybrid"].is_met


def nearer(count, name: str, total: int, other: tuple[int, int], target: int) -> bool:
    """Whether `total` is as near to the target as another shape, or there is no such model."""
    try:
        return abs(total - target) <= abs(count(name, *other) - target)
    except UsageError:
        return True


# --- the sample sequence -------------------------------------------------------------------------------------------


def seen(steps: int, *, count: int, seed: int, pool: int) -> list[tuple[int, int]]:
    """(epoch, sample) in the order in which an arm of so many steps trains on them."""
    lengths = np.random.default_rng(0).integers(1, 60, (steps, count))
    batches = TrainBatches(lambda epoch: lengths[epoch], count, batch_size=4, seed=seed, pool=pool)
    found: list[list[tuple[int, int]]] = []
    for epoch in itertools.count():
        batches.position = (epoch, 0)
        found += itertools.islice(batches, steps - len(found))
        if len(found) == steps:
            return [index for batch in found for index in batch]
    raise AssertionError


@given(
    few=st.integers(1, 20), more=st.integers(0, 20), count=st.integers(8, 40), seed=st.integers(0, 99),
    pool=st.integers(1, 5),
)  # fmt: skip
def test_an_arm_with_fewer_steps_takes_a_prefix(few: int, more: int, count: int, seed: int, pool: int) -> None:
    """Steps are cut off the end of one sequence: matching by steps shows no strategy other samples."""
    random.seed(few)  # nothing global matters
    short = seen(few, count=count, seed=seed, pool=pool)
    np.random.seed(more)
    assert seen(few + more, count=count, seed=seed, pool=pool)[: 4 * few] == short
