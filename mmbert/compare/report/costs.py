"""Cost of strategies for the table and the plots; times are those of the fastest seed."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from mmbert.compare.report.outcomes import Outcomes, Row, number
from mmbert.compare.report.summary import join_names
from mmbert.compare.report.tables import EMPTY, Table, format_percent

COSTS: Mapping[str, tuple[str, str, Callable[[float], str]]] = {
    "parameters": ("budget", "parameters", lambda x: f"{x / 1e6:.2f} M"),
    "fusion_layers": ("budget", "fusion layers", lambda x: f"{x:g}"),
    "training_flops": ("budget", "training FLOPs", lambda x: f"{x:.3g}".replace("e+", "e")),
    "steps": ("budget", "steps", lambda x: f"{x:,.0f}"),
    "train_seconds": ("cost", "training time", lambda x: format_duration(x)),
    "wall_seconds": ("cost", "wall time", lambda x: format_duration(x)),
    "peak_memory_bytes": ("cost", "peak memory", lambda x: f"{x / 1e9:.2f} GB"),
    "samples_per_second": ("cost", "pairs/s in training", lambda x: f"{x:.3g}"),
    "ms_per_pair": ("cost", "ms per pair", lambda x: f"{x:.2f}"),
    "search_seconds": ("cost", "search", lambda x: format_duration(x)),
}
"""Cost -> its section of a row, column title, format."""
FASTEST: Mapping[str, Callable[[Sequence[float]], float]] = {
    "train_seconds": min, "wall_seconds": min, "samples_per_second": max, "ms_per_pair": min, "search_seconds": min,
}  # fmt: skip
"""Measured time -> choice of the fastest run. Other programs on a machine only make runs slower."""
NOTABLE_SLOWDOWN = 1.1
"""Slowdown of the slowest run over the fastest from which on the table has both."""


def cost_table(outcomes: Outcomes) -> Table:
    """Table of the costs of finished arms, without columns that no arm has."""
    found = [key for key in COSTS if any(math.isfinite(strategy_cost(outcomes, s, key)) for s in outcomes.strategies)]
    head = ["strategy", *(_cost_head(outcomes, key) for key in found)]
    rows = [[strategy, *(_cost_cell(outcomes, strategy, key) for key in found)] for strategy in outcomes.strategies]
    return Table("Cost", head, rows, note=_cost_note(outcomes, found))


def towers_table(outcomes: Outcomes) -> Table:
    """Table of the cost of each run of the towers, which no arm's cost contains."""
    columns = {
        "steps": ("budget", "steps", lambda x: f"{x:,.0f}"),
        "samples": ("cost", "samples", lambda x: f"{x:,.0f}"),
        **{key: COSTS[key] for key in ("training_flops", "train_seconds", "wall_seconds", "peak_memory_bytes")},
    }

    def cell(row: Row, key: str) -> str:
        section, _, write = columns[key]
        value = number((row.get(section) or {}).get(key))
        return write(value) if math.isfinite(value) else EMPTY

    done = [row for row in outcomes.towers if row.get("status") == "done"]
    rows = [[str(row["arm"]), *(cell(row, key) for key in columns)] for row in done]
    head = ["towers", *(title for _, title, _ in columns.values())]
    note = "All strategies of a seed start from its towers. No budget and no other cost of this report contains theirs."
    return Table("Cost of the towers", head, rows, of_strategies=False, note=note)


def _cost_cell(outcomes: Outcomes, strategy: str, key: str) -> str:
    value, write = strategy_cost(outcomes, strategy, key), COSTS[key][2]
    if key == "steps":
        every = [value, *_later_steps(outcomes, strategy).values()]
        return " + ".join(write(steps) for steps in every if math.isfinite(steps)) or EMPTY
    if not math.isfinite(value):
        return EMPTY
    slowest = value * slowdown(outcomes, strategy, key) ** (-1 if FASTEST.get(key) is max else 1)
    notable = key in FASTEST and slowdown(outcomes, strategy, key) > NOTABLE_SLOWDOWN
    return write(value) + (f" (to {write(slowest)})" if notable else "")


def _cost_note(outcomes: Outcomes, keys: Sequence[str]) -> str:
    timed = [key for key in keys if key in FASTEST]
    if not timed:
        return ""
    note = "Times are those of the fastest seed, as other programs on the machine only make runs slower; the slowest "
    note += f"seed follows if it is more than {format_percent(round(NOTABLE_SLOWDOWN - 1, 3))} slower."
    uncertain = [COSTS[key][1] for key in timed if is_uncertain(outcomes, key)]
    if uncertain:
        note += (
            f" Seeds of one strategy differ more than strategies in {join_names(uncertain)}: these are upper bounds."
        )
    return note


def is_uncertain(outcomes: Outcomes, key: str) -> bool:
    """Whether a measured time varies more between seeds of one strategy than between the fastest of strategies."""
    fastest = [strategy_cost(outcomes, strategy, key) for strategy in outcomes.strategies]
    fastest = [value for value in fastest if value > 0]
    within = max((slowdown(outcomes, strategy, key) for strategy in outcomes.strategies), default=1.0)
    return len(fastest) > 1 and within > max(NOTABLE_SLOWDOWN, max(fastest) / min(fastest))


def slowdown(outcomes: Outcomes, strategy: str, key: str) -> float:
    """Ratio of the time of a strategy's slowest run to its fastest; 1 with fewer than two runs."""
    found = [value for value in _costs(outcomes, strategy, key) if value > 0]
    return max(found) / min(found) if found else 1.0


def _later_steps(outcomes: Outcomes, strategy: str) -> dict[str, float]:
    """Fine-tuning stage -> steps."""
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


def strategy_cost(outcomes: Outcomes, strategy: str, key: str) -> float:
    """One of `COSTS` of a strategy: of the fastest seed if it is a time, otherwise the median; NaN if unknown."""
    return FASTEST.get(key, statistics.median)(_costs(outcomes, strategy, key) or [math.nan])


def _costs(outcomes: Outcomes, strategy: str, key: str) -> list[float]:
    found = [number((row.get(COSTS[key][0]) or {}).get(key)) for row in outcomes.arms(strategy)]
    return [value for value in found if math.isfinite(value)]


def format_duration(seconds: float) -> str:
    """Format a duration in ms, s, min or h."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
