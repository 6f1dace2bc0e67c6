"""A report as one HTML file that needs nothing else: plots and images inside, no scripts, light and dark."""

import base64
import html
import re
from importlib.resources import files

from mmbert.compare.report.document import HOW, Document, Example, Section
from mmbert.compare.report.drawing import DARK, LIGHT, inline, sign, variable
from mmbert.compare.report.markdown import outcome_text
from mmbert.compare.report.outcomes import plain
from mmbert.compare.report.plots import Figure
from mmbert.compare.report.tables import NOTHING, Table

LONGEST_TABLE = 20
"""Rows; a longer one is folded."""


def render(document: Document) -> str:
    """The text of report.html."""
    signs = {name: i for i, name in enumerate(document.strategies)}
    parts = [_header(document, signs)]
    for number, section in enumerate(document.sections):
        parts.append(_section(section, signs, document.exploratory, f"p{number}"))
    if document.examples:
        cards = "".join(_example(example, signs) for example in document.examples)
        parts.append(f'<section><h2>Where strategies disagree</h2><div class="cards">{cards}</div></section>')
    command = f"<pre tabindex=0>{_text_lines(document.command)}</pre>" if document.command else ""
    options = escape(document.options).replace("results.jsonl", "<code>results.jsonl</code>")
    parts.append(f"<section><h2>How it was made</h2><p>{escape(HOW)}</p>{command}<p>{options}</p></section>")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        # Nothing is fetched and nothing runs, whatever the data hold.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{escape(document.name)}: fusion strategies compared'
        f"</title>\n<style>\n{_style()}</style>\n</head>\n<body>\n<main>\n" + "\n".join(parts) + "\n</main>\n</body>\n"
        "</html>\n"
    )


def _style() -> str:
    light = "".join(f"--s{i}:{colour};" for i, colour in enumerate(LIGHT))
    dark = "".join(f"--s{i}:{colour};" for i, colour in enumerate(DARK))
    rules = files("mmbert.compare.report").joinpath("page.css").read_text()
    return f":root{{{light}}}\n@media (prefers-color-scheme: dark){{:root{{{dark}}}}}\n{rules}"


def _header(document: Document, signs: dict[str, int]) -> str:
    facts = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in document.facts
                    if name != "Strategies")  # fmt: skip
    warnings = "".join(f"<p>{escape(text)}</p>" for text in document.warnings)
    return (
        f'<header><p class="kicker">Fusion strategies compared: {escape(document.name)}</p>'
        f"<h1>{escape(document.headline)}</h1>{_legend(signs)}"
        + (f'<div class="warnings" role="note">{warnings}</div>' if warnings else "")
        + f"<dl>{facts}</dl></header>"
    )


def _section(section: Section, signs: dict[str, int], exploratory: bool, key: str) -> str:
    parts = [f"<section><h2>{escape(section.title)}</h2>"]
    if section.text:
        parts.append(f'<ul class="verdicts">{"".join(f"<li>{escape(text)}</li>" for text in section.text)}</ul>')
    parts += [_figure(figure, signs, f"{key}f{i}") for i, figure in enumerate(section.figures)]
    parts += [_table(table, signs, exploratory) for table in section.tables]
    return "".join(parts) + "</section>"


def _figure(figure: Figure, signs: dict[str, int], key: str) -> str:
    panels = "".join(
        f'<figure class="panel"><figcaption>{escape(panel.title)}</figcaption>{inline(panel, f"{key}-{i}")}</figure>'
        for i, panel in enumerate(figure.panels)
    )
    legend = _legend(signs) if figure.legend else ""
    caption = f'<p class="caption">{escape(figure.caption)}</p>'
    return f'<div class="figure">{legend}<div class="panels">{panels}</div>{caption}</div>'


def _table(table: Table, signs: dict[str, int], exploratory: bool) -> str:
    mark = ' <em class="mark">exploratory: no claim</em>' if exploratory else ""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.head)
    rows = "".join(_row(row, signs if table.of_strategies else {}) for row in table.rows)
    kind = "words" if table.words or not table.of_strategies else "numbers"
    body = (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(table.title)}">'
        f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )
    body += f'<p class="caption">{escape(table.note)}</p>' if table.note else ""
    name = f"{escape(table.title)}{mark}"
    if len(table.rows) > LONGEST_TABLE:
        return f'<details class="table"><summary>{name}: {len(table.rows)} rows</summary>{body}</details>'
    return f'<div class="table"><p class="title">{name}</p>{body}</div>'


def _row(row: list[str], signs: dict[str, int]) -> str:
    first = _name(row[0], signs) if row[0] in signs else escape(row[0])
    cells = [_cell(cell) if signs else f"<td>{escape(cell)}</td>" for cell in row[1:]]
    return f'<tr><th scope="row">{first}</th>{"".join(cells)}</tr>'


def _cell(text: str) -> str:
    value, space, interval = text.partition(" (")
    if space and interval.endswith(")"):  # the interval steps back behind its value
        return f'<td>{escape(value)} <span class="interval">{escape(interval[:-1])}</span></td>'
    return f'<td class="nothing">{NOTHING}</td>' if text == NOTHING else f"<td>{escape(text)}</td>"


def _legend(signs: dict[str, int]) -> str:
    return f'<ul class="legend">{"".join(f"<li>{_name(name, signs)}</li>" for name in signs)}</ul>'


def _name(name: str, signs: dict[str, int]) -> str:
    colour = variable(signs[name])
    words = re.sub(r"([_./])(?=\w)", r"\1<wbr>", escape(name))  # where a narrow column may part it
    return (
        f'<span class="name"><svg class="sign" viewBox="-1.3 -1.3 2.6 2.6" aria-hidden="true">'
        f'<path d="{sign(signs[name])}" style="fill:var({colour})"/></svg><span>{words}</span></span>'
    )


def _example(example: Example, signs: dict[str, int]) -> str:
    image = '<div class="missing">The image could not be read.</div>'
    if example.image is not None:
        content = base64.b64encode(example.image).decode()
        image = f'<img alt="" src="data:image/{example.kind};base64,{content}">'
    foil = f'<p><span class="tag">foil</span> {escape(example.foil)}</p>' if example.foil else ""
    outcomes = "".join(
        f'<li class="{outcome_text(answer) if isinstance(answer, bool) else "answer"}">'
        f"{_name(name, signs) if name in signs else escape(name)} <b>{escape(outcome_text(answer))}</b></li>"
        for name, answer in example.outcomes.items()
    )
    category = f'<p class="kicker">{escape(example.category.replace("_", " "))}</p>' if example.category else ""
    return (
        f'<article>{image}<div class="what">{category}<p><span class="tag">true</span> {escape(example.caption)}</p>'
        f"{foil}<ul>{outcomes}</ul></div></article>"
    )


def escape(text: str) -> str:
    """Text that shows as it is, as content or inside quotes."""
    return html.escape(plain(text))


def _text_lines(text: str) -> str:
    return "\n".join(html.escape(plain(line)) for line in text.splitlines())
