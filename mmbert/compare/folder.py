"""State of a comparison's folder: finished rows, and whether they belong to this comparison."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmbert.compare.plan import TOWERS, Comparison, list_arms
from mmbert.compare.rows import Row, read_rows
from mmbert.compare.specs import EVALUATIONS, WITHOUT_EFFECT, Settings, arm_spec, budget_inputs, describe_changes
from mmbert.errors import DataError, UsageError


def valid_rows(settings: Settings) -> dict[str, Row]:
    """Rows of arms that are not run again: finished ones, and failed trainings without `retry_failed`.

    Arms that were trained and failed in the evaluation are always run again. Those whose towers failed get their row
    anew, as it depends on the towers'.
    """
    return {
        name: row
        for name, row in read_rows(settings.out).items()
        if "failure" not in row or not (settings.retry_failed or row["failure"]["stage"] in ("evaluation", TOWERS))
    }


def check_same_comparison(
    comparison: Comparison, settings: Settings, rows: Mapping[str, Row], *, foils_moved: bool = False
) -> dict[str, dict[str, Any]]:
    """Raise if the folder holds another comparison.

    Args:
        comparison: The requested comparison.
        settings: Its folder.
        rows: Rows of the folder.
        foils_moved: Accept rows whose foils had other paths.

    Returns:
        Arm -> its specification, of the strategies whose budget is known.

    Raises:
        DataError: A row, or an unfinished arm, belongs to another comparison.
    """
    stored, inputs = stored_budgets(settings.out), budget_inputs(comparison)
    changes = describe_changes(stored.get("budget_inputs", inputs), inputs)
    if changes and (rows or any(settings.out.glob("arms/*/arm.json"))):
        expected = "another --out for this one, or this folder removed"
        found = f"{'rows' if rows else 'arms'} of another comparison ({changes})"
        raise DataError(str(settings.out), found, expected)
    specs = {}
    for arm in list_arms(comparison):
        budget = stored.get("strategies", {}).get(arm.strategy)
        if budget is None or changes:
            continue
        spec = specs[arm.name] = arm_spec(comparison, arm, budget, settings)
        if foils_moved and arm.name in rows:
            spec["config"]["foils"] = rows[arm.name]["config"]["foils"]
        if arm.name in rows:
            check_same_arm(rows[arm.name], spec, settings.out)
        else:
            check_arm_folder(spec)
    return specs


def check_same_arm(row: Row, spec: Mapping[str, Any], out: Path) -> None:
    """Raise if a finished row belongs to an arm of another comparison.

    Raises:
        DataError: With the options that differ.
    """
    changes = changed_options(row, spec)
    if changes:
        raise DataError(
            f"{out / 'results.jsonl'}:{row['arm']}",
            f"a row of another comparison ({changes})",
            "another --out for this one",
        )


def check_arm_folder(spec: Mapping[str, Any]) -> None:
    """Raise if an unfinished arm was trained with other options; remove its row if only its evaluation changed.

    Raises:
        DataError: With the options that differ.
    """
    folder = Path(spec["folder"])
    if not (folder / "arm.json").is_file():
        return
    before = json.loads((folder / "arm.json").read_text(encoding="utf-8"))
    trained, now = ({k: v for k, v in found["config"].items() if k not in EVALUATIONS} for found in (before, spec))
    changes = describe_changes(trained, json.loads(json.dumps(now)))
    if changes:
        raise DataError(
            str(folder), f"an arm of another comparison ({changes})", "another --out, or this folder removed"
        )
    if changed_options(before, spec):
        (folder / "row.json").unlink(missing_ok=True)


def changed_options(row: Row, spec: Mapping[str, Any]) -> str:
    """Describe how the options of a row differ from those of a requested arm; empty if they are equal."""
    return describe_changes(row.get("config", {}), json.loads(json.dumps(spec["config"])))


def import_rows(folder: Path, specs: Sequence[Mapping[str, Any]]) -> dict[str, Row]:
    """Copy finished arms from another comparison whose options are those of the requested arms, with their items.

    Args:
        folder: Folder of the other comparison.
        specs: Specifications of the requested arms.

    Raises:
        UsageError: A folder without rows.
        DataError: Rows without their items.
    """
    available, imported = read_rows(folder), {}
    if not available:
        raise UsageError(f"--rows_from {folder}: it has no results.jsonl with rows.")
    for spec in specs:
        row = available.get(spec["arm"], {})
        done = row.get("status") == "done" and row["cost"].get("threads", spec["threads"]) == spec["threads"]
        if done and not changed_options(row, spec):
            target = Path(spec["items"])
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.copyfile(folder / "items" / target.name, target)
            except FileNotFoundError:
                found = f"no items/{target.name} for the row of {spec['arm']}"
                raise DataError(str(folder), found, "the complete folder of a comparison") from None
            imported[spec["arm"]] = row
    return imported


def previous_primary(comparison: Comparison, out: Path, rows: Mapping[str, Row]) -> dict[str, Any] | None:
    """Primary measures at the time when arms finished, and the number of these arms; None if they are unchanged."""
    plan = read_json(out / "plan.json")
    done = sum(row["status"] == "done" and row.get("strategy") != TOWERS for row in rows.values())
    first = {"primary": plan.get("comparison", {}).get("primary", comparison.primary), "arms": done}
    before = plan.get("primary_before") or first
    return before if before["arms"] and before["primary"] != comparison.primary else None


def stored_budgets(out: Path) -> dict[str, Any]:
    """Content of OUT/budgets.json; empty if it is missing.

    Options that change no number, which older files have, are left out; see `budget_inputs`.
    """
    content = read_json(out / "budgets.json")
    if "budget_inputs" in content:
        kept = {k: v for k, v in content["budget_inputs"].items() if k.partition(".")[2] not in WITHOUT_EFFECT}
        content["budget_inputs"] = kept
    return content


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON file of a comparison's folder; empty if it is missing.

    Raises:
        DataError: It is damaged.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise DataError(
            str(file), "not JSON", "a file written by mmbert compare; it is made again if removed"
        ) from error
