"""The report of a comparison: report.md, report.html and plots, made again from files at any time."""

import json
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from mmbert.compare.report import drawing, markdown, page
from mmbert.compare.report.document import Example, build
from mmbert.compare.report.outcomes import ItemOutcomes, Outcomes, Row
from mmbert.data.images import BadImageError, load_image, read_content
from mmbert.errors import DataError

LARGEST_EXAMPLE = 360
"""Pixels of the longer side of an image in the report."""


def write_report(
    out: Path,
    rows: Sequence[Row],
    items: ItemOutcomes,
    comparison: Mapping[str, Any],
    examples: Sequence[Mapping[str, Any]],
) -> Path:
    """Writes the whole report of what has finished; the same input gives the same bytes.

    `comparison.json`, `examples.json` and the examples' images are written too, so that with the runner's
    `results.jsonl` and `items/` `report_from` can do it again.

    Args:
        out: Folder of the comparison.
        rows: One an arm, done or failed.
        items: Arm -> measure -> outcomes (items,) from 0 to 1, and "<measure>:image" -> image numbers (items,).
        comparison: `name`, `strategies` (their order gives the colours), `seeds`, `budget_rule` (a sentence or the
            options), `primary` (names of measures or categories), `dataset`, `command`; all may be missing.
        examples: Where strategies disagree: `image` (path, in `out` or not, or content), `caption`, `foil`,
            `category`, `outcomes` (strategy -> whether it was right, or its answer).

    Returns:
        `out`/report.html.

    Raises:
        DataError: Arms have different items for one measure.
    """
    out.mkdir(parents=True, exist_ok=True)
    shown = [_example(out, i, example) for i, example in enumerate(examples)]
    _save_inputs(out, comparison, shown)
    document = build(Outcomes(rows, items, comparison), shown)
    plots = out / "plots"
    plots.mkdir(exist_ok=True)
    for section in document.sections:
        for figure in section.figures:
            drawing.save(figure, document.strategies, plots)
    (out / "report.md").write_text(markdown.render(document), encoding="utf-8")
    file = out / "report.html"
    file.write_text(page.render(document), encoding="utf-8")
    return file


def report_from(out: Path) -> Path:
    """Writes the report of a comparison's folder again, from its files alone.

    Raises:
        DataError: A file is missing or damaged.
    """
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
            raise DataError(str(file), f"cannot be read ({type(error).__name__})", "the items of an arm") from error
    comparison = _parse(_read(out / "comparison.json"), str(out / "comparison.json"))
    file = out / "examples.json"
    examples = _parse(_read(file), str(file)) if file.is_file() else []
    return write_report(out, rows, items, comparison, examples)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(str(file), f"cannot be read ({error})", "a file that `mmbert compare` wrote") from error


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(place, f"no JSON ({error})", "a file that `mmbert compare` wrote") from error


def _example(out: Path, number: int, given: Mapping[str, Any]) -> Example:
    try:
        content = _small(out, given["image"])
    except (KeyError, TypeError, BadImageError):
        content = None  # told in the report: an image that is gone must not cost the rest
    words = [str(given.get(name) or "") for name in ("caption", "foil", "category")]
    return Example(content, number, *words, outcomes=_json_outcomes(given.get("outcomes") or {}))


def _json_outcomes(given: Mapping[str, Any]) -> dict[str, bool | str]:
    """Convert outcomes to the types that they have after a round trip through JSON."""
    return {str(k): bool(v) if isinstance(v, (bool, np.bool_)) else str(v) for k, v in given.items()}


def _small(out: Path, source: str | Path | bytes) -> bytes:
    """An image's content, small; one that is small and of the report is kept byte for byte."""
    if not isinstance(source, bytes):
        inside = out / source
        own = inside.is_file() and inside.resolve().parent == (out / "examples").resolve()
        source = read_content(inside if inside.is_file() else source)
        if own:
            return source
    image = load_image(source)
    image.thumbnail((LARGEST_EXAMPLE, LARGEST_EXAMPLE))
    # Drawn scenes have few colours, and JPEG would smear their edges.
    few_colours = image.getcolors(maxcolors=4096) is not None
    buffer = BytesIO()
    image.save(buffer, "PNG", optimize=True) if few_colours else image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _save_inputs(out: Path, comparison: Mapping[str, Any], examples: Sequence[Example]) -> None:
    (out / "comparison.json").write_text(json.dumps(comparison, indent=2, sort_keys=True) + "\n")
    listed = []
    for example in examples:
        if example.image is not None:
            file = out / example.file
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(example.image)
        listed.append(
            {"image": example.file, **{k: getattr(example, k) for k in ("caption", "foil", "category", "outcomes")}}
        )
    (out / "examples.json").write_text(json.dumps(listed, indent=2) + "\n")
