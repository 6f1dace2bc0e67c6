"""Runs the arms of a comparison, each in a process of its own, and goes on where it was killed."""

import fcntl
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mmbert.compare.budget import RULES
from mmbert.compare.examples import examples
from mmbert.compare.folder import (
    check_same_comparison,
    import_rows,
    primary_before,
    rows_that_count,
    stored_budgets,
)
from mmbert.compare.plan import Comparison, arms_of
from mmbert.compare.rows import Row, last_losses, write_rows
from mmbert.compare.specs import Settings, budget_inputs, describe_changes
from mmbert.data.readers.base import ImageFolder
from mmbert.data.readers.foils import read_foils
from mmbert.errors import DataError, UsageError, did_you_mean
from mmbert.evaluation.foils import OVERALL
from mmbert.runtime.files import atomic_write_text
from mmbert.runtime.signals import EXIT_CODES
from mmbert.training.run_folder import versions

log = logging.getLogger("mmbert")

GRACE_SECONDS = 30.0
"""How long arms may take to save and stop."""
Calibration = Mapping[str, Mapping[str, Any]]


def run_comparison(comparison: Comparison, settings: Settings) -> dict[str, Row]:
    """Trains and judges every arm that has no row yet.

    Returns:
        The rows by arm, failed ones included; also in OUT/results.jsonl, in the order of the arms.

    Raises:
        UsageError: One seed only, another comparison in the same folder, or the same one that is running.
        DataError: A row of another comparison, or the budgets could not be found.
    """
    comparison.check()
    if comparison.fewest_seeds < 2 and not settings.exploratory:
        raise UsageError(
            f"seeds={comparison.seeds}: one seed can't tell a difference between strategies from one between seeds; "
            "give three or more, or --exploratory, which marks every table."
        )
    if settings.jobs < 1:
        raise UsageError(f"--jobs {settings.jobs}: 1 or more.")
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"--out {settings.out}: it or what it is in is a file; name a folder.") from None
    with single_process_lock(settings.out):
        return _run(comparison, settings)


@contextmanager
def single_process_lock(out: Path) -> Iterator[None]:
    """Refuses a second process on the same folder."""
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"--out {out}: another process is comparing there.") from error
        yield


def _run(comparison: Comparison, settings: Settings) -> dict[str, Row]:
    out = settings.out
    _check_foil_categories(comparison)
    rows = rows_that_count(settings)
    check_same_comparison(comparison, settings, rows)  # before anything is written
    budgets = _budgets(comparison, settings, rows)
    for name in comparison.names:
        log.info("%s: %s", name, budgets[name]["summary"])
    specs = check_same_comparison(comparison, settings, rows)
    arms = arms_of(comparison)
    missing = [spec for name, spec in specs.items() if name not in rows]
    if settings.rows_from is not None and missing:
        taken = import_rows(settings.rows_from, missing)
        log.info("%d of %d missing arms are those of %s", len(taken), len(missing), settings.rows_from)
        rows |= taken
        write_rows(out, rows.values())
    left = [specs[arm.name] for arm in arms if arm.name not in rows]
    if len(left) < len(arms):
        log.info("%d of %d arms are there already", len(arms) - len(left), len(arms))
    failed = [name for name in specs if rows.get(name, {}).get("status") == "failed"]
    if failed:
        log.warning(
            "%d failed before and are not tried again without --retry_failed: %s", len(failed), ", ".join(failed)
        )
    order = [arm.name for arm in arms]
    for row in _trained(left, rows, settings, {name: budgets[specs[name]["strategy"]]["weights"] for name in specs}):
        rows[row["arm"]] = row
        write_rows(out, [rows[name] for name in [*order, *(n for n in rows if n not in order)] if name in rows])
    log_report(comparison, settings, rows)
    return {name: rows[name] for name in order}


def _check_foil_categories(comparison: Comparison) -> None:
    """Refuses a wrong path of foils, or a category that they lack, which would be found after hours of training."""
    foils = comparison.foils
    if foils.files:
        found = read_foils([Path(file) for file in foils.files], ImageFolder(foils.images))
        known = [f"foils/{name}" for name in dict.fromkeys([OVERALL, *(foil.category for foil in found)])]
        for measure in comparison.primary:
            if measure.startswith("foils/") and measure not in known:
                hint = did_you_mean(measure, known)
                raise UsageError(f"primary: '{measure}' is no category; allowed are {', '.join(known)}.{hint}")


def log_report(comparison: Comparison, settings: Settings, rows: Mapping[str, Row]) -> None:
    """Writes what the report says beside the rows: comparison.json and examples.json."""
    reference = comparison.reference or comparison.names[0]
    before = primary_before(comparison, settings.out, rows)
    length = ", ".join(f"{stage.steps:,} steps of {name}" for name, stage in comparison.stages.items())
    about = {
        "name": comparison.name,
        "strategies": comparison.names,
        "seeds": comparison.seeds,
        "arms": [arm.name for arm in arms_of(comparison)],
        "exploratory": settings.exploratory or comparison.fewest_seeds < 2,
        "budget_rule": f"{RULES[comparison.match]} as {reference} with {length}",
        "reference": reference,
        "primary": comparison.primary,
        **({"primary_before": before} if before else {}),
        "dataset": comparison.about,
        "command": settings.command,
    }
    atomic_write_text(settings.out / "comparison.json", json.dumps(about, indent=2) + "\n")
    try:
        found = examples(comparison, settings.out, rows)
    except DataError as error:  # the foils have moved since: the report can do without them
        log.warning("no new examples: %s", error)
        return
    atomic_write_text(settings.out / "examples.json", json.dumps(found, indent=2) + "\n")


def _budgets(comparison: Comparison, settings: Settings, rows: Mapping[str, Row]) -> Calibration:
    """Counted once and kept in OUT/budgets.json; a strategy that is new is counted then.

    Raises:
        DataError: Something is wrong with the data.
        UsageError: A strategy can't be built.
    """
    asked, stored = budget_inputs(comparison), stored_budgets(settings.out)
    changes = describe_changes(stored.get("budget_inputs", asked), asked)
    differences = {name: json.loads(json.dumps(comparison.differences(name))) for name in comparison.names}
    known = {name: found["differences"] for name, found in stored.get("strategies", {}).items()}
    plan = {
        "comparison": asdict(comparison),
        "budget_inputs": asked,
        "differences": differences,
        "allow_import": settings.allow_import,
        "command": settings.command,
        "primary_before": primary_before(comparison, settings.out, rows),
    }
    atomic_write_text(settings.out / "plan.json", json.dumps(plan, indent=2) + "\n")
    if changes or any(known.get(name) != own for name, own in differences.items()):
        log.info("counting what a step of each strategy costs")
        command = [sys.executable, "-m", "mmbert.compare.calibration", str(settings.out)]
        done = subprocess.run(command, env=_environment(comparison.threads), stderr=subprocess.PIPE, text=True)  # noqa: S603
        if done.returncode == 2:
            raise UsageError(_complaint(done.stderr))
        if done.returncode:
            raise DataError(f"counting what a step costs failed: {_complaint(done.stderr)}")
        stored = stored_budgets(settings.out)
    return stored["strategies"]


def _environment(threads: int) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}


def _trained(
    specs: Sequence[Mapping[str, Any]], rows: Mapping[str, Row], settings: Settings, weights: Mapping[str, Any]
) -> Iterator[Row]:
    """Runs arms, at most `jobs` at once, and gives each row as it comes."""
    waiting = [*specs]
    reached: dict[str, int] = {}
    running: dict[subprocess.Popen[bytes], Mapping[str, Any]] = {}
    total = sum(sum(found.values()) for found in weights.values())
    done = sum(sum(weights[name].values()) for name in weights if name in rows)
    try:
        with _bar() as bar:
            task = bar.add_task("arms", total=total, completed=done, arms=f"{len(rows)}/{len(weights)}")
            while waiting or running:
                while waiting and len(running) < settings.jobs:
                    spec = waiting.pop(0)
                    running[_started(spec)] = spec
                time.sleep(0.2)
                for process in [p for p in running if p.poll() is not None]:
                    spec = running.pop(process)
                    if process.returncode in EXIT_CODES.values():
                        raise SystemExit(process.returncode)  # it was told to stop, and so are all
                    if process.returncode < 0 and steps_of(spec) > reached.get(spec["arm"], 0):
                        reached[spec["arm"]] = steps_of(spec)
                        log.warning("%s was killed by signal %d and goes on", spec["arm"], -process.returncode)
                        waiting.insert(0, spec)
                        continue
                    row = _row(spec, process.returncode)
                    done += sum(weights[spec["arm"]].values())
                    _tell(row)
                    yield row
                now = done + sum(_progress(spec, weights[spec["arm"]]) for spec in running.values())
                finished = len(weights) - len(waiting) - len(running)
                bar.update(task, completed=now, arms=f"{finished}/{len(weights)}")
    finally:
        _stop(running)


def _bar() -> Progress:
    columns = (
        TextColumn("[progress.description]{task.fields[arms]} arms"),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())


def _started(spec: Mapping[str, Any]) -> "subprocess.Popen[bytes]":
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


def steps_of(spec: Mapping[str, Any]) -> int:
    """Optimizer steps that an arm has behind it: one that is killed before it takes another has failed."""
    return sum(last_losses(Path(spec["folder"]) / stage / "trace.csv")[0] for stage in spec["stages"])


def _progress(spec: Mapping[str, Any], weights: Mapping[str, float]) -> float:
    """How much of an arm's training is done, in the unit of its weights."""
    done = 0.0
    for stage, weight in weights.items():
        steps = spec["stages"][stage]["options"]["trainer.max_steps"]
        done += weight * min(1.0, last_losses(Path(spec["folder"]) / stage / "trace.csv")[0] / steps)
    return done


def _row(spec: Mapping[str, Any], code: int) -> Row:
    """The row an arm left, or one that says how it failed."""
    folder = Path(spec["folder"])
    file = folder / "row.json"
    if code == 0 and file.is_file():
        for checkpoint in folder.glob("*/checkpoints/*.ckpt*"):
            checkpoint.unlink()  # nothing goes on from a finished arm; its model and logs stay
        return json.loads(file.read_text())
    stage = next((s for s in spec["stages"] if not (folder / s / "metrics.json").is_file()), "evaluation")
    step, losses = last_losses(folder / stage / "trace.csv")
    what = _complaint((folder / "log.txt").read_text(errors="replace"))
    if code < 0:
        what = f"killed by signal {-code}" + (" (out of memory?)" if code == -9 else "")
    return {
        **{key: spec[key] for key in ("arm", "strategy", "seed", "fraction", "exploratory", "budget", "config")},
        "status": "failed",
        "versions": {k.removeprefix("run/version/"): v for k, v in versions().items()},
        "failure": {"stage": stage, "step": step, "what": what, "last_losses": losses, "exit_code": code},
    }


def _complaint(log_text: str) -> str:
    """The sentence that a process ended with."""
    lines = [line for line in log_text.strip().splitlines() if line.strip()]
    said = [line for line in lines if "error" in line.lower()]
    return ((said or lines or ["it said nothing"])[-1]).removeprefix("mmbert: error: ").strip()


def _tell(row: Row) -> None:
    if row["status"] == "failed":
        failure = row["failure"]
        log.warning("%s failed in %s at step %d: %s", row["arm"], failure["stage"], failure["step"], failure["what"])
        return
    log.info("%s: done in %.1f minutes", row["arm"], row["cost"]["wall_seconds"] / 60)


def _stop(running: Mapping["subprocess.Popen[bytes]", Mapping[str, Any]]) -> None:
    """Lets arms save and end."""
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
