"""`Explanation`: relevance of every token and image patch, drawn as a figure or as an HTML page."""

import io
import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmbert.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHOD_NAMES = {
    "attention": "attention rule",
    "gradient": "gradient x input",
    "integrated_gradients": "integrated gradients",
}


@dataclass(frozen=True)
class Explanation:
    """Relevance of every token and image patch for one score of a model."""

    target: str
    """The score: "itm", "itc", "label 'red'" or "word 'red'"."""
    score: float
    """Probability, or cosine for itc."""
    kind: str
    """"probability" or "cosine"."""
    method: str
    """"attention": not negative; "gradient" or "integrated_gradients": negative where a part lowers the score."""
    text: str
    tokens: tuple[str, ...]
    """T tokens with [CLS] and [SEP], and [MASK] in place of a word to predict."""
    token_relevance: np.ndarray
    """(T,) float64."""
    patch_relevance: np.ndarray
    """(rows, columns) float64."""
    links: np.ndarray | None = field(repr=False)
    """(T, rows, columns) float64: change of the log-odds, log-probability or cosine that a token and a patch make
    together only; None: not computed."""
    image: np.ndarray = field(repr=False)
    """(S, S, 3) uint8, resized as the model reads it."""
    fusion: str

    def to_json(self) -> dict[str, Any]:
        """Convert everything but the image and the links to plain Python values."""
        return {
            "target": self.target,
            self.kind: self.score,
            "method": self.method,
            "fusion": self.fusion,
            "text": self.text,
            "tokens": [*self.tokens],
            "token_relevance": self.token_relevance.tolist(),
            "patch_relevance": self.patch_relevance.tolist(),
        }

    @property
    def headline(self) -> str:
        """The score in words: "itm: probability 0.947"."""
        return f"{self.target}: {self.kind} {self.score:.3f}"

    def show(self) -> "Figure":
        """Draw the image, the relevance of its patches over it, and the tokens; a notebook shows the figure."""
        from mmbert.inference.explanation.drawing import draw

        figure = draw([self])
        figure._repr_png_ = partial(_to_png, figure)  # pyright: ignore[reportAttributeAccessIssue] - as no pyplot is used
        return figure

    def save(self, path: str | Path) -> Path:
        """Write a figure (.png, .svg, .pdf), a page (.html), or the numbers (.json), by the ending of the path.

        The page is one file. Pointing at a token shows the patches that it depends on, and the other way round.

        Raises:
            UsageError: Another ending, or the folder does not exist.
        """
        file = Path(path)
        if file.suffix not in (".png", ".svg", ".pdf", ".html", ".json"):
            raise UsageError(f"'{path}': give a name that ends in .png, .svg, .pdf, .html or .json.")
        if not file.parent.is_dir():
            raise UsageError(f"'{path}': the folder '{file.parent}' does not exist.")
        if file.suffix == ".html":
            from mmbert.inference.explanation.page import render

            file.write_text(render(self), encoding="utf-8")
        elif file.suffix == ".json":
            file.write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")
        else:
            self.show().savefig(file, dpi=150)
        return file


def _to_png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()
