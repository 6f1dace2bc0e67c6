"""What a report says, in its order, not yet in any markup."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mmbert.compare.report import costs, plots, tables
from mmbert.compare.report.findings import clauses, find, listed, sentences
from mmbert.compare.report.outcomes import TAKEN, Outcomes, title
from mmbert.compare.report.plots import Figure
from mmbert.compare.report.tables import Table, percent
from mmbert.compare.statistics import Verdict

MOST_SENTENCES = 12
"""About pairs; more are told together."""

HOW = (
    "Intervals (95 %) are meant for other seeds and other images of the same kind; with one seed for other images "
    "only. Pairs of strategies are tested on the same items, items of one image kept together; p-values are "
    "corrected by Holm over all pairs on all primary measures together, those of the other measures among themselves. "
    "A strategy is called better only where such a test shows it. The tests take seeds to spread about normally: a "
    "strategy of which some seeds collapse is told by its dots in the plots, not by a test. Scores are fractions; a "
    "point is 0.010. Without outcomes of single items nothing is tested, and ± is half of Student's 95 % interval over "
    "seeds alone: other images would add to it. One seed has none, nor have seeds that agree to the last digit."
)


class Example(NamedTuple):
    """A test item about which strategies disagree."""

    image: bytes | None  # JPEG or PNG, None where it could not be read
    number: int
    caption: str
    foil: str
    category: str
    outcomes: dict[str, Any]

    @property
    def file(self) -> str:
        """The image's place inside the report's folder, "" without one."""
        return f"examples/{self.number}.{self.kind}" if self.image is not None else ""

    @property
    def kind(self) -> str:
        """Of the image's content: what its data URI says."""
        return "png" if (self.image or b"").startswith(b"\x89PNG") else "jpeg"


class Section(NamedTuple):
    """A heading and what stands below it."""

    title: str
    text: list[str]
    figures: list[Figure]
    tables: list[Table]


class Document(NamedTuple):
    """A whole report."""

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


def build(outcomes: Outcomes, examples: Sequence[Example]) -> Document:
    """Puts together what there is; a section without content is left out."""
    findings = find(outcomes)
    drawn = {figure.name: figure for figure in plots.figures(outcomes)}

    def figure(name: str) -> list[Figure]:
        return [drawn[name]] if name in drawn else []

    def tests(verdicts: Sequence[Verdict], name: str) -> list[Table]:
        return [tables.tests(verdicts, name, exploratory=outcomes.exploratory)] if verdicts else []

    tested = tests(findings.primary, "Tests on the primary measures" if outcomes.named() else "Tests")
    others = tests(findings.others, "Tests on measures that were not named as primary" if outcomes.named()
                   else "Tests by category")  # fmt: skip
    verdicts = [] if outcomes.exploratory else _verdicts(findings.primary)
    more = sum(verdict.shown for verdict in findings.others)
    if more:
        where = "measures that were not named as primary" if outcomes.named() else "categories"
        verdicts.append(f"On {where}, {more} of {len(findings.others)} differences are "
                        "shown; they stand further down.")  # fmt: skip
    sections = [
        Section("What is shown", verdicts, [], tested),
        Section("Quality", [], figure("quality"), tables.quality(outcomes)),
        Section(_needs_title(outcomes), [], figure("image"), tables.needs(outcomes)),
        Section("By category", [], figure("categories"), tables.categories(outcomes)),
        Section("Seen and unseen pairs", [], [], tables.parts(outcomes)),
        Section("Cost", [], figure("cost"), [costs.cost(outcomes)] if outcomes.done else []),
        Section("Learning curves", [], figure("curves"), []),
        Section("With less data", [], figure("low_data"), tables.low_data(outcomes)),
        Section("Failed arms", [], [], tables.failures(outcomes)),
        Section("Other tests", _verdicts([v for v in findings.others if v.shown]), [], others),
    ]
    return Document(
        name=str(outcomes.comparison.get("name", "comparison")),
        headline=findings.headline,
        facts=_facts(outcomes),
        warnings=findings.warnings,
        sections=[section for section in sections if section.text or section.figures or section.tables],
        examples=list(examples),
        options=_options(outcomes),
        command=str(outcomes.comparison.get("command", "")),
        strategies=outcomes.strategies,
        exploratory=outcomes.exploratory,
    )


def _needs_title(outcomes: Outcomes) -> str:
    taken = {TAKEN[variant] for found in outcomes.variants().values() for variant in found}
    return f"What {listed([f'the {what}' for what in sorted(taken)])} give{'s' if len(taken) == 1 else ''}"


def _options(outcomes: Outcomes) -> str:
    """Where the options of the arms are, as far as they are."""
    if all(row.get("options") for row in outcomes.rows):
        return "Every option of every arm is in results.jsonl."
    if outcomes.done and all(row.get("options") for row in outcomes.done):
        return "Every option of every finished arm is in results.jsonl."
    versions = sorted({str((row.get("versions") or {}).get("mmbert", "")) for row in outcomes.done} - {""})
    return (
        "Every option that was written down is in results.jsonl; the others had the defaults of mmbert"
        f"{' ' if versions else ''}{listed(versions)}."
    )


def _verdicts(verdicts: Sequence[Verdict]) -> list[str]:
    """A sentence a pair; where these are too many, a sentence for all pairs of which the same is shown."""
    if len(verdicts) <= MOST_SENTENCES:
        return sentences(verdicts)
    shown = [verdict for verdict in verdicts if verdict.shown]
    text = [f"{clause}." for clause in clauses(shown)]
    rest = len(verdicts) - len(shown)
    return text + ([f"No difference shown for {rest} of {len(verdicts)} pairs; the table has them."] if rest else [])


def _facts(outcomes: Outcomes) -> list[tuple[str, str]]:
    told: Mapping[str, Any] = outcomes.comparison
    seeds = told.get("seeds") or sorted({row.get("seed", 0) for row in outcomes.rows})
    facts = [
        ("Strategies", listed(outcomes.strategies)),
        ("Budget", _one_line(told.get("budget_rule"))),
        ("Seeds", f"{len(seeds)} ({', '.join(map(str, seeds))})"),
        ("Primary measures", listed([title(name) for name in outcomes.named()]) or "none was named beforehand"),
        ("Data", _one_line(told.get("dataset"))),
        ("Arms", f"{len(outcomes.done)} finished, {len(outcomes.failed)} failed"),
        ("Versions", _versions(outcomes)),
        ("Machine", listed(outcomes.machines())),
        ("Dates", _dates(outcomes)),
    ]
    if len(outcomes.fractions) > 1:
        shares = listed([percent(fraction) for fraction in outcomes.fractions])
        facts.insert(3, ("Training pairs", f"{shares}; where no share is named, {percent(outcomes.full)}"))
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
