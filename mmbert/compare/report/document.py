"""Content of a report in its order, independent of the markup."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mmbert.compare.report import costs, plots, tables
from mmbert.compare.report.outcomes import ABLATED_INPUT, Outcomes, measure_title
from mmbert.compare.report.plots import Figure
from mmbert.compare.report.summary import describe_results, group_results, join_names, summarize
from mmbert.compare.report.tables import Table, format_percent
from mmbert.compare.statistics import TestResult

MAX_SENTENCES = 12
"""Test results that are described one by one; more are grouped."""

METHODS = (
    "Confidence intervals (95 %) generalize to other seeds and other images of the same kind; with one seed to other "
    "images only. Pairs of strategies are tested on the same items, with the items of one image as a cluster; p-values "
    "are Holm-corrected over all pairs on all primary measures together, and separately over those of the other "
    "measures. A strategy is called better only if such a test is significant. The tests assume roughly normal scores "
    "over seeds: if some seeds of a strategy collapse, look at its dots in the plots instead. Scores are fractions; a "
    "point is 0.010. Measures without per-item outcomes are not tested, and their ± is half of Student's 95 % interval "
    "over seeds alone, without the variance over images. There is none with one seed, or if all seeds are equal to the "
    "last digit."
)


class Example(NamedTuple):
    """A test item on which strategies disagree."""

    image: bytes | None  # JPEG or PNG, None if it could not be read
    number: int
    caption: str
    foil: str
    category: str
    outcomes: dict[str, Any]  # strategy -> whether it was right, or its answer

    @property
    def file(self) -> str:
        """Path of the image in the report's folder, "" without an image."""
        return f"examples/{self.number}.{self.file_type}" if self.image is not None else ""

    @property
    def file_type(self) -> str:
        """File type of the image, for its name and its data URI."""
        return "png" if (self.image or b"").startswith(b"\x89PNG") else "jpeg"


class Section(NamedTuple):
    """Section of a report: title, sentences, figures and tables."""

    title: str
    text: list[str]
    figures: list[Figure]
    tables: list[Table]


class Document(NamedTuple):
    """Content of a report."""

    name: str
    headline: str
    facts: list[tuple[str, str]]
    warnings: list[str]
    sections: list[Section]
    examples: list[Example]
    options: str
    command: str
    strategies: list[str]
    exploratory: bool


def build_document(outcomes: Outcomes, examples: Sequence[Example]) -> Document:
    """Build the content of a report, without sections that have no content."""
    summary = summarize(outcomes)
    named = bool(outcomes.named_primary())
    drawn = {figure.name: figure for figure in plots.figures(outcomes)}

    def figure(name: str) -> list[Figure]:
        return [drawn[name]] if name in drawn else []

    def tests(results: Sequence[TestResult], name: str) -> list[Table]:
        return [tables.test_results(results, name, exploratory=outcomes.exploratory)] if results else []

    primary = tests(summary.primary, "Tests on primary measures" if named else "Tests")
    secondary = tests(summary.secondary, "Tests on secondary measures" if named else "Tests by category")
    text = [] if outcomes.exploratory else _describe(summary.primary)
    significant = [result for result in summary.secondary if result.significant]
    if significant:
        measures = "secondary measures" if named else "categories"
        text.append(f"On {measures}, {len(significant)} of {len(summary.secondary)} differences are significant; see "
                    "the last section.")  # fmt: skip
    sections = [
        Section("Test results", text, [], primary),
        Section("Scores", [], figure("quality"), tables.scores(outcomes)),
        Section(_ablations_title(outcomes), [], figure("image"), tables.ablations(outcomes)),
        Section("Scores by category", [], figure("categories"), tables.categories(outcomes)),
        Section("Seen and unseen pairs", [], [], tables.seen_unseen(outcomes)),
        Section("Cost", [], figure("cost"),
                [*([costs.cost_table(outcomes)] if outcomes.done else []),
                 *([costs.towers_table(outcomes)] if outcomes.towers else [])]),
        Section("Learning curves", [], figure("curves"), []),
        Section("Low-data curve", [], figure("low_data"), tables.low_data(outcomes)),
        Section("Failed arms", [], [], tables.failures(outcomes)),
        Section("Test results on secondary measures" if named else "Test results by category",
                _describe(significant), [], secondary),
    ]  # fmt: skip
    return Document(
        name=str(outcomes.comparison.get("name", "comparison")),
        headline=summary.headline,
        facts=_facts(outcomes),
        warnings=summary.warnings,
        sections=[section for section in sections if section.text or section.figures or section.tables],
        examples=list(examples),
        options=_describe_options(outcomes),
        command=str(outcomes.comparison.get("command", "")),
        strategies=outcomes.strategies,
        exploratory=outcomes.exploratory,
    )


def _ablations_title(outcomes: Outcomes) -> str:
    inputs = {ABLATED_INPUT[ablation] for found in outcomes.ablations().values() for ablation in found}
    gains = {"image": "visual", "text": "textual"}
    return f"{join_names([gains[name] for name in sorted(inputs)])} gain".capitalize()


def _describe_options(outcomes: Outcomes) -> str:
    """Describe which options of the arms results.jsonl has."""
    if all(row.get("options") for row in outcomes.rows):
        return "Every option of every arm is in results.jsonl."
    if outcomes.done and all(row.get("options") for row in outcomes.done):
        return "Every option of every finished arm is in results.jsonl."
    versions = sorted({str((row.get("versions") or {}).get("mmbert", "")) for row in outcomes.done} - {""})
    return (
        "Every explicit option is in results.jsonl; the others have the defaults of mmbert"
        f"{' ' if versions else ''}{join_names(versions)}."
    )


def _describe(results: Sequence[TestResult]) -> list[str]:
    """One sentence per result; if there are too many, significant ones are grouped and the others counted."""
    if len(results) <= MAX_SENTENCES:
        return describe_results(results)
    significant = [result for result in results if result.significant]
    text = [f"{clause}." for clause in group_results(significant)]
    rest = len(results) - len(significant)
    return text + ([f"No significant difference for {rest} of {len(results)} pairs; see the table."] if rest else [])


def _facts(outcomes: Outcomes) -> list[tuple[str, str]]:
    comparison: Mapping[str, Any] = outcomes.comparison
    seeds = comparison.get("seeds") or sorted({row.get("seed", 0) for row in outcomes.rows})
    primary = join_names([measure_title(name) for name in outcomes.named_primary()])
    facts = [
        ("Strategies", join_names(outcomes.strategies)),
        ("Budget", _one_line(comparison.get("budget_rule"))),
        ("Seeds", f"{len(seeds)} ({', '.join(map(str, seeds))})"),
        ("Primary measures", primary or "none was named beforehand"),
        ("Data", _one_line(comparison.get("dataset"))),
        ("Arms", f"{len(outcomes.done)} finished, {len(outcomes.failed)} failed"),
        ("Versions", _versions(outcomes)),
        ("Machine", join_names(outcomes.machines())),
        ("Dates", _dates(outcomes)),
    ]
    if len(outcomes.fractions) > 1:
        fractions = join_names([format_percent(fraction) for fraction in outcomes.fractions])
        facts.insert(3, ("Training pairs", f"{fractions}; {format_percent(outcomes.full)} unless stated otherwise"))
    return [(name, value) for name, value in facts if value]


def _one_line(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {found}" for key, found in sorted(value.items()))
    return "" if value is None else str(value)


def _versions(outcomes: Outcomes) -> str:
    found: dict[str, set[str]] = {}
    for row in outcomes.rows:
        for name, version in (row.get("versions") or {}).items():
            found.setdefault(str(name), set()).add(str(version))
    return ", ".join(f"{name} {' and '.join(sorted(versions))}" for name, versions in sorted(found.items()))


def _dates(outcomes: Outcomes) -> str:
    costs = [row.get("cost") or {} for row in outcomes.rows]
    dates = sorted({str(cost["date"]) for cost in costs if cost.get("date")})
    return " to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else ""
