"""A report as plain Markdown, for a terminal or a repository's page."""

import re
from collections.abc import Sequence

from mmbert.compare.report.document import HOW, Document, Example, Section
from mmbert.compare.report.outcomes import plain
from mmbert.compare.report.tables import Table

EXPLORATORY = "*Exploratory: no claim.*"


def render(document: Document) -> str:
    """The text of report.md; plots and images are named by their files."""
    lines = [f"# {escape(document.name)}: fusion strategies compared", "", f"**{escape(document.headline)}.**", ""]
    lines += [f"> {escape(text)}\n" for text in document.warnings]
    lines += [f"- {name}: {escape(value)}" for name, value in document.facts]
    for section in document.sections:
        lines += _section(section, document.exploratory)
    if document.examples:
        lines += ["", "## Where strategies disagree", ""]
        lines += [line for example in document.examples for line in _example(example)]
    lines += ["", "## How it was made", "", HOW, ""]
    lines.append(escape(document.options).replace("results.jsonl", "`results.jsonl`"))
    if document.command:
        lines += ["", *code(document.command)]
    return "\n".join(lines) + "\n"


def _section(section: Section, exploratory: bool) -> list[str]:
    lines = ["", f"## {escape(section.title)}", ""]
    lines += [f"- {escape(text)}" for text in section.text]
    for figure in section.figures:
        lines += ["", f"![{escape(figure.title)}](plots/{figure.name}.png)", "", escape(figure.caption)]
    for table in section.tables:
        lines += ["", f"**{escape(table.title)}**", *([EXPLORATORY] if exploratory else []), "", *_table(table)]
        lines += ["", escape(table.note)] if table.note else []
    return lines


def _table(table: Table) -> list[str]:
    ruler = ["---", *("---" if table.words or not table.of_strategies else "---:" for _ in table.head[1:])]
    return [_row(table.head), f"| {' | '.join(ruler)} |", *map(_row, table.rows)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(escape, cells))} |"


def _example(example: Example) -> list[str]:
    lines = [f"![image]({example.file})", ""] if example.file else ["*The image could not be read.*", ""]
    lines.append(f"- true: {escape(example.caption)}")
    if example.foil:
        lines.append(f"- foil{f' ({escape(example.category)})' if example.category else ''}: {escape(example.foil)}")
    lines += [f"- {escape(name)}: {escape(outcome_text(outcome))}" for name, outcome in example.outcomes.items()]
    return [*lines, ""]


def outcome_text(outcome: object) -> str:
    """Write whether a strategy was right on an example, or its answer."""
    return {True: "right", False: "wrong"}[outcome] if isinstance(outcome, bool) else str(outcome)


def escape(text: str) -> str:
    """Text that shows as it is: no markup, no HTML, no new cell or line."""
    text = plain(text)
    text = re.sub(r"[\\`*_{}\[\]#|~$]", r"\\\g<0>", text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def code(text: str) -> list[str]:
    """Lines of a block that ends at no backtick of `text`."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return [f"{fence}bash", *map(plain, text.splitlines()), fence]
