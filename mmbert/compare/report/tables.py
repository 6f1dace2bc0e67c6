"""Tables of a report as unescaped text; the templates define their markup."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from mmbert.compare.report.outcomes import (
    ABLATED_INPUT,
    Outcomes,
    comparative,
    is_ranking,
    is_score,
    mean_of,
    measure_title,
)
from mmbert.compare.report.summary import join_names
from mmbert.compare.statistics import Interval, TestResult

EMPTY = "–"


class Table(NamedTuple):
    """Table of plain text; the first column is the header of a row."""

    title: str
    head: list[str]
    rows: list[list[str]]
    of_strategies: bool = True
    """Whether rows are strategies, which have their colors."""
    is_text: bool = False
    """Whether cells are text rather than numbers."""
    note: str = ""
    """Note below the table."""


def scores(outcomes: Outcomes) -> list[Table]:
    """One table per task: strategies x measures, mean over seeds with its confidence interval."""
    tasks: dict[str, list[str]] = {}
    for measure in outcomes.measures():
        tasks.setdefault(measure.split("/")[0], []).append(measure)
    return [_by_strategy(outcomes, task_title(outcomes, task), found) for task, found in tasks.items()]


def task_title(outcomes: Outcomes, task: str) -> str:
    """Name of a task; for retrieval with the number of candidates and the scorer, on which the result depends."""
    if not any(is_ranking(name) for name in outcomes.measures() if name.startswith(f"{task}/")):
        return _spaced(task)
    details = ["test of the run"]
    if task == "retrieval":
        images, captions = outcomes.candidates() or (0, 0)
        each, rest = divmod(captions, images or 1)
        details = [f"{images:,} images", f"{captions:,} captions" if rest else
                f"{each} caption{'s' if each > 1 else ''} each"] if images else []  # fmt: skip
    scorers = outcomes.scorers(task)
    by = (
        list(scorers) if len(scorers) == 1 else [f"{scorer} ({join_names(names)})" for scorer, names in scorers.items()]
    )
    details += [f"ranked by {join_names(by)}"] if by else ["scorer unknown"]
    return f"{_spaced(task)}: {', '.join(details)}"


def categories(outcomes: Outcomes) -> list[Table]:
    """One table per measure with categories: strategies x categories."""
    return [
        _by_strategy(outcomes, f"{measure_title(overall)}, by category", [overall, *found], short=True)
        for overall, found in outcomes.categories().items()
    ]


def _by_strategy(outcomes: Outcomes, name: str, measures: Sequence[str], *, short: bool = False) -> Table:
    heads = [_spaced(measure.rpartition("/")[2] if short else measure.partition("/")[2]) for measure in measures]
    head = ["strategy", *(head or "all" for head in heads), "seeds"]
    rows = []
    for strategy in outcomes.strategies:
        cells = [format_interval(outcomes.interval(strategy, measure)) for measure in measures]
        rows.append([strategy, *cells, str(len(outcomes.arms(strategy)))])
    baselines = [outcomes.baseline(measure) for measure in measures]
    if any(math.isfinite(baseline) for baseline in baselines):
        rows.append(["chance or prior", *map(format_fraction, baselines), EMPTY])
    return Table(name, head, rows, note=_interval_note(rows))


def _interval_note(rows: Sequence[Sequence[str]]) -> str:
    return "±: half of the 95 % interval over seeds alone." if any("±" in cell for row in rows for cell in row) else ""


def ablations(outcomes: Outcomes) -> list[Table]:
    """One table per measure with ablations: strategies x (true input, ablated inputs, gains of the true input)."""
    tables = []
    for measure, variants in outcomes.ablations().items():
        gains = [(f"gain over {_input_name(v)}", v) for v in variants]
        head = ["strategy", "true input", *(_input_name(v) for v in variants), *(name for name, _ in gains)]
        rows = []
        for strategy in outcomes.strategies:
            means = [mean_of(list(outcomes.values(strategy, f"{measure}/{v}").values())) for v in variants]
            own = mean_of(list(outcomes.values(strategy, measure).values()))
            differences = [
                format_interval(outcomes.interval(strategy, measure, minus=f"{measure}/{v}"), write=format_signed)
                for _, v in gains
            ]
            rows.append([strategy, format_fraction(own), *map(format_fraction, means), *differences])
        inputs = " and ".join(dict.fromkeys(ABLATED_INPUT[v] for v in variants))
        tables.append(Table(f"{measure_title(measure)}, {inputs} ablations", head, rows, note=_interval_note(rows)))
    return tables


def seen_unseen(outcomes: Outcomes) -> list[Table]:
    """Scores on pairs of the training and on new pairs: one table per measure with items.

    One more table has the differences of all other measures.
    """
    tables, others = [], {}
    for overall, found in outcomes.seen_unseen().items():
        if not is_score(overall):
            continue
        if any(outcomes.clusters(name) is None for name in found.values()):
            others[overall] = found
            continue
        columns = {"all": overall, **dict(sorted(found.items()))}
        columns = {head: name for head, name in columns.items() if name in outcomes.names()}
        head = ["strategy", *columns, *(["seen − unseen"] if len(found) == 2 else [])]
        rows = [
            [strategy, *(format_interval(outcomes.interval(strategy, name)) for name in columns.values())]
            + (
                [format_interval(outcomes.difference(strategy, *_both(found)), write=format_signed)]
                if len(found) == 2
                else []
            )
            for strategy in outcomes.strategies
        ]
        unpaired = UNPAIRED if len(found) == 2 and not tables else ""
        note = f"{unpaired} {_interval_note(rows)}".strip()
        tables.append(Table(f"{measure_title(overall)}, seen and unseen pairs", head, rows, note=note))
    if others:
        head = [
            measure_title(overall) if len(found) == 2 else ", ".join([measure_title(overall), *found])
            for overall, found in others.items()
        ]
        rows = [[strategy, *(_seen_unseen_cell(outcomes, strategy, found) for found in others.values())]
                for strategy in outcomes.strategies]  # fmt: skip
        tables.append(Table("Other scores, seen − unseen", ["strategy", *head], rows, note=_interval_note(rows)))
    return tables


UNPAIRED = (
    "Seen and unseen pairs are different items, so their difference is paired over seeds but not over images; its "
    "interval includes the variance of both samples of items."
)


def _both(found: Mapping[str, str]) -> tuple[str, str]:
    return found["seen"], found["unseen"]


def _seen_unseen_cell(outcomes: Outcomes, strategy: str, found: Mapping[str, str]) -> str:
    if len(found) == 2:
        return format_interval(outcomes.difference(strategy, *_both(found)), write=format_signed)
    return format_interval(outcomes.interval(strategy, next(iter(found.values()))))


def low_data(outcomes: Outcomes) -> list[Table]:
    """Scores by fraction of the training pairs; no table with one fraction."""
    if len(outcomes.fractions) < 2:
        return []
    least, most = outcomes.fractions[0], outcomes.fractions[-1]
    head = ["strategy", *map(format_percent, outcomes.fractions), f"{format_percent(most)} − {format_percent(least)}"]
    found = []
    for measure in outcomes.leading_scores():
        rows = [
            [
                strategy,
                *(format_interval(outcomes.interval(strategy, measure, f)) for f in outcomes.fractions),
                format_interval(outcomes.data_gain(strategy, measure, most, least), write=format_signed),
            ]
            for strategy in outcomes.strategies
        ]
        found.append(
            Table(f"{measure_title(measure)}, by fraction of the training pairs", head, rows, note=_interval_note(rows))
        )
    return found


def test_results(results: Sequence[TestResult], name: str, *, exploratory: bool) -> Table:
    """All tests of pairs of strategies, significant or not; without conclusions in an exploratory comparison."""
    rows = []
    for r in results:
        found = f"{r.a if r.difference > 0 else r.b} is {comparative(r.measure)}"
        text = "exploratory" if exploratory else found if r.significant else "not significant"
        p = EMPTY if math.isnan(r.p_holm) else "< 0.001" if r.p_holm < 0.001 else f"{r.p_holm:.3f}"
        interval = f"{format_signed(r.low)} to {format_signed(r.high)}"
        rows.append([measure_title(r.measure), f"{r.a} − {r.b}", format_signed(r.difference), interval, p, text])
    head = ["measure", "pair", "difference", "95 % interval", "p after Holm", "result"]
    return Table(name, head, rows, of_strategies=False)


def failures(outcomes: Outcomes) -> list[Table]:
    """Failed arms: stage, step, error and last losses."""
    failed = [*(row for row in outcomes.towers if row.get("status") != "done"), *outcomes.failed]
    rows = []
    for row in failed:
        failure: Mapping[str, Any] = row.get("failure") or {}
        losses = ", ".join(format_loss(value) for value in failure.get("last_losses") or ()) or EMPTY
        step = failure.get("step")
        position = [str(failure.get("stage") or EMPTY), EMPTY if step is None else str(step)]
        rows.append([str(row["arm"]), *position, str(failure.get("message", "?")), losses])
    if not rows:
        return []
    return [
        Table(
            "Failed arms",
            ["arm", "stage", "step", "error", "last losses"],
            rows,
            of_strategies=False,
            is_text=True,
        )
    ]


def format_interval(found: Interval | None, *, write: Callable[[float], str] | None = None) -> str:
    """Format a mean with its interval: "0.612 (0.590 to 0.634)"; over seeds alone "0.612 ± 0.022"."""
    write = write or format_fraction
    if found is None or not math.isfinite(found.mean):
        return EMPTY
    if not (math.isfinite(found.low) and math.isfinite(found.high)):
        return write(found.mean)
    if not found.over_items:
        return f"{write(found.mean)} ± {format_fraction(found.high - found.mean)}"
    return f"{write(found.mean)} ({write(found.low)} to {write(found.high)})"


def format_fraction(value: float) -> str:
    """Format with three decimals; values from 10 on, which are no fractions, with four significant digits."""
    if not math.isfinite(value):
        return EMPTY
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.4g}"


def format_signed(value: float) -> str:
    """Format a difference with its sign and three decimals; never "-0.000"."""
    return EMPTY if not math.isfinite(value) else f"{round(value, 3) + 0.0:+.3f}"


def format_loss(value: object) -> str:
    """Format a loss; NaN, infinity and text as they are."""
    return f"{value:.4g}" if isinstance(value, (int, float)) else str(value)


def format_percent(fraction: float) -> str:
    """Format a fraction in percent: 0.1 -> "10 %"."""
    return f"{100 * fraction:g} %"


def _spaced(name: str) -> str:
    return name.replace("/", " ").replace("_", " ")


def _input_name(ablation: str) -> str:
    return {"no_text": "no text", "blank": "blank image", "shuffled": "shuffled image"}[ablation]
