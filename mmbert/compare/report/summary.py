"""Summary of a comparison in words: headline, test results and warnings."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import isnan
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from mmbert.compare.report.outcomes import Outcomes, comparative, measure_title, number
from mmbert.compare.statistics import TestResult, compare_all

MAX_BUDGET_GAP = 0.05
"""Relative gap of a budget from which on the report warns."""
FEW_SEEDS = 5
"""Number of seeds below which the report warns."""
MAX_HEADLINE_LENGTH = 150
"""Characters; a longer headline counts the significant differences instead."""
NO_PRIMARY = "No primary measure was named beforehand"


class Summary(NamedTuple):
    """Headline, results of all tests, and warnings of a comparison."""

    headline: str
    primary: list[TestResult]
    secondary: list[TestResult]
    warnings: list[str]


def summarize(outcomes: Outcomes) -> Summary:
    """Test every pair of strategies on every measure that has items.

    If no measure was named as primary, all overall measures are tested as one family, and the headline says so.
    """
    chosen = outcomes.primary() if outcomes.named_primary() else outcomes.leading_measures()
    names = [*chosen, *outcomes.measures(), *(n for found in outcomes.categories().values() for n in found)]
    items: dict[str, dict[str, list[np.ndarray]]] = {}
    clusters: dict[str, np.ndarray] = {}
    for measure in dict.fromkeys(names):
        found = {name: list(outcomes.outcomes(name, measure).values()) for name in outcomes.strategies}
        found = {name: runs for name, runs in found.items() if runs}
        images = outcomes.clusters(measure)
        if images is not None and len(found) > 1:
            items[measure], clusters[measure] = found, images
    results = compare_all(items, clusters, primary=chosen)
    if outcomes.exploratory:
        results = [result._replace(significant=False) for result in results]
    primary = [result for result in results if result.measure in chosen]
    secondary = [result for result in results if result.measure not in chosen]
    text = headline(outcomes, primary)
    if primary and not outcomes.named_primary() and not outcomes.exploratory:
        text += f" ({NO_PRIMARY[0].lower() + NO_PRIMARY[1:]})"
    return Summary(text, primary, secondary, warnings(outcomes, primary, secondary))


def headline(outcomes: Outcomes, results: Sequence[TestResult]) -> str:
    """One line with the significant differences on the primary measures."""
    done = [name for name in outcomes.strategies if outcomes.arms(name)]
    if len(done) < 2:
        return f"Only {done[0]} has finished: nothing to compare yet" if done else "No arm has finished yet"
    if outcomes.exploratory:
        return "Exploratory: no conclusions"
    if outcomes.named_primary() and not outcomes.primary():
        return "No conclusions: none of the primary measures was measured"
    if not results:
        return "No tests: there are no per-item outcomes"
    if not any(result.p == result.p for result in results):
        return "No tests are possible: they require two seeds per strategy, and several images"
    significant = [result for result in results if result.significant]
    if not significant:
        return f"No significant difference between {join_names(done)}"
    text = "; ".join(group_results(significant))
    if len(text) <= MAX_HEADLINE_LENGTH:
        return text
    first = [result for result in significant if result.measure == significant[0].measure]
    wins = Counter(_higher_and_lower(result)[0] for result in first)
    most = max(wins.values())
    best = [name for name, count in wins.items() if count == most]
    verb = "is" if len(best) == 1 else "are each"
    return (
        f"{join_names(best)} {verb} {comparative(first[0].measure)} than {most} of {len(done) - 1} others on "
        f"{measure_title(significant[0].measure)}; "
        f"{len(significant)} of {len(results)} differences between pairs are significant"
    )


def group_results(significant: Sequence[TestResult]) -> list[str]:
    """Join significant results with the same strategies or measures: "x and y are better than z on m and n"."""
    beaten: dict[tuple[str, str], list[str]] = {}
    for result in significant:
        higher, lower = _higher_and_lower(result)
        beaten.setdefault((higher, result.measure), []).append(lower)
    winners: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (higher, measure), lower in beaten.items():
        winners.setdefault((measure, tuple(lower)), []).append(higher)
    measures: dict[tuple[tuple[str, ...], tuple[str, ...], str], list[str]] = {}
    for (measure, lower), higher in winners.items():
        measures.setdefault((tuple(higher), lower, comparative(measure)), []).append(measure_title(measure))
    return [
        f"{join_names(higher)} {'is' if len(higher) == 1 else 'are'} {word} than {join_names(lower)} "
        f"on {join_names(on)}"
        for (higher, lower, word), on in sorted(measures.items(), key=lambda found: -len(found[0][1]))
    ]


def _higher_and_lower(result: TestResult) -> tuple[str, str]:
    return (result.a, result.b) if result.difference > 0 else (result.b, result.a)


def describe_results(results: Sequence[TestResult]) -> list[str]:
    """One sentence per result: significant ones first, by the size of the difference, then the others."""
    names = {result.measure: measure_title(result.measure) for result in results}
    ordered = sorted(results, key=lambda r: (not r.significant, -abs(r.difference) if r.significant else 0))
    texts = [describe_result(result, names) for result in ordered]
    return [f"{'N' + text[1:] if text.startswith('no significant') else text}." for text in texts]


def describe_result(result: TestResult, names: Mapping[str, str] | None = None) -> str:
    """Describe a test result in words: "a is better than b" (or "higher", see `comparative`) only if it is significant.

    Args:
        result: Result of `compare_pairs` or `compare_all`.
        names: Name of a strategy or measure -> name in the text; without an entry names are unchanged.
    """
    names = names or {}
    measure = names.get(result.measure, result.measure)
    a, b = names.get(result.a, result.a), names.get(result.b, result.b)
    difference, low, high = result.difference, result.low, result.high
    level = f"{100 * result.level:g} % interval"
    if not result.significant:
        reason = "; no test is possible with one seed or one image" if isnan(result.p) else ""
        return (
            f"no significant difference between {a} and {b} on {measure} (difference {_points(difference)} points, "
            f"{level} {_points(low)} to {_points(high)}{reason})"
        )
    if difference < 0:
        a, b, difference, low, high = b, a, -difference, -high, -low
    p = "p < 0.001" if result.p_holm < 0.001 else f"p = {result.p_holm:.3f}"
    return (
        f"{a} is {comparative(result.measure)} than {b} on {measure} by {_points(difference)} points "
        f"({level} {_points(low)} to {_points(high)}, {p} after Holm)"
    )


def warnings(outcomes: Outcomes, primary: Sequence[TestResult], secondary: Sequence[TestResult] = ()) -> list[str]:
    """Warnings that the report has before the results."""
    found = []
    if outcomes.exploratory:
        found.append(
            "Exploratory: this comparison allows no conclusions; its numbers only show what is worth a closer look."
        )
    counts = {name: len(outcomes.arms(name)) for name in outcomes.strategies}
    single = [name for name, count in counts.items() if count == 1]
    several = [count for count in counts.values() if count > 1]
    if single and several:
        found.append(
            f"One seed of {join_names(single)}: no conclusion is drawn about {'it' if len(single) == 1 else 'them'}."
        )
    few = few_seeds_warning(min(several or [1])) if single or several else ""
    if few:
        found.append(few)
    if not outcomes.named_primary():
        found.append(f"{NO_PRIMARY}: all measures with per-item outcomes are tested as one family.")
    untested = set(outcomes.named_primary()) - {result.measure for result in primary}
    if untested and sum(count > 0 for count in counts.values()) > 1:
        names = join_names(sorted(map(measure_title, untested)))
        found.append(
            f"Primary measures without a test, as they were not measured or have no per-item outcomes: {names}."
        )
    before = outcomes.comparison.get("primary_before")
    if before:
        names = join_names([measure_title(name) for name in before.get("primary") or ()]) or "none"
        arms = before.get("arms")
        found.append(f"The primary measures were changed after {arms} {'arm' if arms == 1 else 'arms'} had finished; "
                     f"before, they were: {names}.")  # fmt: skip
    if len(set(counts.values())) > 1:
        numbers = join_names([f"{name} {count}" for name, count in counts.items()])
        found.append(f"The number of finished seeds differs: {numbers}.")
    found += _seeds_without_items(outcomes, dict.fromkeys(result.measure for result in [*primary, *secondary]))
    if outcomes.failed:
        arms = join_names([str(row["arm"]) for row in outcomes.failed])
        found.append(f"Failed arms, excluded from all results: {arms}.")
    if len(outcomes.machines()) > 1:
        found.append(f"Times are from different machines and not comparable: {join_names(outcomes.machines())}.")
    mixed = _mixed_towers(outcomes)
    if mixed:
        found.append(f"Arms of {join_names(mixed)} have started from different weights.")
    missed = missed_budgets(outcomes)
    if missed:
        gaps = join_names([f"{arm} by {100 * gap:+.1f} %" for arm, gap in missed.items()])
        found.append(
            f"Budgets missed by more than {100 * MAX_BUDGET_GAP:g} %: {gaps}. Their scores are not at equal cost."
        )
    times = missed_times(outcomes)
    if times:
        gaps = join_names([f"{name} by {100 * gap:+.1f} %" for name, gap in times.items()])
        found.append(f"Training times were matched, but as measured (median over seeds) they differ from that of the "
                     f"reference by more than {100 * MAX_BUDGET_GAP:g} %: {gaps}.")  # fmt: skip
    return found


def _mixed_towers(outcomes: Outcomes) -> list[str]:
    """Towers of which finished arms had different weights, as some were imported or the towers were trained again."""
    found: dict[str, list[Any]] = {}
    for row in outcomes.done:
        towers = row.get("towers") or {}
        found.setdefault(str(towers.get("arm")), []).append(towers.get("sha256"))
    return [name for name, weights in found.items() if any(own != weights[0] for own in weights)]


def _seeds_without_items(outcomes: Outcomes, measures: Iterable[str]) -> list[str]:
    """Warnings about finished seeds that the tests can't use."""
    short: dict[tuple[str, int, int], list[str]] = {}
    for measure in measures:
        for name in outcomes.strategies:
            runs, finished = len(outcomes.outcomes(name, measure)), len(outcomes.arms(name))
            if runs < finished and outcomes.values(name, measure):
                short.setdefault((name, runs, finished), []).append(measure_title(measure))
    few = {key: names if len(names) < 4 else [*names[:2], f"{len(names) - 2} others"] for key, names in short.items()}
    return [
        f"Tested with {runs} of {finished} finished seeds of {name}, as the per-item outcomes of others are missing or "
        f"incomplete: {join_names(names)}."
        for (name, runs, finished), names in few.items()
    ]


def few_seeds_warning(seeds: int) -> str:
    """Warning about a small number of seeds; empty from `FEW_SEEDS` on."""
    if seeds >= FEW_SEEDS:
        return ""
    if seeds < 2:
        return f"{seeds} seed: the variance over seeds is unknown, so no conclusion is drawn."
    return (
        f"{seeds} seeds are few: only large differences can be significant, and a difference that is not significant "
        f"may still exist."
    )


def missed_budgets(outcomes: Outcomes) -> Mapping[str, float]:
    """Arm -> relative gap of its budget, of those above `MAX_BUDGET_GAP`."""
    gaps = {str(row["arm"]): (row.get("budget") or {}).get("missed_by") for row in outcomes.rows}
    return {arm: gap for arm, gap in gaps.items() if isinstance(gap, (int, float)) and abs(gap) > MAX_BUDGET_GAP}


def missed_times(outcomes: Outcomes) -> dict[str, float]:
    """Strategy -> relative gap of its measured training time to the reference, if times were matched."""
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
    return {name: gap for name, gap in gaps.items() if abs(gap) > MAX_BUDGET_GAP}


def join_names(names: Sequence[str]) -> str:
    """Join names to a list in words: ["a", "b", "c"] -> "a, b and c"."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _points(fraction: float) -> str:
    """Format a fraction as percentage points with one decimal; never "-0.0"."""
    return f"{round(100 * fraction, 1) + 0.0:.1f}"
