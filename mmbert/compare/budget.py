"""Budgets: steps and model sizes that give every strategy of a comparison the cost of a reference strategy.

Plain arithmetic; `mmbert.compare.cost` counts and measures its inputs.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mmbert.errors import UsageError, did_you_mean

RULES = {"parameters": "parameters", "flops": "training FLOPs", "time": "training time", "steps": "steps"}
"""Quantity that strategies are matched by -> its name in messages."""
TOLERANCE = 0.05
"""Largest relative gap to the reference that is accepted as equal."""
WIDTH_STEP = 8
"""Matched `intermediate_size` values are multiples of this."""
WIDTH_RANGE = 4
"""Largest factor between a matched `intermediate_size` and the requested one."""
MAX_FUSION_LAYERS = 256
"""Largest number of fusion layers that is tried."""


class Shape(NamedTuple):
    """Depth and width of a fusion module, and the parameters of the model with it."""

    fusion_layers: int
    intermediate_size: int
    parameters: int


class Budget(NamedTuple):
    """Budget of one strategy: steps, model size and cost."""

    match: str
    """Quantity that was matched, a key of `RULES`."""
    steps: int
    """Optimizer steps."""
    fusion_layers: int
    intermediate_size: int
    parameters: int
    """Parameters of the model, including frozen ones."""
    flops_per_step: float
    """FLOPs of the forward and backward pass of a training batch, mean over batches."""
    training_flops: float
    missed_by: float
    """Relative gap to the reference in the matched quantity: 0.1 = 10 % more. 0 if steps are matched."""

    @property
    def is_met(self) -> bool:
        """Whether the gap is within `TOLERANCE`."""
        return abs(self.missed_by) <= TOLERANCE


def describe_budget(budget: Budget, stages: Mapping[str, Budget] | None = None) -> str:
    """Describe steps, model size and the gap to the reference in one line.

    Args:
        budget: Budget of the first stage.
        stages: Name -> budget of each further stage.
    """
    chosen = (
        f"{budget.steps:,} steps, fusion_layers={budget.fusion_layers}, intermediate_size={budget.intermediate_size}: "
        f"{budget.parameters:,} parameters, {budget.training_flops:.3g} training FLOPs"
    )
    further = (f"{name}: {stage.steps:,} steps; {_describe_gap(stage)}" for name, stage in (stages or {}).items())
    return " | ".join([f"{chosen}; {_describe_gap(budget)}", *further])


def _describe_gap(budget: Budget) -> str:
    if budget.match == "steps":
        return "equal steps, nothing else is matched"
    gap, quantity = f"{abs(budget.missed_by):.1%}", RULES[budget.match]
    direction = "more" if budget.missed_by > 0 else "less"
    if budget.is_met:
        return f"{quantity} as the reference" + (f", {gap} {direction}" if budget.missed_by else "")
    return f"misses the budget: {gap} {direction} {quantity} than the reference, beyond the {TOLERANCE:.0%} allowed"


def allocate_budgets(
    match: str,
    shapes: Mapping[str, Shape],
    flops: Mapping[str, float],
    *,
    steps: int,
    reference: str | None = None,
    seconds: Mapping[str, float] | None = None,
    first_steps: int = 0,
    first_flops: float = 0.0,
    once_flops: Mapping[str, float] | None = None,
) -> dict[str, Budget]:
    """Compute the steps with which each strategy has the cost of the reference.

    Args:
        match: "flops" and "time" solve for the steps; with "parameters" (see `match_parameters`) and "steps" all
            strategies take the same number.
        shapes: Strategy -> depth, width and parameters of its model.
        flops: Strategy -> FLOPs per training step.
        steps: Optimizer steps of the reference.
        reference: Strategy that the others are matched to. None: the first of `shapes`.
        seconds: Strategy -> seconds per training step; required for "time" only.
        first_steps: Steps of a first stage, part of `steps`. Its objective does not read the fusion, so each strategy
            takes as many, at the same cost.
        first_flops: FLOPs of one of them.
        once_flops: Strategy -> FLOPs that do not depend on the number of steps; None: 0.

    Returns:
        Strategy -> budget, in the order of `shapes`.

    Raises:
        UsageError: An unknown rule or reference, `steps` below 1, or a missing cost of a strategy.
    """
    reference = _reference(reference, shapes)
    if match not in RULES:
        raise UsageError(f"match='{match}'; allowed are {', '.join(RULES)}.{did_you_mean(match, RULES)}")
    if steps < 1:
        raise UsageError(f"steps={steps}: the reference needs 1 or more.")
    if first_steps >= steps:
        raise UsageError(f"steps={steps}: the first stage takes optim.first_stage_steps={first_steps} of them already.")
    cost = {"flops": flops, "time": seconds or {}}.get(match)
    without = [] if cost is None else [name for name in shapes if not cost.get(name, 0) > 0]  # NaN too
    if without:
        raise UsageError(
            f"match='{match}' requires the cost of a step of each strategy; that of '{without[0]}' is missing."
        )
    found, once = {}, dict.fromkeys(shapes, 0.0) | dict(once_flops or {})
    for name, shape in shapes.items():
        own, missed_by = steps, 0.0
        if cost is not None:
            saved = once[reference] - once[name] if match == "flops" else 0.0
            exact = first_steps + ((steps - first_steps) * cost[reference] + saved) / cost[name]
            own = max(1, round(exact))
            missed_by = own / exact - 1
        elif match == "parameters":
            missed_by = shape.parameters / shapes[reference].parameters - 1
        total = once[name] + first_steps * first_flops + (own - first_steps) * flops[name]
        found[name] = Budget(match, own, *shape, flops[name], total, missed_by)
    return found


def match_parameters(
    requested: Mapping[str, tuple[int, int]],
    count: Callable[[str, int, int], int],
    *,
    reference: str | None = None,
) -> dict[str, Shape]:
    """Find the depth, then the width, at which each strategy has the number of parameters of the reference.

    The depth is the one that comes closest at the requested width; the width (`intermediate_size`) then reduces the
    remaining gap. A strategy without feed-forward blocks is matched by depth alone. See `Budget.missed_by` for the gap
    that is left.

    Args:
        requested: Strategy -> (fusion_layers, intermediate_size) before matching; the reference keeps them.
        count: (strategy, fusion_layers, intermediate_size) -> parameters of the model, called once for each; see
            `cost.count_parameters`. A `UsageError` means that there is no such model (too deep for its encoders).
        reference: Strategy that the others are matched to. None: the first of `requested`.

    Raises:
        UsageError: An unknown reference, or a strategy that can't be built as requested or with one layer.
    """
    reference = _reference(reference, requested)
    target = count(reference, *requested[reference])
    shapes = {}
    for name, (layers, width) in requested.items():
        if name == reference:
            shapes[name] = Shape(layers, width, target)
        else:
            shapes[name] = _closest_shape(functools.cache(functools.partial(count, name)), target, layers, width)
    return shapes


def _reference(name: str | None, strategies: Mapping[str, Any]) -> str:
    if not strategies:
        raise UsageError("there are no strategies to compare.")
    if name is not None and name not in strategies:
        raise UsageError(f"reference='{name}' is none of the compared strategies: {', '.join(strategies)}.")
    return next(iter(strategies)) if name is None else name


def _closest_shape(count: Callable[[int, int], int], target: int, layers: int, width: int) -> Shape:
    """Find the shape whose parameters are closest to `target`, depth first, then width."""
    depth = _closest_depth(count, target, layers, width)
    start = count(depth, width)
    if start == target:
        return Shape(depth, width, start)
    slope = (count(depth, width + WIDTH_STEP) - start) / WIDTH_STEP  # parameters are linear in the width
    if slope == 0:
        return Shape(depth, width, start)
    narrowest, widest = math.ceil(width / WIDTH_RANGE / WIDTH_STEP), WIDTH_RANGE * width // WIDTH_STEP
    solved = WIDTH_STEP * min(max(round((width + (target - start) / slope) / WIDTH_STEP), narrowest), widest)
    candidates = [Shape(depth, w, count(depth, w)) for w in (width, solved)]
    return min(candidates, key=lambda shape: abs(shape.parameters - target))


def _closest_depth(count: Callable[[int, int], int], target: int, layers: int, width: int) -> int:
    """Find the depth whose parameters are closest to `target`; at least 1, unless 0 was requested."""

    def at(depth: int) -> float:
        try:
            return count(depth, width)
        except UsageError:
            return math.inf

    low = min(1, layers)
    high = low + 1
    if at(low) == at(high):
        return layers  # the depth has no effect, or no model can be built
    while at(high) < target and high < MAX_FUSION_LAYERS:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle) < target else (low, middle)
    return min(low, high, key=lambda depth: abs(at(depth) - target))
