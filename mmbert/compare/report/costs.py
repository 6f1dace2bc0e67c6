"""What strategies cost: a table, and the numbers that plots draw. Times are those of the fastest run."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from mmbert.compare.report.findings import listed
from mmbert.compare.report.outcomes import Outcomes, number
from mmbert.compare.report.tables import NOTHING, Table, percent

COSTS: Mapping[str, tuple[str, str, Callable[[float], str]]] = {
    "parameters": ("budget", "parameters", lambda x: f"{x / 1e6:.2f} M"),
    "fusion_layers": ("budget", "fusion layers", lambda x: f"{x:g}"),
    "training_flops": ("budget", "training FLOPs", lambda x: f"{x:.3g}".replace("e+", "e")),
    "steps": ("budget", "steps", lambda x: f"{x:,.0f}"),
    "train_seconds": ("cost", "training time", lambda x: duration(x)),
    "wall_seconds": ("cost", "wall time", lambda x: duration(x)),
    "peak_memory_bytes": ("cost", "peak memory", lambda x: f"{x / 1e9:.2f} GB"),
    "samples_per_second": ("cost", "pairs/s in training", lambda x: f"{x:.3g}"),
    "ms_per_pair": ("cost", "ms per pair", lambda x: f"{x:.2f}"),
    "search_seconds": ("cost", "search", lambda x: duration(x)),
}
"""Cost -> the part of a row it is in, its column, how it is written."""
FASTEST: Mapping[str, Callable[[Sequence[float]], float]] = {
    "train_seconds": min, "wall_seconds": min, "samples_per_second": max, "ms_per_pair": min, "search_seconds": min,
}  # fmt: skip
"""Measured time -> which of several runs was the fastest. Whatever else runs on a machine only slows."""
APART = 1.1
"""A slowest run that took longer than so many times the fastest is told."""


def cost(outcomes: Outcomes) -> Table:
    """Of the finished seeds; columns that no arm has are left out."""
    found = [key for key in COSTS if any(math.isfinite(costs_of(outcomes, s, key)) for s in outcomes.strategies)]
    head = ["strategy", *(_cost_head(outcomes, key) for key in found)]
    rows = [[strategy, *(_cost_cell(outcomes, strategy, key) for key in found)] for strategy in outcomes.strategies]
    return Table("Cost", head, rows, note=_cost_note(outcomes, found))


def _cost_cell(outcomes: Outcomes, strategy: str, key: str) -> str:
    value, write = costs_of(outcomes, strategy, key), COSTS[key][2]
    if key == "steps":
        every = [value, *_later_steps(outcomes, strategy).values()]
        return " + ".join(write(steps) for steps in every if math.isfinite(steps)) or NOTHING
    if not math.isfinite(value):
        return NOTHING
    slowest = value * slowdown(outcomes, strategy, key) ** (-1 if FASTEST.get(key) is max else 1)
    told = key in FASTEST and slowdown(outcomes, strategy, key) > APART
    return write(value) + (f" (to {write(slowest)})" if told else "")


def _cost_note(outcomes: Outcomes, keys: Sequence[str]) -> str:
    timed = [key for key in keys if key in FASTEST]
    if not timed:
        return ""
    note = "Times are those of the fastest seed, as whatever else runs on a machine only slows; the slowest follows "
    note += f"where it is more than {percent(round(APART - 1, 3))} off."
    unsure = [COSTS[key][1] for key in timed if is_unsure(outcomes, key)]
    if unsure:
        note += (
            f" Seeds of one strategy differ more than strategies do in {listed(unsure)}: read these as upper bounds."
        )
    return note


def is_unsure(outcomes: Outcomes, key: str) -> bool:
    """Whether a measured time varies more between seeds of one strategy than between the strategies' fastest."""
    fastest = [costs_of(outcomes, strategy, key) for strategy in outcomes.strategies]
    fastest = [value for value in fastest if value > 0]
    within = max((slowdown(outcomes, strategy, key) for strategy in outcomes.strategies), default=1.0)
    return len(fastest) > 1 and within > max(APART, max(fastest) / min(fastest))


def slowdown(outcomes: Outcomes, strategy: str, key: str) -> float:
    """How many times longer a strategy's slowest run took than its fastest; 1 where there is nothing to compare."""
    found = [value for value in _costs(outcomes, strategy, key) if value > 0]
    return max(found) / min(found) if found else 1.0


def _later_steps(outcomes: Outcomes, strategy: str) -> dict[str, float]:
    """Stage after pretraining -> steps."""
    budgets = [row.get("budget") or {} for row in outcomes.arms(strategy)]
    stages = sorted({key.removesuffix("/steps") for budget in budgets for key in budget if key.endswith("/steps")})
    return {stage: statistics.median(b[f"{stage}/steps"] for b in budgets if f"{stage}/steps" in b) for stage in stages}


def _cost_head(outcomes: Outcomes, key: str) -> str:
    if key == "steps":
        stages = dict.fromkeys(stage for s in outcomes.strategies for stage in _later_steps(outcomes, s))
        return " + ".join(["steps of pretrain", *stages]) if stages else "steps"
    if key != "search_seconds":
        return COSTS[key][1]
    costs = [row.get("cost") or {} for row in outcomes.done]
    sizes = {(c.get("search_images"), c.get("search_texts")) for c in costs if c.get("search_images") is not None}
    return "search, " + ", ".join(f"{images:g} x {texts:g}" for images, texts in sorted(sizes)) if sizes else "search"


def costs_of(outcomes: Outcomes, strategy: str, key: str) -> float:
    """One of `COSTS` of a strategy: the fastest of its seeds where it is a time, else their median; NaN of none."""
    return FASTEST.get(key, statistics.median)(_costs(outcomes, strategy, key) or [math.nan])


def _costs(outcomes: Outcomes, strategy: str, key: str) -> list[float]:
    found = [number((row.get(COSTS[key][0]) or {}).get(key)) for row in outcomes.arms(strategy)]
    return [value for value in found if math.isfinite(value)]


def duration(seconds: float) -> str:
    """In the unit in which it is read easily."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
