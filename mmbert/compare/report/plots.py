"""Plots of a report as panels: drawn one by one for the page, and together for a file."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from mmbert.compare.report.costs import COSTS, strategy_cost
from mmbert.compare.report.drawing import GRID, MUTED, PAPER, Figure, Panel, line_style, shorten
from mmbert.compare.report.outcomes import (
    ABLATED_INPUT,
    Outcomes,
    is_baseline,
    is_score,
    mean_of,
    measure_title,
    number,
)
from mmbert.compare.report.tables import format_percent, task_title
from mmbert.compare.statistics import Interval

ROW_HEIGHT, FRAME_HEIGHT = 0.34, 0.62
"""Inches per strategy in a plot with one line each, and of the axis around them."""
PANEL_HEIGHT = 2.5
"""Height of other panels in inches."""
MAX_PANELS = 12
"""Panels per figure; the tables have the rest."""
DOTTED_CAPTION = "A thin dotted line is an interval over seeds alone (± in the table)."
DOTS_CAPTION = f"Mean over seeds with its 95 % interval; small dots are single seeds. {DOTTED_CAPTION}"
COST_AXES = ("parameters", "training_flops", "train_seconds", "ms_per_pair")


def figures(outcomes: Outcomes) -> list[Figure]:
    """All figures that have data."""
    drawn = [scores(outcomes), ablations(outcomes), categories(outcomes), cost(outcomes), curves(outcomes)]
    drawn.append(low_data(outcomes))
    return [figure._replace(panels=figure.panels[:MAX_PANELS]) for figure in drawn if figure.panels]


def scores(outcomes: Outcomes) -> Figure:
    """Mean, interval and seeds of every strategy, one panel per score: primary, tested, then other ones."""
    names = [measure for measure in outcomes.measures() if is_score(measure)]
    tested = [measure for measure in names if outcomes.clusters(measure) is not None]
    measures = list(dict.fromkeys([*outcomes.leading_measures(), *tested, *names]))
    caption = f"{DOTS_CAPTION} Dashed: chance or prior."
    titles = [task_title(outcomes, task) for task in dict.fromkeys(measure.split("/")[0] for measure in measures)]
    caption += "".join(f" {text[0].upper()}{text[1:]}." for text in titles if ": " in text)
    panels = [_dots(outcomes, measure) for measure in measures if _known(outcomes, measure)]
    return Figure("quality", "Scores", caption, panels, legend=False)


def categories(outcomes: Outcomes) -> Figure:
    """Mean, interval and seeds of every strategy, one panel per category."""
    names = [name for found in outcomes.categories().values() for name in found if _known(outcomes, name)]
    return Figure(
        "categories", "Scores by category", DOTS_CAPTION, [_dots(outcomes, name) for name in names], legend=False
    )


def _dots(outcomes: Outcomes, measure: str) -> Panel:
    def draw(axes: Axes) -> None:
        for y, strategy in enumerate(outcomes.strategies):
            found = outcomes.interval(strategy, measure)
            color = line_style(y).color
            seeds = list(outcomes.values(strategy, measure).values())
            axes.plot(seeds, [y + 0.27] * len(seeds), "o", color=color, alpha=0.75, markersize=3, markeredgewidth=0)
            if found is not None:
                axes.plot(_bounds(found), [y, y], color=color, solid_capstyle="round", **_stroke(found, 2.2))
                _mark(axes, found.mean, y, y, 7)
        baseline = outcomes.baseline(measure)
        if math.isfinite(baseline):
            axes.axvline(baseline, color=MUTED, linestyle=(0, (4, 3)), linewidth=1, zorder=0)
        _rows(axes, outcomes.strategies)

    return Panel(measure_title(measure), draw, FRAME_HEIGHT + ROW_HEIGHT * len(outcomes.strategies))


def ablations(outcomes: Outcomes) -> Figure:
    """Scores with the true input, a blank or shuffled image, and without the text: one line per strategy."""
    signs = {"blank": ("X", "blank image"), "shuffled": ("|", "shuffled image"), "no_text": ("2", "no text")}
    panels = []
    used = {v for found in outcomes.ablations().values() for v in found}
    for measure, variants in outcomes.ablations().items():

        def draw(axes: Axes, measure: str = measure, variants: Sequence[str] = tuple(variants)) -> None:
            for y, strategy in enumerate(outcomes.strategies):
                color = line_style(y).color
                means = {v: mean_of(list(outcomes.values(strategy, f"{measure}/{v}").values())) for v in variants}
                own = mean_of(list(outcomes.values(strategy, measure).values()))
                known = [x for x in [own, *means.values()] if math.isfinite(x)]
                if known:
                    axes.plot([min(known), max(known)], [y, y], color=color, linewidth=1.2, alpha=0.55)
                for variant, mean in means.items():
                    size = 6 if variant == "blank" else 10
                    axes.plot([mean], [y], signs[variant][0], color=color, markersize=size, markeredgewidth=1.6)
                _mark(axes, own, y, y, 8)
            _rows(axes, outcomes.strategies)

        panels.append(Panel(measure_title(measure), draw, FRAME_HEIGHT + ROW_HEIGHT * len(outcomes.strategies)))
    shapes = {"X": "cross", "|": "bar", "2": "fork"}
    caption = "Large marker: true input; "
    caption += "; ".join(f"{shapes[marker]}: {name}" for v, (marker, name) in signs.items() if v in used)
    inputs = " and ".join(sorted({ABLATED_INPUT[v] for v in used}))
    caption += f". The distance between them is the gain from the {inputs}."
    return Figure("image", f"{inputs.capitalize()} ablations", caption, panels, legend=False)


def cost(outcomes: Outcomes) -> Figure:
    """Score on the leading measure against each cost, with the Pareto front."""
    measures = outcomes.leading_measures()[:1]
    panels = []
    for measure in measures:
        for key in COST_AXES:
            points = {}
            for strategy in outcomes.strategies:
                found, price = outcomes.interval(strategy, measure), strategy_cost(outcomes, strategy, key)
                if found is not None and math.isfinite(price):
                    points[strategy] = (price, found)
            prices = [price for price, _ in points.values()]
            if points and max(prices) > 1.02 * min(prices):  # an equal cost has no axis
                unit, scale = _unit(key, max(prices))
                points = {name: (price / scale, found) for name, (price, found) in points.items()}
                panels.append(Panel(f"{COSTS[key][1]}{unit}", _against_cost(outcomes, measure, points), PANEL_HEIGHT))
    name = measure_title(measures[0]) if measures else ""
    caption = (
        f"{name} against the cost of a strategy: up and left is better. Dashed: Pareto front, on which no strategy is "
    )
    caption += "both cheaper and better than another; see the tests for significance. "
    caption += f"Times are those of the fastest seed. Vertical lines are 95 % intervals. {DOTTED_CAPTION}"
    return Figure("cost", "Score against cost", caption, panels, legend=True)


def _unit(key: str, largest: float) -> tuple[str, float]:
    """Unit of an axis, and its size in the unit of the rows."""
    if key.endswith("seconds"):
        return next(
            (unit, size)
            for unit, size in ((", h", 3600), (", min", 60), (", s", 1))
            if largest >= 2 * size or size == 1
        )
    return {"parameters": (", millions", 1e6), "training_flops": (", TFLOPs", 1e12)}.get(key, ("", 1.0))


def _against_cost(
    outcomes: Outcomes, measure: str, points: Mapping[str, tuple[float, Interval]]
) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        prices = [price for price, _ in points.values()]
        front = sorted(pareto([(price, found.mean) for price, found in points.values()]))
        corners = sorted((list(points.values())[i][0], list(points.values())[i][1].mean) for i in front)
        corners.append((max(prices), corners[-1][1]))
        axes.plot(*zip(*corners, strict=True), color=MUTED, linestyle=(0, (4, 3)), linewidth=1, zorder=0,
                  drawstyle="steps-post")  # fmt: skip
        for strategy, (price, found) in points.items():
            color = line_style(outcomes.strategies.index(strategy)).color
            axes.plot([price, price], _bounds(found), color=color, alpha=0.6, **_stroke(found, 1.6))
            _mark(axes, price, found.mean, outcomes.strategies.index(strategy), 8)
        if min(prices) > 0 and max(prices) > 8 * min(prices):
            axes.set_xscale("log")
            axes.set_xlim(min(prices) / 1.6, max(prices) * 1.6)
        else:
            room = 0.15 * (max(prices) - min(prices)) or 0.15 * abs(max(prices)) or 1
            axes.set_xlim(min(prices) - room, max(prices) + room)
            axes.xaxis.set_major_locator(MaxNLocator(3))
            axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        _frame(axes, "both")
        axes.set_ylabel(shorten(measure_title(measure), 30))

    return draw


def curves(outcomes: Outcomes) -> Figure:
    """Learning curves: mean and range over seeds."""
    names = {name for row in outcomes.done for name in row.get("curves") or {}}
    names = {name for name in names if not is_baseline(name)}
    names = {name for name in names if "loss" not in name} or names
    panels = []
    for name in sorted(names):
        lines = {s: _curve(outcomes, s, name) for s in outcomes.strategies}
        lines = {s: line for s, line in lines.items() if len(line[0]) > 1}
        if lines:
            panels.append(Panel(measure_title(name), _lines(outcomes, lines), PANEL_HEIGHT))
    caption = "Mean over seeds against optimizer steps; the band is the range over seeds."
    return Figure("curves", "Learning curves", caption, panels, legend=True)


def _curve(outcomes: Outcomes, strategy: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps (S,) that all seeds have, and their scores (seeds, S)."""
    runs = []
    for row in outcomes.arms(strategy):
        points = [(int(step), number(value)) for step, value in (row.get("curves") or {}).get(name, ())]
        run = {step: value for step, value in points if math.isfinite(value)}
        runs += [run] if run else []
    steps = sorted(set.intersection(*(set(run) for run in runs))) if runs else []
    return np.array(steps), np.array([[run[step] for step in steps] for run in runs])


def _lines(outcomes: Outcomes, lines: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for strategy, (steps, values) in lines.items():
            color, _, dashes = line_style(outcomes.strategies.index(strategy))
            if len(values) > 1:
                axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=color, alpha=0.16, linewidth=0)
            mean = values.mean(axis=0)
            axes.plot(steps, mean, color=color, linewidth=1.7, linestyle=dashes)
            _mark(axes, steps[-1], mean[-1], outcomes.strategies.index(strategy), 6)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        _frame(axes, "y")
        axes.set_xlabel("optimizer steps")

    return draw


def low_data(outcomes: Outcomes) -> Figure:
    """Scores against the fraction of the training pairs."""
    caption = (
        "Mean over seeds with its 95 % interval against the fraction of the training pairs; strategies are shifted "
    )
    caption += f"sideways to be visible. {DOTTED_CAPTION}"
    figure = Figure("low_data", "Low-data curve", caption, [], legend=True)
    if len(outcomes.fractions) < 2:
        return figure
    for measure in outcomes.leading_scores():

        def draw(axes: Axes, measure: str = measure) -> None:
            shift = 1.035  # on a log axis: strategies are drawn next to each other
            for number_, strategy in enumerate(outcomes.strategies):
                color, _, dashes = line_style(number_)
                found = {f: outcomes.interval(strategy, measure, f) for f in outcomes.fractions}
                known = {f: interval for f, interval in found.items() if interval is not None}
                shifted = shift ** (number_ - (len(outcomes.strategies) - 1) / 2)
                xs = [f * shifted for f in known]
                axes.plot(xs, [i.mean for i in known.values()], color=color, linewidth=1.6, linestyle=dashes)
                for x, interval in zip(xs, known.values(), strict=True):
                    axes.plot([x, x], _bounds(interval), color=color, alpha=0.6, **_stroke(interval, 1.6))
                    _mark(axes, x, interval.mean, number_, 6.5)
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(FixedLocator(outcomes.fractions))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: format_percent(round(x, 6))))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.margins(x=0.12)
            _frame(axes, "y")
            axes.set_xlabel("training pairs")

        figure.panels.append(Panel(measure_title(measure), draw, PANEL_HEIGHT))
    return figure


def _known(outcomes: Outcomes, measure: str) -> bool:
    return any(outcomes.values(strategy, measure) for strategy in outcomes.strategies)


def _mark(axes: Axes, x: float, y: float, position: int, size: float) -> None:
    """Draw the marker of the strategy at `position`, with a thin edge."""
    color, marker, _ = line_style(position)
    size *= {"*": 1.6, "P": 1.2, "d": 1.2}.get(marker, 1)  # these markers look smaller than the others
    axes.plot([x], [y], marker, color=color, markersize=size, markeredgecolor=PAPER, markeredgewidth=0.8)


def _bounds(found: Interval) -> tuple[float, float]:
    """Ends of the line of an interval; both the mean if it has no bounds."""
    if math.isfinite(found.low) and math.isfinite(found.high):
        return found.low, found.high
    return found.mean, found.mean


def _stroke(found: Interval, width: float) -> dict[str, Any]:
    """Line style of an interval; thin and dotted if it is over seeds alone."""
    return {"linewidth": width} if found.over_items else {"linewidth": 1.1, "linestyle": (0, (1.5, 1.2))}


def _rows(axes: Axes, names: Iterable[str]) -> None:
    """Label one line per strategy at the left, the first at the top."""
    names = [shorten(name, 20) for name in names]
    axes.set_yticks(range(len(names)), names)
    for i, label in enumerate(axes.get_yticklabels()):
        label.set_color(line_style(i).color)
        label.set_fontweight("bold")
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.margins(x=0.06)
    _frame(axes, "x")


def _frame(axes: Axes, grid: str) -> None:
    """Draw a grid along "x", "y" or "both", and only the bottom spine."""
    axes.grid(axis=grid, color=GRID, linewidth=0.8)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.tick_params(axis="both" if grid != "x" else "x", length=0, labelcolor=MUTED)
    axes.tick_params(axis="y", length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the Pareto-optimal (cost, quality) points; equal points are all kept, those with NaN are dropped."""
    known = [
        (i, cost, quality) for i, (cost, quality) in enumerate(points) if not (math.isnan(cost) or math.isnan(quality))
    ]
    return [
        i
        for i, cost, quality in known
        if not any(c <= cost and q >= quality and (c < cost or q > quality) for _, c, q in known)
    ]
