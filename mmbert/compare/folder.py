"""What a comparison's folder holds already, and whether it is of this comparison."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmbert.compare.plan import Comparison, arms_of
from mmbert.compare.rows import Row, read_rows
from mmbert.compare.specs import Settings, arm_spec, budget_inputs, describe_changes
from mmbert.errors import DataError, UsageError


def rows_that_count(settings: Settings) -> dict[str, Row]:
    """Rows of arms that are not run again: what was trained and could not be judged is judged again."""
    return {
        name: row
        for name, row in read_rows(settings.out).items()
        if "failure" not in row or not (settings.retry_failed or row["failure"]["stage"] == "evaluation")
    }


def check_same_comparison(
    comparison: Comparison, settings: Settings, rows: Mapping[str, Row], *, foils_moved: bool = False
) -> dict[str, dict[str, Any]]:
    """Refuses a folder that holds another comparison.

    Args:
        comparison: The one that is asked for.
        settings: Its folder.
        rows: What the folder has.
        foils_moved: Take rows that were judged by foils of another place or name.

    Returns:
        Arm -> its specification, of the strategies whose budget is known.

    Raises:
        DataError: A row, or an arm that has not finished, is of another comparison.
    """
    stored, asked = stored_budgets(settings.out), budget_inputs(comparison)
    changes = describe_changes(stored.get("budget_inputs", asked), asked)
    if changes and (rows or any(settings.out.glob("arms/*/arm.json"))):
        expected = "another --out for this one, or this folder removed"
        found = f"{'rows' if rows else 'arms'} of another comparison ({changes})"
        raise DataError(str(settings.out), found, expected)
    specs = {}
    for arm in arms_of(comparison):
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
    """Raises where a finished row is of another comparison than the one that is asked for.

    Raises:
        DataError: With what changed.
    """
    told = changes_of(row, spec)
    if told:
        raise DataError(
            f"{out / 'results.jsonl'}:{row['arm']}",
            f"a row of another comparison ({told})",
            "another --out for this one",
        )


def check_arm_folder(spec: Mapping[str, Any]) -> None:
    """Raises where an arm that has not finished was trained otherwise before; what judges it may have changed.

    Raises:
        DataError: With what changed.
    """
    folder = Path(spec["folder"])
    if not (folder / "arm.json").is_file():
        return
    before = json.loads((folder / "arm.json").read_text())
    judged = ("retrieval", "foils")
    trained, now = ({k: v for k, v in found["config"].items() if k not in judged} for found in (before, spec))
    told = describe_changes(trained, json.loads(json.dumps(now)))
    if told:
        raise DataError(str(folder), f"an arm of another comparison ({told})", "another --out, or this folder removed")
    if changes_of(before, spec):
        (folder / "row.json").unlink(missing_ok=True)


def changes_of(row: Row, spec: Mapping[str, Any]) -> str:
    """How the arm that a row tells of differs from an arm that is asked for; empty where it is the same one."""
    return describe_changes(row.get("config", {}), json.loads(json.dumps(spec["config"])))


def import_rows(folder: Path, specs: Sequence[Mapping[str, Any]]) -> dict[str, Row]:
    """The finished arms of another comparison that are also arms of this one, with their items.

    Raises:
        UsageError: A folder without rows.
        DataError: Rows without their items.
    """
    elsewhere, taken = read_rows(folder), {}
    if not elsewhere:
        raise UsageError(f"--rows_from {folder}: there is no results.jsonl with rows in it.")
    for spec in specs:
        row = elsewhere.get(spec["arm"], {})
        same = row.get("status") == "done" and row["cost"].get("threads", spec["threads"]) == spec["threads"]
        if same and not changes_of(row, spec):
            target = Path(spec["items"])
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.copyfile(folder / "items" / target.name, target)
            except FileNotFoundError:
                found = f"no items/{target.name} beside the row of {spec['arm']}"
                raise DataError(str(folder), found, "the whole folder of a comparison") from None
            taken[spec["arm"]] = row
    return taken


def primary_before(comparison: Comparison, out: Path, rows: Mapping[str, Row]) -> dict[str, Any] | None:
    """The measures that were primary when arms finished, where they are not those of now; and of how many arms."""
    plan = _read_json(out / "plan.json")
    done = sum(row["status"] == "done" for row in rows.values())
    first = {"primary": plan.get("comparison", {}).get("primary", comparison.primary), "arms": done}
    before = plan.get("primary_before") or first
    return before if before["arms"] and before["primary"] != comparison.primary else None


def stored_budgets(out: Path) -> dict[str, Any]:
    """What OUT/budgets.json holds; empty without one."""
    return _read_json(out / "budgets.json")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as error:
        raise DataError(str(file), "no JSON", "what mmbert compare wrote; without the file it is made again") from error
