"""What a comparison may say in words: the tests' verdicts, a headline made of them, and warnings."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import isnan
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from mmbert.compare.report.outcomes import Outcomes, number, title
from mmbert.compare.statistics import Verdict, compare_all

MISSED = 0.05
"""A budget further from its target than this share is told."""
FEW_SEEDS = 5
"""Fewer seeds than this are called few."""
LONGEST_HEADLINE = 150
"""Characters; more differences than fit are counted instead."""
UNNAMED = "No primary measure was named beforehand"


class Findings(NamedTuple):
    """All words that rest on tests."""

    headline: str
    primary: list[Verdict]
    others: list[Verdict]
    warnings: list[str]


def find(outcomes: Outcomes) -> Findings:
    """Tests every pair of strategies on every measure that has items.

    Where no measure was named as primary, all that judge the whole model stand in for those, and the headline says so.
    """
    chosen = outcomes.primary() if outcomes.named() else outcomes.leading()
    names = [*chosen, *outcomes.measures(), *(n for found in outcomes.categories().values() for n in found)]
    items: dict[str, dict[str, list[np.ndarray]]] = {}
    clusters: dict[str, np.ndarray] = {}
    for measure in dict.fromkeys(names):
        found = {name: list(outcomes.outcomes(name, measure).values()) for name in outcomes.strategies}
        found = {name: runs for name, runs in found.items() if runs}
        images = outcomes.clusters(measure)
        if images is not None and len(found) > 1:
            items[measure], clusters[measure] = found, images
    verdicts = compare_all(items, clusters, primary=chosen)
    if outcomes.exploratory:
        verdicts = [verdict._replace(shown=False) for verdict in verdicts]
    primary = [verdict for verdict in verdicts if verdict.measure in chosen]
    others = [verdict for verdict in verdicts if verdict.measure not in chosen]
    words = headline(outcomes, primary)
    if primary and not outcomes.named() and not outcomes.exploratory:
        words += f" ({UNNAMED[0].lower() + UNNAMED[1:]})"
    return Findings(words, primary, others, warnings(outcomes, primary, others))


def headline(outcomes: Outcomes, verdicts: Sequence[Verdict]) -> str:
    """The answer in one line; it claims what the primary measures' tests show and nothing else."""
    done = [name for name in outcomes.strategies if outcomes.arms(name)]
    if len(done) < 2:
        return f"Only {done[0]} has finished: nothing to compare yet" if done else "No arm has finished yet"
    if outcomes.exploratory:
        return "Exploratory: nothing is claimed"
    if outcomes.named() and not outcomes.primary():
        return "Nothing is claimed: none of the primary measures was measured"
    if not verdicts:
        return "Nothing was tested: no outcomes of single items"
    if not any(verdict.p == verdict.p for verdict in verdicts):
        return "Nothing can be tested: that takes two seeds of each strategy, and several images"
    shown = [verdict for verdict in verdicts if verdict.shown]
    if not shown:
        return f"No difference shown between {listed(done)}"
    text = "; ".join(clauses(shown))
    if len(text) <= LONGEST_HEADLINE:
        return text
    first = [verdict for verdict in shown if verdict.measure == shown[0].measure]
    wins = Counter(_sides(verdict)[0] for verdict in first)
    most = max(wins.values())
    best = [name for name, count in wins.items() if count == most]
    one = "is" if len(best) == 1 else "are each"
    return (
        f"{listed(best)} {one} better than {most} of {len(done) - 1} others on {title(shown[0].measure)}; "
        f"{len(shown)} of {len(verdicts)} differences between pairs are shown"
    )


def clauses(shown: Sequence[Verdict]) -> list[str]:
    """Strategies and measures of which the same is shown, told together: x and y are better than z on m and n."""
    beaten: dict[tuple[str, str], list[str]] = {}
    for verdict in shown:
        better, worse = _sides(verdict)
        beaten.setdefault((better, title(verdict.measure)), []).append(worse)
    winners: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (better, measure), worse in beaten.items():
        winners.setdefault((measure, tuple(worse)), []).append(better)
    measures: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
    for (measure, worse), better in winners.items():
        measures.setdefault((tuple(better), worse), []).append(measure)
    return [
        f"{listed(better)} {'is' if len(better) == 1 else 'are'} better than {listed(worse)} on {listed(on)}"
        for (better, worse), on in sorted(measures.items(), key=lambda found: -len(found[0][1]))
    ]


def _sides(verdict: Verdict) -> tuple[str, str]:
    """(better, worse)."""
    return (verdict.a, verdict.b) if verdict.difference > 0 else (verdict.b, verdict.a)


def sentences(verdicts: Sequence[Verdict]) -> list[str]:
    """One sentence a pair: first what is shown, largest difference first, then what is not."""
    names = {verdict.measure: title(verdict.measure) for verdict in verdicts}
    ordered = sorted(verdicts, key=lambda v: (not v.shown, -abs(v.difference) if v.shown else 0))
    texts = [sentence(verdict, names) for verdict in ordered]
    return [f"{'N' + text[1:] if text.startswith('no difference shown') else text}." for text in texts]


def sentence(verdict: Verdict, names: Mapping[str, str] | None = None) -> str:
    """The one sentence a report may write about two strategies: "... is better" only where that is shown.

    Args:
        verdict: of `compare_pairs` or `compare_all`.
        names: how strategies and measures are called; a name that is not in it stands for itself.
    """
    names = names or {}
    measure = names.get(verdict.measure, verdict.measure)
    a, b = names.get(verdict.a, verdict.a), names.get(verdict.b, verdict.b)
    difference, low, high = verdict.difference, verdict.low, verdict.high
    level = f"{100 * verdict.level:g} % interval"
    if not verdict.shown:
        reason = "; no test is possible with one seed or one image" if isnan(verdict.p) else ""
        return (
            f"no difference shown between {a} and {b} on {measure} (difference {_points(difference)} points, "
            f"{level} {_points(low)} to {_points(high)}{reason})"
        )
    if difference < 0:
        a, b, difference, low, high = b, a, -difference, -high, -low
    p = "p < 0.001" if verdict.p_holm < 0.001 else f"p = {verdict.p_holm:.3f}"
    return (
        f"{a} is better than {b} on {measure} by {_points(difference)} points "
        f"({level} {_points(low)} to {_points(high)}, {p} after Holm)"
    )


def warnings(outcomes: Outcomes, tested: Sequence[Verdict], others: Sequence[Verdict] = ()) -> list[str]:
    """What a reader has to know before any number."""
    found = []
    if outcomes.exploratory:
        found.append("Exploratory: this comparison makes no claim; its numbers only tell where to look.")
    counts = {name: len(outcomes.arms(name)) for name in outcomes.strategies}
    single = [name for name, count in counts.items() if count == 1]
    several = [count for count in counts.values() if count > 1]
    if single and several:
        found.append(f"One seed of {listed(single)}: no claim is about {'it' if len(single) == 1 else 'them'}.")
    few = few_seeds(min(several or [1])) if single or several else ""
    if few:
        found.append(few)
    if not outcomes.named():
        found.append(f"{UNNAMED}, so that none is called so: all with outcomes of single items are one family.")
    untested = set(outcomes.named()) - {verdict.measure for verdict in tested}
    if untested and sum(count > 0 for count in counts.values()) > 1:
        names = listed(sorted(map(title, untested)))
        found.append(f"Primary, but not tested, since not measured or without outcomes of single items: {names}.")
    before = outcomes.comparison.get("primary_before")
    if before:
        names, arms = listed([title(name) for name in before.get("primary") or ()]) or "none", before.get("arms")
        found.append(f"The primary measures were changed after {arms} {'arm' if arms == 1 else 'arms'} had finished; "
                     f"before they were: {names}.")  # fmt: skip
    if len(set(counts.values())) > 1:
        found.append(f"Finished seeds differ: {listed([f'{name} {count}' for name, count in counts.items()])}.")
    found += _seeds_without_items(outcomes, dict.fromkeys(verdict.measure for verdict in [*tested, *others]))
    if outcomes.failed:
        arms = listed([str(row["arm"]) for row in outcomes.failed])
        found.append(f"Failed, and in no other number: {arms}.")
    if len(outcomes.machines()) > 1:
        found.append(f"Times come from different machines and can't be compared: {listed(outcomes.machines())}.")
    missed = missed_budgets(outcomes)
    if missed:
        told = listed([f"{arm} by {100 * gap:+.1f} %" for arm, gap in missed.items()])
        found.append(f"Budgets missed by more than {100 * MISSED:g} %: {told}. Read their quality with that in mind.")
    times = missed_times(outcomes)
    if times:
        told = listed([f"{name} by {100 * gap:+.1f} %" for name, gap in times.items()])
        found.append(f"Training times were to be equal; as measured (median over seeds) they miss the reference's by "
                     f"more than {100 * MISSED:g} %: {told}.")  # fmt: skip
    return found


def _seeds_without_items(outcomes: Outcomes, measures: Iterable[str]) -> list[str]:
    """What tests leave out, though it has finished."""
    short: dict[tuple[str, int, int], list[str]] = {}
    for measure in measures:
        for name in outcomes.strategies:
            runs, finished = len(outcomes.outcomes(name, measure)), len(outcomes.arms(name))
            if runs < finished and outcomes.values(name, measure):
                short.setdefault((name, runs, finished), []).append(title(measure))
    few = {key: names if len(names) < 4 else [*names[:2], f"{len(names) - 2} others"] for key, names in short.items()}
    return [
        f"Tested with {runs} of {finished} finished seeds of {name}, as of the others the outcomes of single items are "
        f"missing or not whole: {listed(names)}."
        for (name, runs, finished), names in few.items()
    ]


def few_seeds(seeds: int) -> str:
    """What to say about a small number of seeds; "" from `FEW_SEEDS` on."""
    if seeds >= FEW_SEEDS:
        return ""
    if seeds < 2:
        return f"{seeds} seed: how far another seed would land is unknown, so nothing is claimed."
    return (
        f"{seeds} seeds are few: only large differences can be shown, and a difference that is not shown may well be "
        f"there."
    )


def missed_budgets(outcomes: Outcomes) -> Mapping[str, float]:
    """Arm -> how far its budget is from the target, of those that are too far."""
    gaps = {str(row["arm"]): (row.get("budget") or {}).get("missed_by") for row in outcomes.rows}
    return {arm: gap for arm, gap in gaps.items() if isinstance(gap, (int, float)) and abs(gap) > MISSED}


def missed_times(outcomes: Outcomes) -> dict[str, float]:
    """Strategy -> how far its measured training time is from the reference's, where times were to be equal."""
    budgets: dict[str, Mapping[str, Any]] = {}
    seconds: dict[str, float] = {}
    for name in outcomes.strategies:
        arms = [row for row in outcomes.arms(name) if (row.get("budget") or {}).get("match") == "time"]
        found = [number((row.get("cost") or {}).get("train_seconds")) for row in arms]
        if any(value > 0 for value in found):
            budgets[name] = arms[0]["budget"]
            seconds[name] = median(value for value in found if value > 0)
    met = [name for name, budget in budgets.items() if budget.get("missed_by") == 0]
    reference = outcomes.comparison.get("reference") or next(iter([*met, *seconds]), None)
    if reference not in seconds:
        return {}
    gaps = {name: value / seconds[reference] - 1 for name, value in seconds.items()}
    return {name: gap for name, gap in gaps.items() if abs(gap) > MISSED}


def listed(names: Sequence[str]) -> str:
    """["a", "b", "c"] -> "a, b and c"."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _points(fraction: float) -> str:
    """Fraction as points with one decimal; never "-0.0"."""
    return f"{round(100 * fraction, 1) + 0.0:.1f}"
