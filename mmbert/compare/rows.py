"""Results of arms on disk: one row per arm in results.jsonl, per-item outcomes in items/ARM.npz."""

import csv
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mmbert.errors import DataError
from mmbert.metrics.outcomes import ItemOutcomes, read_outcomes
from mmbert.runtime.files import atomic_write_text

Row = dict[str, Any]
QUERIES = "queries.json"
"""File in an arm's folder: [image, caption] of every item of retrieval/text_to_image/R@1."""
TAIL_BYTES = 1 << 16
"""Bytes at the end of a trace that contain its last lines."""


def read_rows(out: Path) -> dict[str, Row]:
    """Read results.jsonl of a comparison's folder: arm -> row.

    Raises:
        DataError: A line that is not a row.
    """
    file = out / "results.jsonl"
    rows: dict[str, Row] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines() if file.is_file() else (), start=1):
        try:
            row = json.loads(line)
            rows[row["arm"]] = row
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{file}:{number}", "not a row of a comparison", "a JSON object with the key arm"
            ) from error
    return rows


def write_rows(out: Path, rows: Iterable[Row]) -> None:
    """Atomically write results.jsonl."""
    lines = [json.dumps(json_safe(row), sort_keys=True, allow_nan=False) for row in rows]
    atomic_write_text(out / "results.jsonl", "".join(line + "\n" for line in lines))


def json_safe(value: Any) -> Any:
    """Replace NaN and infinity by None, which JSON can store."""
    if isinstance(value, Mapping):
        return {key: json_safe(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_all_outcomes(out: Path, arms: Iterable[str]) -> dict[str, dict[str, ItemOutcomes]]:
    """Read the per-item outcomes of arms: arm -> result -> outcomes; arms without a file are skipped."""
    files = {arm: out / "items" / f"{arm}.npz" for arm in arms}
    return {arm: read_outcomes(file) for arm, file in files.items() if file.is_file()}


def last_losses(trace: Path, count: int = 5) -> tuple[int, list[float]]:
    """Read the last step and the last losses of a run's trace.csv."""
    if not trace.is_file():
        return 0, []
    with trace.open("rb") as file:  # only the end: the progress bar reads it several times per second
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()[1:]  # without the header or an incomplete line
    complete = [row for row in csv.reader(lines) if len(row) == 4]
    return (int(complete[-1][0]) if complete else 0), [float.fromhex(row[3]) for row in complete[-count:]]
