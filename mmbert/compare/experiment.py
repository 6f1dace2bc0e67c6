"""Run a comparison of fusion strategies from Python, as `mmbert compare` does."""

import html
import json
import logging
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mmbert.compare.folder import check_same_comparison, read_json
from mmbert.compare.plan import TOWERS, Comparison, load_comparison
from mmbert.compare.report import load_outcomes, write_report_again
from mmbert.compare.report.outcomes import measure_title, number
from mmbert.compare.report.summary import Summary, summarize
from mmbert.compare.report.tables import format_fraction
from mmbert.compare.report_inputs import write_report_inputs
from mmbert.compare.rows import Row, read_rows
from mmbert.compare.runner import run_arms
from mmbert.compare.specs import Settings
from mmbert.errors import UsageError
from mmbert.runtime.allowed_imports import allow_import as allow_modules
from mmbert.runtime.allowed_imports import allowed_imports

log = logging.getLogger("mmbert")


@dataclass(frozen=True)
class ComparisonResult:
    """Result of `mmbert.compare`.

    `repr` is a table of the primary results; notebooks show it as HTML.
    """

    folder: Path
    """Folder of the comparison: results.jsonl, items/, report.md, report.html, plots/."""
    comparison: Comparison
    """Options of the comparison."""
    rows: Mapping[str, Row]
    """Arm -> its row: "status", "results", "budget", "cost" ..."""
    report: Path
    """The HTML page of the report."""

    @property
    def failed(self) -> list[str]:
        """Names of the failed arms."""
        return [name for name, row in self.rows.items() if row["status"] == "failed"]

    @cached_property
    def summary(self) -> Summary:
        """Headline, test results and warnings of the report."""
        return summarize(load_outcomes(self.folder))

    def __repr__(self) -> str:
        cells = self._table()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
        return "\n".join([f"ComparisonResult: {self.folder}", *(line.rstrip() for line in lines)])

    def _repr_html_(self) -> str:
        head, *body = self._table()
        rows = [f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in body]
        return (
            f'<p><a href="{html.escape(str(self.report))}">{html.escape(str(self.report))}</a></p>'
            f"<table><tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in head)}</tr>{''.join(rows)}</table>"
        )

    def _table(self) -> list[list[str]]:
        """Arms x primary measures, with a head."""
        primary = self.comparison.primary
        values = {name: row.get("results") or {} for name, row in self.rows.items()}
        return [
            ["arm", "status", *map(measure_title, primary)],
            *(
                [
                    name,
                    row["status"],
                    *(format_fraction(number(values[name].get(measure))) for measure in primary),
                ]
                for name, row in self.rows.items()
            ),
        ]


def run_comparison(
    config: str | os.PathLike[str] | Mapping[str, Any],
    *,
    out: str | os.PathLike[str] | None = None,
    jobs: int = 1,
    changes: Mapping[str, Any] | Sequence[str] = (),
    exploratory: bool = False,
    rows_from: str | os.PathLike[str] | None = None,
    retry_failed: bool = False,
    report_only: bool = False,
    allow_import: Sequence[str] = (),
) -> ComparisonResult:
    """Compare fusion strategies with equal budgets and several seeds, and write the report.

    Each arm (strategy x seed) is trained in a separate process. Called again, finished arms are kept and others are
    resumed. Works in notebooks and outside the main thread.

    Args:
        config: YAML file, name of a preset such as "compare/quick", or a mapping with the options of
            `mmbert.compare.plan.Comparison`.
        out: Folder of the comparison; None: runs/compare/NAME.
        jobs: Arms that are trained at the same time.
        changes: Options that override `config`: {"seeds": [0, 1], "pretrain.steps": 200}, or ["seeds=[0, 1]"].
        exploratory: Allow one seed; the report then draws no conclusions.
        rows_from: Folder of another comparison, from which arms with the same options are imported.
        retry_failed: Run failed arms again, from their last checkpoint.
        report_only: Write the report from the rows of `out`, without any training.
        allow_import: Modules of yours that the configuration names classes of.

    Raises:
        UsageError: An option that is unknown or has a wrong value.
        DataError: Something is wrong with a file, or `out` holds another comparison.
        mmbert.compare.runner.ArmStoppedError: An arm was stopped by a signal.
    """
    allow_modules(*allow_import)
    if isinstance(changes, Mapping):
        changes = [f"{key}={json.dumps(value, default=os.fspath)}" for key, value in changes.items()]
    comparison = load_comparison(config, changes)
    folder = Path(out) if out is not None else Path("runs/compare") / comparison.name
    command = ""
    if not isinstance(config, Mapping):
        options: dict[str, Any] = {"-c": config, "--out": out, "--jobs": jobs if jobs != 1 else None}
        flags = [text for name, value in options.items() if value is not None for text in (name, str(value))]
        flags += [text for change in changes for text in ("--set", change)]
        flags += ["--exploratory"] * exploratory
        flags += [] if rows_from is None else ["--rows_from", os.fspath(rows_from)]
        flags += [text for module in allowed_imports() for text in ("--allow-import", module)]
        command = shlex.join(["mmbert", "compare", *flags])
    source = None if rows_from is None else Path(rows_from)
    settings = Settings(folder, jobs, exploratory, allowed_imports(), command, source, retry_failed)
    if report_only:
        rows = read_rows(folder)
        if not rows:
            raise UsageError(f"--report_only: {folder}/results.jsonl has no rows; run the comparison first.")
        check_same_comparison(comparison, settings, rows, foils_moved=True)
        write_report_inputs(comparison, settings._replace(command=_stored_command(folder) or command), rows)
    else:
        rows = run_arms(comparison, settings)
    rows = {name: row for name, row in rows.items() if row.get("strategy") != TOWERS}
    result = ComparisonResult(folder, comparison, rows, write_report_again(folder))
    log.info("report in %s", result.report)
    if result.failed:
        log.warning("%d of %d arms failed: %s", len(result.failed), len(rows), ", ".join(result.failed))
    return result


def _stored_command(folder: Path) -> str:
    """The command that trained the arms, which `report_only` does not replace."""
    return read_json(folder / "comparison.json").get("command", "")
