"""Draw explanations side by side: image, relevance of its patches, and relevance of the tokens."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mmbert.errors import printable
from mmbert.inference.explanation.explanation import METHOD_NAMES, Explanation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POSITIVE, NEGATIVE = "#c55300", "#0060a1"
WIDTH = 3.4
"""Inches for one explanation."""
BAR_HEIGHT = 0.22
"""Inches for one token."""


def draw(explanations: Sequence[Explanation], titles: Sequence[str] = ()) -> "Figure":
    """Draw one or more explanations, a column each.

    Args:
        explanations: At least one.
        titles: One for each; without them the fusion strategies.
    """
    from matplotlib.figure import Figure  # no pyplot: it is one state for the whole process

    titles = titles or [explanation.fusion for explanation in explanations]
    bars = max(2.0, BAR_HEIGHT * max(len(e.tokens) for e in explanations))
    figure = Figure(figsize=(WIDTH * len(explanations) + 0.2, WIDTH + bars), layout="constrained")
    grid = figure.subplots(2, len(explanations), squeeze=False, height_ratios=[WIDTH, bars])
    for explanation, title, (image, tokens) in zip(explanations, titles, grid.T, strict=True):
        heading = f"{title}\n{explanation.headline}\n{METHOD_NAMES[explanation.method]}"
        image.set_title(printable_lines(heading), fontsize=9, loc="left", parse_math=False)
        side = explanation.image.shape[0]
        image.imshow(explanation.image, extent=(0, side, side, 0))
        heat = scaled(explanation.patch_relevance)
        overlay = np.zeros((*heat.shape, 4))
        for sign, color in ((1, (197, 83, 0)), (-1, (0, 96, 161))):
            part = sign * heat > 0
            overlay[part, :3], overlay[part, 3] = np.array(color) / 255, 0.8 * np.abs(heat[part])
        image.imshow(overlay, extent=(0, side, side, 0), interpolation="nearest")
        image.set_axis_off()
        values = scaled(explanation.token_relevance)
        places = np.arange(len(values))
        tokens.barh(places, values, color=np.where(values >= 0, POSITIVE, NEGATIVE), height=0.7)
        tokens.set_yticks(places, [printable(token) for token in explanation.tokens], fontsize=8, parse_math=False)
        tokens.set_xlim(min(0, values.min() * 1.05), 1.05)
        tokens.set_ylim(len(values) - 0.5, -0.5)
        tokens.tick_params(axis="x", labelsize=7)
        tokens.set_xlabel("relevance / largest", fontsize=8)
        tokens.spines[["top", "right"]].set_visible(False)
    return figure


def scaled(values: np.ndarray) -> np.ndarray:
    """Divide by the largest absolute value; zeros stay zeros."""
    largest = np.abs(values).max(initial=0)
    return values / largest if largest > 0 else values


def printable_lines(text: str) -> str:
    """Escape control characters, but keep line breaks."""
    return "\n".join(map(printable, text.split("\n")))
