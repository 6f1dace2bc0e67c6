"""The tables of a report, as text not yet escaped: what is in a cell is decided here, how it looks is not."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from mmbert.compare.report.findings import listed
from mmbert.compare.report.outcomes import TAKEN, Outcomes, is_ranking, is_score, mean_of, title
from mmbert.compare.statistics import Interval, Verdict

NOTHING = "–"


class Table(NamedTuple):
    """Cells as plain text; the first column names the row."""

    title: str
    head: list[str]
    rows: list[list[str]]
    of_strategies: bool = True
    """Whether rows are strategies, and get their colours."""
    words: bool = False
    """Whether cells are text rather than numbers."""
    note: str = ""
    """What to know when reading it; stands below."""


def quality(outcomes: Outcomes) -> list[Table]:
    """A table a task: strategies x measures, mean over seeds with its interval."""
    tasks: dict[str, list[str]] = {}
    for measure in outcomes.measures():
        tasks.setdefault(measure.split("/")[0], []).append(measure)
    return [_by_strategy(outcomes, task_table(outcomes, task), found) for task, found in tasks.items()]


def task_table(outcomes: Outcomes, task: str) -> str:
    """A task's name, and where it ranks: what, and by which scorer, since two rankings of a model differ by that."""
    if not any(is_ranking(name) for name in outcomes.measures() if name.startswith(f"{task}/")):
        return _words(task)
    what = ["the run's own test"]
    if task == "retrieval":
        images, captions = outcomes.candidates() or (0, 0)
        each, rest = divmod(captions, images or 1)
        what = [f"{images:,} images", f"{captions:,} captions" if rest else
                f"{each} caption{'s' if each > 1 else ''} each"] if images else []  # fmt: skip
    scorers = outcomes.scorers(task)
    by = list(scorers) if len(scorers) == 1 else [f"{scorer} ({listed(names)})" for scorer, names in scorers.items()]
    what += [f"ranked by {listed(by)}"] if by else ["by which scorer is not written down"]
    return f"{_words(task)}: {', '.join(what)}"


def categories(outcomes: Outcomes) -> list[Table]:
    """Strategies x categories, for each measure that has them."""
    return [
        _by_strategy(outcomes, f"{title(whole)}, by category", [whole, *found], short=True)
        for whole, found in outcomes.categories().items()
    ]


def _by_strategy(outcomes: Outcomes, name: str, measures: Sequence[str], *, short: bool = False) -> Table:
    heads = [_words(measure.rpartition("/")[2] if short else measure.partition("/")[2]) for measure in measures]
    head = ["strategy", *(head or "all" for head in heads), "seeds"]
    rows = []
    for strategy in outcomes.strategies:
        cells = [cell(outcomes.interval(strategy, measure)) for measure in measures]
        rows.append([strategy, *cells, str(len(outcomes.arms(strategy)))])
    references = [outcomes.reference(measure) for measure in measures]
    if any(math.isfinite(reference) for reference in references):
        rows.append(["without a model", *map(share, references), NOTHING])
    return Table(name, head, rows, note=_interval_note(rows))


def _interval_note(rows: Sequence[Sequence[str]]) -> str:
    return "±: half of the 95 % interval over seeds alone." if any("±" in cell for row in rows for cell in row) else ""


def needs(outcomes: Outcomes) -> list[Table]:
    """What is lost without the image, or the text: strategies x (true, variants, differences), a table a measure."""
    tables = []
    for measure, variants in outcomes.variants().items():
        lost = [(f"lost: {_variant(v)}", v) for v in variants]
        head = ["strategy", "as it is", *(_variant(v) for v in variants), *(name for name, _ in lost)]
        rows = []
        for strategy in outcomes.strategies:
            means = [mean_of(list(outcomes.values(strategy, f"{measure}/{v}").values())) for v in variants]
            own = mean_of(list(outcomes.values(strategy, measure).values()))
            gaps = [cell(outcomes.interval(strategy, measure, minus=f"{measure}/{v}"), write=signed) for _, v in lost]
            rows.append([strategy, share(own), *map(share, means), *gaps])
        what = "image or text" if len({TAKEN[v] for v in variants}) > 1 else TAKEN[variants[0]]
        tables.append(Table(f"{title(measure)}, with and without the {what}", head, rows, note=_interval_note(rows)))
    return tables


def parts(outcomes: Outcomes) -> list[Table]:
    """Scores on pairs that training had and on pairs that it never had: a table for each that has items.

    Of all others one table tells the differences.
    """
    tables, others = [], {}
    for whole, found in outcomes.parts().items():
        if not is_score(whole):
            continue
        if any(outcomes.clusters(name) is None for name in found.values()):
            others[whole] = found
            continue
        columns = {"all": whole, **dict(sorted(found.items()))}
        columns = {head: name for head, name in columns.items() if name in outcomes.names()}
        head = ["strategy", *columns, *(["seen − unseen"] if len(found) == 2 else [])]
        rows = [
            [strategy, *(cell(outcomes.interval(strategy, name)) for name in columns.values())]
            + ([cell(outcomes.gap(strategy, *_both(found)), write=signed)] if len(found) == 2 else [])
            for strategy in outcomes.strategies
        ]
        unpaired = UNPAIRED if len(found) == 2 and not tables else ""
        note = f"{unpaired} {_interval_note(rows)}".strip()
        tables.append(Table(f"{title(whole)}, by whether training had the pair", head, rows, note=note))
    if others:
        head = [
            title(whole) if len(found) == 2 else ", ".join([title(whole), *found]) for whole, found in others.items()
        ]
        rows = [[strategy, *(_part_cell(outcomes, strategy, found) for found in others.values())]
                for strategy in outcomes.strategies]  # fmt: skip
        tables.append(Table("Other scores, seen − unseen", ["strategy", *head], rows, note=_interval_note(rows)))
    return tables


UNPAIRED = (
    "Seen and unseen pairs are different items, so that their difference is paired over seeds but not over images; "
    "its interval allows for both samples of items."
)


def _both(found: Mapping[str, str]) -> tuple[str, str]:
    return found["seen"], found["unseen"]


def _part_cell(outcomes: Outcomes, strategy: str, found: Mapping[str, str]) -> str:
    if len(found) == 2:
        return cell(outcomes.gap(strategy, *_both(found)), write=signed)
    return cell(outcomes.interval(strategy, next(iter(found.values()))))


def low_data(outcomes: Outcomes) -> list[Table]:
    """Scores against the share of the training pairs; none with one share."""
    if len(outcomes.fractions) < 2:
        return []
    least, most = outcomes.fractions[0], outcomes.fractions[-1]
    head = ["strategy", *map(percent, outcomes.fractions), f"{percent(most)} − {percent(least)}"]
    found = []
    for measure in outcomes.leading_scores():
        rows = [
            [
                strategy,
                *(cell(outcomes.interval(strategy, measure, f)) for f in outcomes.fractions),
                cell(outcomes.gain(strategy, measure, most, least), write=signed),
            ]
            for strategy in outcomes.strategies
        ]
        found.append(Table(f"{title(measure)}, by share of the training pairs", head, rows, note=_interval_note(rows)))
    return found


def tests(verdicts: Sequence[Verdict], name: str, *, exploratory: bool) -> Table:
    """Every pair that was tested; an exploratory comparison claims nothing of them."""
    rows = []
    for v in verdicts:
        better = v.a if v.difference > 0 else v.b
        verdict = "no claim" if exploratory else f"{better} is better" if v.shown else "no difference shown"
        p = NOTHING if math.isnan(v.p_holm) else "< 0.001" if v.p_holm < 0.001 else f"{v.p_holm:.3f}"
        interval = f"{signed(v.low)} to {signed(v.high)}"
        rows.append([title(v.measure), f"{v.a} − {v.b}", signed(v.difference), interval, p, verdict])
    head = ["measure", "pair", "difference", "95 % interval", "p after Holm", "verdict"]
    return Table(name, head, rows, of_strategies=False)


def failures(outcomes: Outcomes) -> list[Table]:
    """Arms that did not finish: where, why, and what the losses did before."""
    if not outcomes.failed:
        return []
    rows = []
    for row in outcomes.failed:
        failure: Mapping[str, Any] = row.get("failure") or {}
        losses = ", ".join(loss(value) for value in failure.get("last_losses") or ()) or NOTHING
        step = failure.get("step")
        where = [str(failure.get("stage") or NOTHING), NOTHING if step is None else str(step)]
        rows.append([str(row["arm"]), *where, str(failure.get("what", "?")), losses])
    return [
        Table(
            "Where they broke off",
            ["arm", "stage", "step", "what happened", "last losses"],
            rows,
            of_strategies=False,
            words=True,
        )
    ]


def cell(found: Interval | None, *, write: Callable[[float], str] | None = None) -> str:
    """A mean with its interval, "0.612 (0.590 to 0.634)"; one over seeds alone is "0.612 ± 0.022"."""
    write = write or share
    if found is None or not math.isfinite(found.mean):
        return NOTHING
    if not (math.isfinite(found.low) and math.isfinite(found.high)):
        return write(found.mean)
    if not found.over_items:
        return f"{write(found.mean)} ± {share(found.high - found.mean)}"
    return f"{write(found.mean)} ({write(found.low)} to {write(found.high)})"


def share(value: float) -> str:
    """Three digits behind the point, as far as a fraction has them."""
    if not math.isfinite(value):
        return NOTHING
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.4g}"


def signed(value: float) -> str:
    """`share` with its sign; never "-0.000"."""
    return NOTHING if not math.isfinite(value) else f"{round(value, 3) + 0.0:+.3f}"


def loss(value: object) -> str:
    """A loss as far as it is a number; NaN and infinity by name."""
    return f"{value:.4g}" if isinstance(value, (int, float)) else str(value)


def percent(fraction: float) -> str:
    """0.1 -> "10 %"."""
    return f"{100 * fraction:g} %"


def _words(name: str) -> str:
    return name.replace("/", " ").replace("_", " ")


def _variant(name: str) -> str:
    return {"no_text": "no text", "blank": "blank image", "shuffled": "another image"}[name]
