"""`mmbert compare`: compare fusion strategies with equal budgets and several seeds, and write a report."""

import argparse
from pathlib import Path

from mmbert.cli.command_line import add_allow_import


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `mmbert compare`."""
    command.description = (
        "Trains every strategy with every seed under equal budgets, evaluates the models on the same test items, and "
        "writes report.md, report.html, results.jsonl and plots. Started again, it resumes."
    )
    command.set_defaults(run=_compare)
    command.add_argument("-c", "--config", metavar="FILE", required=True,
                         help="YAML file of the comparison, or a preset such as compare/quick.")  # fmt: skip
    command.add_argument("--out", metavar="DIR", help="Folder of the comparison; runs/compare/NAME by default.")
    command.add_argument("--jobs", type=int, default=1, help="Arms that are trained at the same time.")
    command.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], dest="changes",
                         help="Override an option: --set seeds=[0,1] --set pretrain.steps=200.")  # fmt: skip
    command.add_argument("--exploratory", action="store_true",
                         help="Allow one seed; the report draws no conclusions.")  # fmt: skip
    command.add_argument("--rows_from", metavar="DIR", type=Path,
                         help="Import arms with equal options from another comparison's folder.")  # fmt: skip
    command.add_argument("--retry_failed", action="store_true",
                         help="Run failed arms again, from their last checkpoint.")  # fmt: skip
    command.add_argument("--report_only", action="store_true", help="Write the report again, without any training.")
    add_allow_import(command)


def _compare(**options: object) -> int:
    # Imported here, as every command would otherwise wait for torch and matplotlib.
    from mmbert.compare.experiment import run_comparison
    from mmbert.compare.runner import ArmStoppedError

    try:
        result = run_comparison(**options)  # pyright: ignore[reportArgumentType] - argparse checked them
    except ArmStoppedError as stopped:
        raise SystemExit(stopped.exit_code) from None
    return 1 if result.rows and len(result.failed) == len(result.rows) else 0
