"""What an arm leaves: one row of results.jsonl, and what became of every test item in items/ARM.npz."""

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
"""In an arm's folder: [image, caption] of every item of retrieval/text_to_image/R@1."""
TAIL = 1 << 16
"""Bytes at the end of a trace that hold its last lines."""
NOISE = ("cost",)
"""Keys of a row that differ from run to run: times and memory, where and when."""


def read_rows(out: Path) -> dict[str, Row]:
    """The rows of a comparison's folder by the name of their arm.

    Raises:
        DataError: A line that is no row.
    """
    file = out / "results.jsonl"
    rows: dict[str, Row] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines() if file.is_file() else (), start=1):
        try:
            row = json.loads(line)
            rows[row["arm"]] = row
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file}:{number}", "no row of a comparison", "a JSON object with the key arm") from error
    return rows


def write_rows(out: Path, rows: Iterable[Row]) -> None:
    """Writes results.jsonl anew, whole or not at all."""
    lines = [json.dumps(finite(row), sort_keys=True, allow_nan=False) for row in rows]
    atomic_write_text(out / "results.jsonl", "".join(line + "\n" for line in lines))


def finite(value: Any) -> Any:
    """A value for JSON: numbers that are none become null."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_all_outcomes(out: Path, arms: Iterable[str]) -> dict[str, dict[str, ItemOutcomes]]:
    """The items of each arm that has some."""
    files = {arm: out / "items" / f"{arm}.npz" for arm in arms}
    return {arm: read_outcomes(file) for arm, file in files.items() if file.is_file()}


def last_losses(trace: Path, count: int = 5) -> tuple[int, list[float]]:
    """The last step of a run's trace.csv, and its last losses."""
    if not trace.is_file():
        return 0, []
    with trace.open("rb") as file:  # the end alone: the progress bar asks several times a second
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
        lines = file.read().decode(errors="replace").splitlines()[1:]  # without the header, or a line cut in two
    whole = [row for row in csv.reader(lines) if len(row) == 4]
    return (int(whole[-1][0]) if whole else 0), [float.fromhex(row[3]) for row in whole[-count:]]
