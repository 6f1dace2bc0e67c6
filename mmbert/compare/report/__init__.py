"""Report of a comparison: report.md, report.html and plots, which can be written again from its files at any time."""

import json
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from mmbert.compare.report import drawing
from mmbert.compare.report.document import Example, build_document
from mmbert.compare.report.outcomes import ItemOutcomes, Outcomes, Row
from mmbert.compare.report.render import render_html, render_markdown
from mmbert.data.images import BadImageError, load_image, read_content
from mmbert.errors import DataError
from mmbert.runtime.files import atomic_write_text

MAX_IMAGE_SIZE = 360
"""Pixels of the longer side of an image in the report."""


def write_report(
    out: Path,
    rows: Sequence[Row],
    items: ItemOutcomes,
    comparison: Mapping[str, Any],
    examples: Sequence[Mapping[str, Any]],
) -> Path:
    """Write the report of all finished arms; equal inputs give equal bytes.

    Also writes `comparison.json`, `examples.json` and the images of the examples, so that `write_report_again` can
    repeat it from these, `results.jsonl` and `items/`.

    Args:
        out: Folder of the comparison.
        rows: One row per arm, finished or failed.
        items: Arm -> measure -> outcomes (items,) from 0 to 1, and "<measure>:image" -> image numbers (items,).
        comparison: `name`, `strategies` (their order determines the colors), `seeds`, `budget_rule` (a sentence or the
            options), `primary` (names of measures or categories), `dataset`, `command`; all are optional.
        examples: Items on which strategies disagree: `image` (path, in `out` or not, or content), `caption`, `foil`,
            `category`, `outcomes` (strategy -> whether it was right, or its answer).

    Returns:
        `out`/report.html.

    Raises:
        DataError: Arms have different items for one measure.
    """
    out.mkdir(parents=True, exist_ok=True)
    loaded = [_load_example(out, i, example) for i, example in enumerate(examples)]
    _save_inputs(out, comparison, loaded)
    document = build_document(Outcomes(rows, items, comparison), loaded)
    plots = out / "plots"
    plots.mkdir(exist_ok=True)
    for section in document.sections:
        for figure in section.figures:
            drawing.save_figure(figure, document.strategies, plots)
    (out / "report.md").write_text(render_markdown(document), encoding="utf-8")
    file = out / "report.html"
    file.write_text(render_html(document), encoding="utf-8")
    return file


def write_report_again(out: Path) -> Path:
    """Write the report of a comparison's folder from its files.

    Returns:
        `out`/report.html.

    Raises:
        DataError: A file is missing or damaged.
    """
    file = out / "examples.json"
    examples = _parse(_read(file), str(file)) if file.is_file() else []
    return write_report(out, *_load(out), examples)


def load_outcomes(out: Path) -> Outcomes:
    """Load the scores and per-item outcomes of a comparison's folder.

    Raises:
        DataError: A file is missing or damaged.
    """
    return Outcomes(*_load(out))


def _load(out: Path) -> tuple[list[Row], ItemOutcomes, dict[str, Any]]:
    rows = []
    for number, line in enumerate(_read(out / "results.jsonl").splitlines(), start=1):
        if line.strip():
            rows.append(_parse(line, f"{out / 'results.jsonl'}:{number}"))
    items = {}
    for file in sorted((out / "items").glob("*.npz")):
        try:
            with np.load(file, allow_pickle=False) as arrays:
                items[file.stem] = dict(arrays)
        except Exception as error:  # zip, header or array: NumPy raises nearly anything on damaged files
            raise DataError(str(file), f"can't be read ({type(error).__name__})", "the items of an arm") from error
    return rows, items, _parse(_read(out / "comparison.json"), str(out / "comparison.json"))


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(str(file), f"can't be read ({error})", "a file written by mmbert compare") from error


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(place, f"not JSON ({error})", "a file written by mmbert compare") from error


def _load_example(out: Path, number: int, given: Mapping[str, Any]) -> Example:
    try:
        content = _small_image(out, given["image"])
    except (KeyError, TypeError, BadImageError):
        content = None  # the report says so; a missing image must not prevent the rest
    texts = [str(given.get(name) or "") for name in ("caption", "foil", "category")]
    return Example(content, number, *texts, outcomes=_json_outcomes(given.get("outcomes") or {}))


def _json_outcomes(given: Mapping[str, Any]) -> dict[str, bool | str]:
    """Convert outcomes to the types that they have after a round trip through JSON."""
    return {str(k): bool(v) if isinstance(v, (bool, np.bool_)) else str(v) for k, v in given.items()}


def _small_image(out: Path, source: str | Path | bytes) -> bytes:
    """Load an image and reduce its size; an image of the report itself is returned unchanged."""
    if not isinstance(source, bytes):
        inside = out / source
        own = inside.is_file() and inside.resolve().parent == (out / "examples").resolve()
        source = read_content(inside if inside.is_file() else source)
        if own:
            return source
    image = load_image(source)
    image.thumbnail((MAX_IMAGE_SIZE, MAX_IMAGE_SIZE))
    # Drawings have few colors, and JPEG would blur their edges.
    few_colors = image.getcolors(maxcolors=4096) is not None
    buffer = BytesIO()
    image.save(buffer, "PNG", optimize=True) if few_colors else image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _save_inputs(out: Path, comparison: Mapping[str, Any], examples: Sequence[Example]) -> None:
    text = json.dumps(comparison, indent=2, sort_keys=True) + "\n"
    atomic_write_text(out / "comparison.json", text)
    entries = []
    for example in examples:
        if example.image is not None:
            file = out / example.file
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(example.image)
        entries.append(
            {"image": example.file, **{k: getattr(example, k) for k in ("caption", "foil", "category", "outcomes")}}
        )
    atomic_write_text(out / "examples.json", json.dumps(entries, indent=2) + "\n")
