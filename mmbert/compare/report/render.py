"""Render a report as one HTML page and as Markdown with Jinja templates.

Every value of a template is a single printable line, escaped for its format, unless it is `Markup`.
"""

# ruff: noqa: S704 - Markup is only made of what this package draws or has escaped

import base64
import re
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader
from markupsafe import Markup, escape

from mmbert.compare.report.document import METHODS, Document, Example
from mmbert.compare.report.drawing import DARK, LIGHT, color_variable, inline_svg, marker_path
from mmbert.compare.report.outcomes import single_line
from mmbert.compare.report.tables import EMPTY

MAX_TABLE_ROWS = 20
"""Rows of a table; a longer one is collapsed on the page."""
FILES = files("mmbert.compare.report")


def render_html(document: Document) -> str:
    """Render report.html: one file without scripts or external resources, in light and dark mode."""
    light, dark = ("".join(f"--s{i}:{color};" for i, color in enumerate(colors)) for colors in (LIGHT, DARK))
    rules = FILES.joinpath("page.css").read_text(encoding="utf-8")
    style = f":root{{{light}}}\n@media (prefers-color-scheme: dark){{:root{{{dark}}}}}\n{rules}"
    positions = {name: i for i, name in enumerate(document.strategies)}
    values = {"style": Markup(style), "methods": METHODS, "max_rows": MAX_TABLE_ROWS, "empty": EMPTY}
    template = _environment(html=True).get_template("report.html.jinja")
    return template.render(document=document, positions=positions, **values)


def render_markdown(document: Document) -> str:
    """Render report.md; plots and images are links to their files."""
    return _environment(html=False).get_template("report.md.jinja").render(document=document, methods=METHODS)


def escape_markdown(text: str) -> str:
    """Escape a text for Markdown: no markup, no HTML, no new table cell or line."""
    text = re.sub(r"[\\`*_{}\[\]#|~$]", r"\\\g<0>", single_line(text))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def outcome_text(outcome: object) -> str:
    """Write whether a strategy was right on an example, or its answer."""
    return {True: "right", False: "wrong"}[outcome] if isinstance(outcome, bool) else str(outcome)


def _environment(*, html: bool) -> Environment:
    """Environment whose `finalize` makes every value a single line; Jinja escapes for HTML, `finalize` for Markdown."""

    def finalize(value: Any) -> Any:
        if isinstance(value, Markup):
            return value
        return single_line(str(value)) if html else escape_markdown(str(value))

    environment = Environment(
        autoescape=html,  # noqa: S701 - Markdown is escaped by `finalize`
        finalize=finalize,
        loader=FunctionLoader(lambda name: FILES.joinpath(name).read_text(encoding="utf-8")),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "cells": lambda cells: Markup(" | ".join(map(escape_markdown, cells))),
        "code_block": _code_block,
        "data_uri": _data_uri,
        "escape_markdown": escape_markdown,
        "outcome_text": outcome_text,
        "split_interval": _split_interval,
        "word_breaks": lambda name: Markup(re.sub(r"([_./])(?=\w)", r"\1<wbr>", str(escape(single_line(name))))),
        "code_lines": lambda text: Markup("\n").join(map(single_line, text.splitlines())),
    }
    environment.globals |= {
        "color_variable": color_variable,
        "inline_svg": lambda panel, key: Markup(inline_svg(panel, key)),
        "marker_path": marker_path,
    }
    return environment


def _code_block(text: str) -> Markup:
    """Fenced code block whose fence is longer than any sequence of backticks in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return Markup("\n".join([f"{fence}bash", *map(single_line, text.splitlines()), fence]))


def _data_uri(example: Example) -> str:
    return f"data:image/{example.file_type};base64,{base64.b64encode(example.image or b'').decode()}"


def _split_interval(cell: str) -> tuple[str, str]:
    """Split "0.612 (0.590 to 0.634)" into value and interval; the interval of other cells is empty."""
    value, _, interval = cell.partition(" (")
    return (value, interval[:-1]) if interval.endswith(")") else (cell, "")
