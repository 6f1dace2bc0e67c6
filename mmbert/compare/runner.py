"""Run the arms of a comparison, each in a separate process, and resume after a crash."""

import importlib.util
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mmbert.compare.folder import (
    check_same_comparison,
    import_rows,
    previous_primary,
    stored_budgets,
    valid_rows,
)
from mmbert.compare.plan import TOWERS, Comparison, list_arms
from mmbert.compare.report_inputs import write_report_inputs
from mmbert.compare.rows import Row, last_losses, write_rows
from mmbert.compare.specs import Settings, budget_inputs, describe_changes, overridden_options
from mmbert.compare.towers import restore_towers, tower_comparison, towers_in_use
from mmbert.data.prepare import prepare_missing
from mmbert.data.readers.base import ImageFolder
from mmbert.data.readers.foils import read_foils
from mmbert.errors import DataError, UsageError, did_you_mean
from mmbert.evaluation.foils import OVERALL
from mmbert.runtime.files import atomic_write_text
from mmbert.runtime.signals import EXIT_CODES
from mmbert.training.config_files import explicit_options
from mmbert.training.run_folder import versions
from mmbert.training.run_options import parse_run, to_arguments

log = logging.getLogger("mmbert")

GRACE_SECONDS = 30.0
"""Time that arms have to save a checkpoint and exit."""
Budgets = Mapping[str, Mapping[str, Any]]


class ArmStoppedError(RuntimeError):
    """An arm was stopped by a signal, so the comparison stops too; started again, it resumes.

    Args:
        arm: Name of the arm.
        exit_code: Exit code of its process, one of `EXIT_CODES`.
    """

    def __init__(self, arm: str, exit_code: int):
        super().__init__(f"{arm} was stopped by a signal (exit code {exit_code}); start the comparison again to resume")
        self.exit_code = exit_code


def run_arms(comparison: Comparison, settings: Settings) -> dict[str, Row]:
    """Train and evaluate every arm that has no row yet.

    Returns:
        Arm -> row, including failed arms; also in OUT/results.jsonl, in the order of the arms.

    Raises:
        UsageError: Only one seed, a folder that is a file, or another process that runs the same comparison.
        DataError: A row of another comparison, or the budgets could not be computed.
        ArmStoppedError: An arm received a signal.
    """
    comparison.check()
    if comparison.has_towers:
        tower_comparison(comparison)  # raises on a fine-tuning
    if comparison.min_seeds < 2 and not settings.exploratory:
        raise UsageError(
            f"seeds={comparison.seeds}: with one seed a difference between strategies can't be distinguished from one "
            "between seeds; use three or more seeds, or --exploratory, which marks every table."
        )
    if settings.jobs < 1:
        raise UsageError(f"--jobs {settings.jobs}: expected 1 or more.")
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"--out {settings.out}: expected a folder; this path, or a part of it, is a file.") from None
    lock = FileLock(settings.out / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UsageError(f"--out {settings.out}: another process runs a comparison in this folder.") from None
    try:
        return _run_arms(comparison, settings)
    finally:
        lock.release()


def _run_arms(comparison: Comparison, settings: Settings) -> dict[str, Row]:
    out = settings.out
    arms = list_arms(comparison)
    rows = valid_rows(settings)
    if any(arm.name not in rows for arm in arms):  # a finished comparison needs no data
        _prepare_data(comparison)
        _check_foil_categories(comparison)
    check_same_comparison(comparison, settings, rows)  # before anything is written
    for stage, options in overridden_options(comparison).items():
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        log.info(
            "%s: %s of %s is not used; a comparison sets it (seeds, fractions, steps, threads)",
            stage,
            given,
            comparison.runs[stage].run,
        )
    budgets = _compute_budgets(comparison, settings, rows)
    for name in comparison.names:
        log.info("%s: %s", name, budgets[name]["summary"])
    if comparison.has_towers:
        cost = budgets[TOWERS]["budget"]
        log.info(
            "towers of each seed: %s steps of %s fusion, %.3g training FLOPs, in no budget",
            f"{cost['steps']:,}", budgets[TOWERS]["differences"]["model.fusion"], cost["training_flops"],
        )  # fmt: skip
    specs = check_same_comparison(comparison, settings, rows)
    missing = [spec for name, spec in specs.items() if name not in rows]
    if settings.rows_from is not None and missing:
        imported = import_rows(settings.rows_from, missing)
        log.info("imported %d of %d missing arms from %s", len(imported), len(missing), settings.rows_from)
        rows |= imported
        write_rows(out, rows.values())
    before = len(rows)
    restore_towers(specs, rows, settings.rows_from)
    if len(rows) < before:
        write_rows(out, rows.values())
    used = towers_in_use(specs, rows)
    remaining = [
        specs[arm.name] for arm in arms if arm.name not in rows and (arm.strategy != TOWERS or arm.name in used)
    ]
    if len(remaining) < len(arms):
        log.info("%d of %d arms are finished already", len(arms) - len(remaining), len(arms))
    failed = [name for name in specs if rows.get(name, {}).get("status") == "failed"]
    if failed:
        log.warning("failed before, use --retry_failed to run again: %s", ", ".join(failed))
    order = [arm.name for arm in arms]
    shown = [name for name in order if name in rows or specs[name] in remaining]
    weights = {name: budgets[specs[name]["strategy"]]["weights"] for name in shown}
    for row in _finished_rows(remaining, rows, settings, weights):
        rows[row["arm"]] = row
        write_rows(out, [rows[name] for name in [*order, *(n for n in rows if n not in order)] if name in rows])
    write_report_inputs(comparison, settings, rows)
    return {name: rows[name] for name in order if name in rows}


def _prepare_data(comparison: Comparison) -> None:
    """Generate missing data sets that the configurations name by `data.prepare`, before parallel arms need them."""
    for stage in comparison.runs.values():
        arguments = to_arguments(stage.run, stage.options)
        if explicit_options(arguments).get("data.prepare") is not None:
            prepare_missing(parse_run(arguments).sections.data)


def _check_foil_categories(comparison: Comparison) -> None:
    """Raise on missing foil files or unknown categories before the training."""
    foils = comparison.foils
    if foils.files:
        found = read_foils([Path(file) for file in foils.files], ImageFolder(foils.images))
        known = [f"foils/{name}" for name in dict.fromkeys([OVERALL, *(foil.category for foil in found)])]
        for measure in comparison.primary:
            if measure.startswith("foils/") and measure not in known:
                hint = did_you_mean(measure, known)
                raise UsageError(f"primary: '{measure}' is not a category; allowed are {', '.join(known)}.{hint}")


def _compute_budgets(comparison: Comparison, settings: Settings, rows: Mapping[str, Row]) -> Budgets:
    """Compute the budgets of new strategies in a separate process, and store them in OUT/budgets.json.

    Raises:
        DataError: Something is wrong with the data.
        UsageError: A strategy can't be built.
    """
    inputs, stored = budget_inputs(comparison), stored_budgets(settings.out)
    changes = describe_changes(stored.get("budget_inputs", inputs), inputs)
    differences = {name: json.loads(json.dumps(comparison.strategy_options(name))) for name in comparison.names}
    known = {name: found["differences"] for name, found in stored.get("strategies", {}).items()}
    plan = {
        "comparison": asdict(comparison),
        "budget_inputs": inputs,
        "differences": differences,
        "allow_import": settings.allow_import,
        "command": settings.command,
        "primary_before": previous_primary(comparison, settings.out, rows),
    }
    atomic_write_text(settings.out / "plan.json", json.dumps(plan, indent=2) + "\n")
    if changes or any(known.get(name) != own for name, own in differences.items()):
        log.info("computing the budgets: cost of a training step of each strategy")
        command = [sys.executable, "-m", "mmbert.compare.calibration", str(settings.out)]
        environment = _environment(comparison.threads)
        done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, errors="replace")  # noqa: S603
        if done.returncode == 2:
            raise UsageError(_last_error(done.stderr))
        if done.returncode:
            raise DataError(f"computing the budgets failed: {_last_error(done.stderr)}")
        stored = stored_budgets(settings.out)
    return stored["strategies"]


def _environment(threads: int) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}


def _finished_rows(
    specs: Sequence[Mapping[str, Any]], rows: Mapping[str, Row], settings: Settings, weights: Mapping[str, Any]
) -> Iterator[Row]:
    """Run arms, at most `jobs` at once, and yield each row when its arm is finished.

    An arm that starts from towers waits for them, and fails if they fail.

    Args:
        specs: Specifications of the arms to run.
        rows: Rows of the finished arms.
        settings: Number of parallel arms.
        weights: Arm -> stage -> training FLOPs, for the progress bar.
    """
    waiting = [*specs]
    finished = dict(rows)
    reached: dict[str, int] = {}
    running: dict[subprocess.Popen[bytes], Mapping[str, Any]] = {}
    total = sum(sum(stages.values()) for stages in weights.values())
    done = sum(sum(weights[name].values()) for name in weights if name in rows)
    try:
        with _progress_bar() as bar:
            task = bar.add_task("arms", total=total, completed=done, arms=f"{len(rows)}/{len(weights)}")
            while waiting or running:
                for spec in [spec for spec in waiting if _towers_status(spec, finished) == "failed"]:
                    waiting.remove(spec)
                    row = finished[spec["arm"]] = _row_without_towers(spec, finished[spec[TOWERS]])
                    done += sum(weights[spec["arm"]].values())
                    _log_row(row)
                    yield row
                for spec in [spec for spec in waiting if _towers_status(spec, finished) == "done"]:
                    if len(running) < settings.jobs:
                        waiting.remove(spec)
                        running[_start_arm(spec)] = spec
                time.sleep(0.2)
                for process in [p for p in running if p.poll() is not None]:
                    spec = running.pop(process)
                    if process.returncode in EXIT_CODES.values():
                        raise ArmStoppedError(spec["arm"], process.returncode)
                    if process.returncode < 0 and last_step(spec) > reached.get(spec["arm"], 0):
                        reached[spec["arm"]] = last_step(spec)
                        log.warning("%s was killed by signal %d and is resumed", spec["arm"], -process.returncode)
                        waiting.insert(0, spec)
                        continue
                    row = finished[spec["arm"]] = _read_row(spec, process.returncode)
                    done += sum(weights[spec["arm"]].values())
                    _log_row(row)
                    yield row
                now = done + sum(_progress(spec, weights[spec["arm"]]) for spec in running.values())
                count = len(weights) - len(waiting) - len(running)
                bar.update(task, completed=now, arms=f"{count}/{len(weights)}")
    finally:
        _terminate(running)


def _progress_bar() -> Progress:
    columns = (
        TextColumn("[progress.description]{task.fields[arms]} arms"),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    notebook = console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None
    return Progress(*columns, console=console, disable=not (notebook or sys.stderr.isatty()))


def _start_arm(spec: Mapping[str, Any]) -> "subprocess.Popen[bytes]":
    folder = Path(spec["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(folder / "arm.json", json.dumps(spec, indent=2) + "\n")
    with (folder / "log.txt").open("ab") as file:
        return subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", "mmbert.compare.arm", str(folder / "arm.json"), str(os.getpid())],
            env=_environment(spec["threads"]),
            stdout=file,
            stderr=file,
        )


def last_step(spec: Mapping[str, Any]) -> int:
    """Optimizer steps that an arm has taken in all stages; killed again without a further step, it has failed."""
    return sum(last_losses(Path(spec["folder"]) / stage / "trace.csv")[0] for stage in spec["stages"])


def _progress(spec: Mapping[str, Any], weights: Mapping[str, float]) -> float:
    """Finished part of an arm's training, in the unit of its weights."""
    done = 0.0
    for stage, weight in weights.items():
        steps = spec["stages"][stage]["options"]["trainer.max_steps"]
        done += weight * min(1.0, last_losses(Path(spec["folder"]) / stage / "trace.csv")[0] / steps)
    return done


def _read_row(spec: Mapping[str, Any], code: int) -> Row:
    """Read the row of a finished arm, or describe the failure in a row."""
    folder = Path(spec["folder"])
    file = folder / "row.json"
    if code == 0 and file.is_file():
        for checkpoint in folder.glob("*/checkpoints/*.ckpt*"):
            checkpoint.unlink()  # a finished arm is never resumed; its model and logs stay
        return json.loads(file.read_text(encoding="utf-8"))
    stage = next((s for s in spec["stages"] if not (folder / s / "metrics.json").is_file()), "evaluation")
    step, losses = last_losses(folder / stage / "trace.csv")
    message = _last_error((folder / "log.txt").read_text(encoding="utf-8", errors="replace"))
    if code < 0:
        message = f"killed by signal {-code}" + (" (out of memory?)" if code == -9 else "")
    return _failed_row(spec, stage=stage, step=step, message=message, last_losses=losses, exit_code=code)


def _failed_row(spec: Mapping[str, Any], **failure: Any) -> Row:
    return {
        **{key: spec[key] for key in ("arm", "strategy", "seed", "fraction", "exploratory", "budget", "config")},
        "status": "failed",
        "versions": {k.removeprefix("run/version/"): v for k, v in versions().items()},
        "failure": failure,
    }


def _towers_status(spec: Mapping[str, Any], finished: Mapping[str, Row]) -> str:
    """Status of the towers that an arm starts from: done, failed or waiting; done if it needs none."""
    if TOWERS not in spec:
        return "done"
    return finished[spec[TOWERS]]["status"] if spec[TOWERS] in finished else "waiting"


def _row_without_towers(spec: Mapping[str, Any], towers: Row) -> Row:
    """Row of an arm that was not started, because its towers failed."""
    message = f"the towers that it starts from failed: {towers['arm']}, {towers['failure']['message']}"
    return _failed_row(spec, stage=TOWERS, step=0, message=message, last_losses=[], exit_code=None)


def _last_error(log_text: str) -> str:
    """Last error message in the output of a process."""
    lines = [line for line in log_text.strip().splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return ((errors or lines or ["no output"])[-1]).removeprefix("mmbert: error: ").strip()


def _log_row(row: Row) -> None:
    if row["status"] == "failed":
        failure = row["failure"]
        log.warning("%s failed in %s at step %d: %s", row["arm"], failure["stage"], failure["step"], failure["message"])
        return
    log.info("%s: done in %.1f minutes", row["arm"], row["cost"]["wall_seconds"] / 60)


def _terminate(running: Mapping["subprocess.Popen[bytes]", Mapping[str, Any]]) -> None:
    """Terminate arms, which save a checkpoint first, and kill them after `GRACE_SECONDS`."""
    for process in running:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for process in running:
        try:
            process.wait(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
