"""`mmbert compare`: fusion strategies against each other, with equal budgets, several seeds, and a report."""

import argparse
import logging
import shlex
import sys
from pathlib import Path

from mmbert.cli.command_line import add_allow_import
from mmbert.errors import UsageError
from mmbert.runtime.allowed_imports import allowed_imports

log = logging.getLogger("mmbert")


def add_options(command: argparse.ArgumentParser) -> None:
    """Adds what may follow `mmbert compare`."""
    command.description = (
        "Trains every strategy with every seed under one budget, judges them, and writes report.md, report.html, "
        "results.jsonl and plots. Started again it goes on where it was."
    )
    command.set_defaults(run=_compare)
    command.add_argument("-c", "--config", metavar="FILE", required=True, help="What is compared: configs/compare/.")
    command.add_argument("--out", metavar="DIR", help="Where everything goes: runs/compare/NAME by default.")
    command.add_argument("--jobs", type=int, default=1, help="Arms that are trained at the same time.")
    command.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], dest="changes",
                         help="Changes the file's, --set seeds=[0,1] --set pretrain.steps=200.")  # fmt: skip
    command.add_argument("--exploratory", action="store_true",
                         help="Allow one seed; no difference is claimed and every table is marked.")  # fmt: skip
    command.add_argument("--rows_from", metavar="DIR", type=Path,
                         help="Take the arms from another comparison's folder that are the same there.")  # fmt: skip
    command.add_argument("--retry_failed", action="store_true",
                         help="Try arms again that failed; they go on from their last checkpoint.")  # fmt: skip
    command.add_argument("--report_only", action="store_true", help="Write the report anew from what is there.")
    add_allow_import(command)


def _compare(
    *,
    config: str,
    out: str | None,
    jobs: int,
    changes: list[str],
    exploratory: bool,
    rows_from: Path | None,
    retry_failed: bool,
    report_only: bool,
) -> int:
    # Here, or every small command would wait for Lightning and matplotlib.
    from mmbert.compare.folder import check_same_comparison
    from mmbert.compare.plan import load_comparison
    from mmbert.compare.report import report_from
    from mmbert.compare.rows import read_rows
    from mmbert.compare.runner import log_report, run_comparison
    from mmbert.compare.specs import Settings

    comparison = load_comparison(config, changes)
    folder = Path(out) if out is not None else Path("runs/compare") / comparison.name
    command = shlex.join(["mmbert", *(a for a in sys.argv[1:] if a not in ("--report_only", "--retry_failed"))])
    settings = Settings(folder, jobs, exploratory, allowed_imports(), command, rows_from, retry_failed)
    if report_only:
        rows = read_rows(folder)
        if not rows:
            raise UsageError(f"--report_only: {folder}/results.jsonl has no row; compare first.")
        check_same_comparison(comparison, settings, rows, foils_moved=True)
        log_report(comparison, settings, rows)
    else:
        rows = run_comparison(comparison, settings)
    log.info("report in %s", report_from(folder))
    failed = [name for name, row in rows.items() if row["status"] == "failed"]
    if failed:
        log.warning("%d of %d arms failed: %s", len(failed), len(rows), ", ".join(failed))
    return 1 if rows and len(failed) == len(rows) else 0
