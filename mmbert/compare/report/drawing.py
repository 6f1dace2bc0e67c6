"""Style and output of plots: colors of strategies, PNG and SVG files, inline SVG for the page."""

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

from mmbert.compare.report.outcomes import single_line

# Distinguishable with any kind of color vision, with a contrast of at least 4.5:1 to the background: the hues of Okabe
# & Ito, adjusted for that, a purple and a red. From the ninth strategy on only markers and dashes differ.
LIGHT = ("#0060a1", "#c55300", "#128561", "#b84c8c", "#6a4900", "#4b5764", "#7a2fe0", "#6b1022")
DARK = ("#82b4e8", "#f88e52", "#35c79d", "#c979a9", "#e9cc48", "#bbc8d8", "#a376ff", "#f05665")
MARKERS = ("o", "s", "D", "^", "v", "P", "p", "<", ">", "h", "*", "d")
DASHES = ("-", (0, (5, 1.6)), (0, (1.5, 1.5)))

INK, MUTED, GRID, PAPER = "#1b2129", "#59636f", "#dce1e7", "#fffffe"
SURFACES = {INK: "--ink", MUTED: "--muted", GRID: "--line", PAPER: "--card"}
"""Color in a plot -> CSS variable of the page, which has another value in dark mode."""

WIDTH = 3.5
"""Width of a panel in inches: at 72 points per inch as wide as a phone."""

STYLE = {
    "svg.fonttype": "none",  # text stays text: smaller, and accessible
    "svg.hashsalt": "mmbert",  # reproducible bytes
    "text.parse_math": False,  # names may contain a dollar sign
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
    """One pair of axes of a figure."""

    title: str
    draw: Callable[[Axes], None]
    height: float  # inches


class Figure(NamedTuple):
    """Figure of several panels; `name` is that of its files, `legend` whether it needs a legend of the strategies."""

    name: str
    title: str
    caption: str
    panels: list[Panel]
    legend: bool


@contextmanager
def _style() -> Iterator[None]:
    with rc_context(STYLE), warnings.catch_warnings():  # type: ignore[arg-type]
        # A PNG has boxes for glyphs that the font lacks; an SVG is drawn with the fonts of the reader.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


class LineStyle(NamedTuple):
    """Color, marker and dashes of a strategy in all plots."""

    color: str  # in light mode
    marker: str
    dashes: Any  # matplotlib's linestyle


def line_style(position: int) -> LineStyle:
    """Style of the strategy at a position of the comparison."""
    dashes = DASHES[position // len(LIGHT) % len(DASHES)]
    return LineStyle(LIGHT[position % len(LIGHT)], MARKERS[position % len(MARKERS)], dashes)


def color_variable(position: int) -> str:
    """CSS variable of a strategy's color."""
    return f"--s{position % len(LIGHT)}"


def marker_path(position: int) -> str:
    """Marker of a strategy as an SVG path within -1.2 to 1.2."""
    marker = MarkerStyle(line_style(position).marker)
    path = marker.get_path().transformed(marker.get_transform())
    scale = 1 / abs(path.get_extents().get_points()).max()
    outlines = [[f"{scale * x:.2f} {-scale * y:.2f}" for x, y in np.asarray(polygon)] for polygon in path.to_polygons()]
    return "".join(f"M{' L'.join(outline)}Z" for outline in outlines)


def shorten(name: str, limit: int) -> str:
    """Replace the middle of a name that is too long for an axis by an ellipsis."""
    name = single_line(name)
    if len(name) <= limit:
        return name
    return f"{name[: (limit - 1) // 2]}…{name[-(limit - 1 - (limit - 1) // 2) :]}"


def save_figure(figure: Figure, strategies: Iterable[str], folder: Path) -> list[Path]:
    """Write all panels of a figure to `folder`/NAME.png and .svg, in up to three columns."""
    columns = min(3, len(figure.panels))
    lines = [figure.panels[i : i + columns] for i in range(0, len(figure.panels), columns)]
    heights = [max(panel.height for panel in line) + 0.25 for line in lines]
    with _style():
        # The space is for names that start with "_", which matplotlib would skip.
        legend = [
            Line2D([], [], color=c, marker=m, linestyle=dashes, label=f" {shorten(name, 30)}")
            for name, (c, m, dashes) in ((name, line_style(i)) for i, name in enumerate(strategies))
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


def inline_svg(panel: Panel, key: str) -> str:
    """Draw a panel as an SVG element for the page, with CSS variables as colors and no external resources.

    Args:
        panel: Panel to draw; its title becomes the label for screen readers.
        key: Prefix that makes the ids in it unique on the page.
    """
    with _style():
        canvas = Canvas(figsize=(WIDTH, panel.height), layout="constrained")
        axes = canvas.subplots()
        panel.draw(axes)
        written = BytesIO()
        canvas.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_page(written.getvalue().decode(), key, panel.title)


def _for_page(svg: str, key: str, panel_title: str) -> str:
    # No text of the data can contain a "<", so these match elements of matplotlib only.
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.S)
    body = svg[svg.index(">") + 1 :]
    box = re.search(r'viewBox="([\d. ]+)"', svg)
    assert box is not None, "matplotlib writes a viewBox"
    body = re.sub(r"\s*<defs>\s*<style.*?</style>\s*</defs>", "", body, flags=re.S)  # it would apply to the whole page
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
    """Replace colors of a style attribute by CSS variables, and its fonts by those of the page."""
    style = match[0]
    for i, color in enumerate(LIGHT):
        style = style.replace(color, f"var(--s{i})")
    for color, name in SURFACES.items():
        style = style.replace(color, f"var({name})")
    return re.sub(r"('DejaVu Sans'[^;\"]*)", FONTS, style)
