"""What each strategy of a comparison may spend, matched to a reference by a stated rule. Plain numbers only.

`mmbert.compare.cost` counts and measures what goes in.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mmbert.errors import UsageError, did_you_mean

RULES = {"parameters": "parameters", "flops": "training FLOPs", "time": "training time", "steps": "steps"}
"""What can be made equal, and what it is called in a message."""
TOLERANCE = 0.05
"""Largest relative gap to the reference that counts as equal."""
WIDTH_STEP = 8
"""A solved `intermediate_size` is a multiple of this."""
WIDTH_RANGE = 4
"""A solved `intermediate_size` is at most so many times narrower or wider than the one that was asked for."""
DEEPEST = 256
"""No more fusion layers than this are tried."""


class Shape(NamedTuple):
    """A fusion part's depth and width, and the parameters of the whole model with it."""

    fusion_layers: int
    intermediate_size: int
    parameters: int


class Budget(NamedTuple):
    """What one strategy spends in a comparison."""

    match: str
    """What was made equal, a key of `RULES`."""
    steps: int
    """Optimizer steps."""
    fusion_layers: int
    intermediate_size: int
    parameters: int
    """Of the whole model, frozen ones included."""
    flops_per_step: float
    """Forward and backward pass of a training batch, mean over batches."""
    training_flops: float
    missed_by: float
    """Relative gap to the reference in what was to be equal: 0.1 = 10 % more. 0 where steps are equal by order."""

    @property
    def is_met(self) -> bool:
        """Whether the gap counts as none."""
        return abs(self.missed_by) <= TOLERANCE


def told(budget: Budget, stages: Mapping[str, Budget] | None = None) -> str:
    """What was chosen and how near it comes to the reference, as a sentence without full stop.

    Args:
        budget: Of the first stage.
        stages: Name -> budget of each further stage.
    """
    chosen = (
        f"{budget.steps:,} steps, fusion_layers={budget.fusion_layers}, intermediate_size={budget.intermediate_size}: "
        f"{budget.parameters:,} parameters, {budget.training_flops:.3g} training FLOPs"
    )
    further = (f"{name}: {stage.steps:,} steps; {_nearness(stage)}" for name, stage in (stages or {}).items())
    return " | ".join([f"{chosen}; {_nearness(budget)}", *further])


def _nearness(budget: Budget) -> str:
    if budget.match == "steps":
        return "equal steps, nothing else is matched"
    gap, what = f"{abs(budget.missed_by):.1%}", RULES[budget.match]
    side = "more" if budget.missed_by > 0 else "less"
    if budget.is_met:
        return f"{what} as the reference" + (f", {gap} {side}" if budget.missed_by else "")
    return f"misses the budget: {gap} {side} {what} than the reference, beyond the {TOLERANCE:.0%} allowed"


def share_out(
    match: str,
    shapes: Mapping[str, Shape],
    flops: Mapping[str, float],
    *,
    steps: int,
    reference: str | None = None,
    seconds: Mapping[str, float] | None = None,
) -> dict[str, Budget]:
    """Gives every strategy the steps that make it spend what the reference spends.

    Args:
        match: "flops" and "time" solve for steps; "parameters" (see `match_parameters`) and "steps" give all the same.
        shapes: Strategy -> depth, width and parameters of its models.
        flops: Strategy -> FLOPs of a training step.
        steps: Optimizer steps of the reference.
        reference: The strategy that the others are matched to. None: the first of `shapes`.
        seconds: Strategy -> seconds of a training step; needed for "time" only.

    Returns:
        Strategy -> budget, in the order of `shapes`.

    Raises:
        UsageError: An unknown rule or reference, no step, or no time of a strategy where times are needed.
    """
    reference = _reference(reference, shapes)
    if match not in RULES:
        raise UsageError(f"match='{match}'; allowed are {', '.join(RULES)}.{did_you_mean(match, RULES)}")
    if steps < 1:
        raise UsageError(f"steps={steps}: the reference takes at least 1.")
    cost = {"flops": flops, "time": seconds or {}}.get(match)
    without = [] if cost is None else [name for name in shapes if not cost.get(name, 0) > 0]  # NaN too
    if without:
        raise UsageError(
            f"match='{match}' needs what a step of each strategy takes; '{without[0]}' has no such number."
        )
    found = {}
    for name, shape in shapes.items():
        own, missed_by = steps, 0.0
        if cost is not None:
            exact = steps * cost[reference] / cost[name]
            own = max(1, round(exact))
            missed_by = own / exact - 1
        elif match == "parameters":
            missed_by = shape.parameters / shapes[reference].parameters - 1
        found[name] = Budget(match, own, *shape, flops[name], own * flops[name], missed_by)
    return found


def match_parameters(
    asked: Mapping[str, tuple[int, int]],
    count: Callable[[str, int, int], int],
    *,
    reference: str | None = None,
) -> dict[str, Shape]:
    """Solves for the depth, then the width, that bring every strategy to the parameters of the reference.

    The depth is the one that comes nearest with the width as asked; the width (`intermediate_size`) then closes the
    gap as far as it can. A strategy without feed-forward blocks goes by depth alone. There may be a gap left: see
    `Budget.missed_by`.

    Args:
        asked: Strategy -> (fusion_layers, intermediate_size) that it would have unmatched; the reference keeps them.
        count: (strategy, fusion_layers, intermediate_size) -> parameters of the whole model, called once for each; see
            `cost.count_parameters`. A `UsageError` means that there is no such model (too deep for its encoders).
        reference: The strategy that the others are matched to. None: the first of `asked`.

    Raises:
        UsageError: An unknown reference, or a strategy that can't be built as asked or with one layer.
    """
    reference = _reference(reference, asked)
    target = count(reference, *asked[reference])
    shapes = {}
    for name, (layers, width) in asked.items():
        if name == reference:
            shapes[name] = Shape(layers, width, target)
        else:
            shapes[name] = _nearest_shape(functools.cache(functools.partial(count, name)), target, layers, width)
    return shapes


def _reference(name: str | None, strategies: Mapping[str, Any]) -> str:
    if not strategies:
        raise UsageError("there is no strategy to compare.")
    if name is not None and name not in strategies:
        raise UsageError(f"reference='{name}' is none of the compared strategies: {', '.join(strategies)}.")
    return next(iter(strategies)) if name is None else name


def _nearest_shape(count: Callable[[int, int], int], target: int, layers: int, width: int) -> Shape:
    """The shape whose parameters are nearest to `target`, depth first, then width."""
    depth = _nearest_depth(count, target, layers, width)
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


def _nearest_depth(count: Callable[[int, int], int], target: int, layers: int, width: int) -> int:
    """The depth whose parameters are nearest to `target`; at least 1, unless 0 was asked for."""

    def at(depth: int) -> float:
        try:
            return count(depth, width)
        except UsageError:
            return math.inf

    low = min(1, layers)
    high = low + 1
    if at(low) == at(high):
        return layers  # depth changes nothing, or nothing can be built
    while at(high) < target and high < DEEPEST:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle) < target else (low, middle)
    return min(low, high, key=lambda depth: abs(at(depth) - target))
