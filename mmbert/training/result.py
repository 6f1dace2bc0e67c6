"""What a training run returns to Python: its folder, metrics, per-item outcomes, model and curves."""

import html
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmbert.metrics.outcomes import ItemOutcomes
from mmbert.training.run_folder import curves_figure, metric_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mmbert.inference.loaded import LoadedModel


@dataclass
class RunResult:
    """Result of `mmbert.fit`.

    `repr` is a table of the metrics; notebooks show it as HTML.
    """

    folder: Path
    """The run's folder: config.yaml, metrics.json, checkpoints/, model/."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """The content of metrics.json: "test/itm_accuracy", "run/steps" ..."""
    outcomes: Mapping[str, Mapping[str, ItemOutcomes]] = field(default_factory=dict)
    """Test split -> metric -> outcome of each test item, which paired tests read."""

    @cached_property
    def model(self) -> "LoadedModel":
        """The saved model, loaded on first use: `run.model.match(image, texts)`."""
        from mmbert.inference.loaded import load

        return load(self.folder / "model")

    def curves(self) -> "Figure | None":
        """Losses and validation metrics over the steps; None if nothing was logged."""
        figure = curves_figure(self.folder)
        if figure is not None:  # without pyplot notebooks have no formatter for it
            figure._repr_png_ = partial(_to_png, figure)  # pyright: ignore[reportAttributeAccessIssue]
        return figure

    def __repr__(self) -> str:
        splits, rows = metric_rows(self.metrics)
        cells = [["metric", *splits], *rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in cells
        ]
        return "\n".join([f"RunResult: {self.folder}", *lines])

    def _repr_html_(self) -> str:
        splits, rows = metric_rows(self.metrics)
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in ["metric", *splits])
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        return f"<p>{html.escape(str(self.folder))}</p><table><tr>{head}</tr>{body}</table>"


def _to_png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()
