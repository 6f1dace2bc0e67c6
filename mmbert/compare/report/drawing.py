"""How plots look and become bytes: colours of strategies, PNG and SVG files, SVG inside a page."""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.markers import MarkerStyle

from mmbert.compare.report.outcomes import plain

# Told apart with any kind of colour vision, and at least 4.5:1 against the paper: Okabe & Ito's hues, moved as far as
# that takes, with a purple and a red beside them. From the ninth strategy on only the sign and the dashes tell.
LIGHT = ("#0060a1", "#c55300", "#128561", "#b84c8c", "#6a4900", "#4b5764", "#7a2fe0", "#6b1022")
DARK = ("#82b4e8", "#f88e52", "#35c79d", "#c979a9", "#e9cc48", "#bbc8d8", "#a376ff", "#f05665")
MARKERS = ("o", "s", "D", "^", "v", "P", "p", "<", ">", "h", "*", "d")
DASHES = ("-", (0, (5, 1.6)), (0, (1.5, 1.5)))

INK, MUTED, GRID, PAPER = "#1b2129", "#59636f", "#dce1e7", "#fffffe"
SURFACES = {INK: "--ink", MUTED: "--muted", GRID: "--line", PAPER: "--card"}
"""Colour in a plot -> the page's name for it, which is another colour on dark screens."""

WIDTH = 3.5
"""Inches of a panel: at 72 points an inch as wide as a phone."""

STYLE = {
    "svg.fonttype": "none",  # text stays text: small, and read aloud
    "svg.hashsalt": "mmbert",  # the same plot gives the same bytes
    "text.parse_math": False,  # a name may hold a dollar
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.labelsize": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.unicode_minus": True,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8.5,
}
FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'Noto Sans', 'DejaVu Sans', sans-serif"


class Panel(NamedTuple):
    """One pair of axes."""

    title: str
    draw: Callable[[Axes], None]
    height: float  # inches


class Figure(NamedTuple):
    """Panels that belong together; `name` is the file's, `legend` tells whether it needs the strategies' signs."""

    name: str
    title: str
    caption: str
    panels: list[Panel]
    legend: bool


@contextmanager
def _style() -> Iterator[None]:
    with rc_context(STYLE), warnings.catch_warnings():  # type: ignore[arg-type]
        # A PNG shows boxes for letters that its font lacks; an SVG leaves letters to the reader's fonts.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


class Look(NamedTuple):
    """How a strategy is drawn, everywhere."""

    colour: str  # on light paper
    marker: str
    dashes: Any  # matplotlib's linestyle


def look(position: int) -> Look:
    """Of the strategy at `position` of the comparison."""
    dashes = DASHES[position // len(LIGHT) % len(DASHES)]
    return Look(LIGHT[position % len(LIGHT)], MARKERS[position % len(MARKERS)], dashes)


def variable(position: int) -> str:
    """The page's name for a strategy's colour."""
    return f"--s{position % len(LIGHT)}"


def sign(position: int) -> str:
    """A strategy's marker as an SVG path inside -1.2 to 1.2."""
    marker = MarkerStyle(look(position).marker)
    path = marker.get_path().transformed(marker.get_transform())
    scale = 1 / abs(path.get_extents().get_points()).max()
    outlines = [[f"{scale * x:.2f} {-scale * y:.2f}" for x, y in np.asarray(polygon)] for polygon in path.to_polygons()]
    return "".join(f"M{' L'.join(outline)}Z" for outline in outlines)


def shorten(name: str, limit: int) -> str:
    """`name` with its middle left out where it is too long for an axis."""
    name = plain(name)
    if len(name) <= limit:
        return name
    return f"{name[: (limit - 1) // 2]}…{name[-(limit - 1 - (limit - 1) // 2) :]}"


def save(figure: Figure, strategies: Iterable[str], folder: Path) -> list[Path]:
    """Writes all panels of a figure to `folder`/NAME.png and .svg, in up to three columns."""
    columns = min(3, len(figure.panels))
    lines = [figure.panels[i : i + columns] for i in range(0, len(figure.panels), columns)]
    heights = [max(panel.height for panel in line) + 0.25 for line in lines]
    with _style():
        # A label that starts with "_" would be left out.
        legend = [
            Line2D([], [], color=c, marker=m, linestyle=dashes, label=f" {shorten(name, 30)}")
            for name, (c, m, dashes) in ((name, look(i)) for i, name in enumerate(strategies))
        ]
        across = max(1, int(columns * WIDTH / 1.6)) if figure.legend else 1
        legend_height = 0.1 + 0.22 * -(-len(legend) // across) if figure.legend else 0
        canvas = Canvas(figsize=(columns * WIDTH, sum(heights) + legend_height), layout="constrained")
        canvas.set_facecolor("white")
        axes = canvas.subplots(len(lines), columns, squeeze=False, gridspec_kw={"height_ratios": heights})
        for axis in axes.flat[len(figure.panels) :]:
            axis.set_axis_off()
        for axis, panel in zip(axes.flat, figure.panels, strict=False):
            panel.draw(axis)
            axis.set_title(shorten(panel.title, 44))
        if figure.legend:
            canvas.legend(handles=legend, loc="outside lower left", ncols=across, frameon=False, fontsize=8.5)
        files = [folder / f"{figure.name}.png", folder / f"{figure.name}.svg"]
        canvas.savefig(files[0], dpi=144, metadata={"Software": None})
        canvas.savefig(files[1], metadata={"Date": None, "Creator": None})
    return files


def inline(panel: Panel, key: str) -> str:
    """One panel as an SVG element for the page: its colours, its fonts, nothing from outside.

    Args:
        panel: What to draw; its title is for those who listen, the page shows it.
        key: Makes the identifiers in it unique on the page.
    """
    with _style():
        canvas = Canvas(figsize=(WIDTH, panel.height), layout="constrained")
        axes = canvas.subplots()
        panel.draw(axes)
        written = BytesIO()
        canvas.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_page(written.getvalue().decode(), key, panel.title)


def _for_page(svg: str, key: str, panel_title: str) -> str:
    # No text of the data can hold a "<", so that these find matplotlib's own elements only.
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.S)
    body = svg[svg.index(">") + 1 :]
    box = re.search(r'viewBox="([\d. ]+)"', svg)
    assert box is not None, "matplotlib writes a viewBox"
    body = re.sub(r"\s*<defs>\s*<style.*?</style>\s*</defs>", "", body, flags=re.S)  # it would rule the whole page
    body = re.sub(r'xlink:href="#', 'href="#', body)
    used = set(re.findall(r'href="#([^"]+)"', body)) | set(re.findall(r"url\(#([^)]+)\)", body))
    body = re.sub(r'(<[^<>]*?) id="([^"]+)"', lambda m: _identifier(m, used, key), body)
    body = re.sub(r'href="#', f'href="#{key}-', body)
    body = re.sub(r"url\(#", f"url(#{key}-", body)
    body = re.sub(r'style="[^"]*"', _themed, body)
    return f'<svg viewBox="{box[1]}" role="img" aria-label="{escape(panel_title)}">{body}'.strip()


def _identifier(match: re.Match[str], used: set[str], key: str) -> str:
    return f'{match[1]} id="{key}-{match[2]}"' if match[2] in used else match[1]


def _themed(match: re.Match[str]) -> str:
    """Colours of one style attribute by the page's names, and its fonts."""
    style = match[0]
    for i, colour in enumerate(LIGHT):
        style = style.replace(colour, f"var(--s{i})")
    for colour, name in SURFACES.items():
        style = style.replace(colour, f"var({name})")
    return re.sub(r"('DejaVu Sans'[^;\"]*)", FONTS, style)
