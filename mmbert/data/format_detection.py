"""Detection of an annotation file's format, its keys and the folder of its images."""

import json
import logging
import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from mmbert.data.readers.base import ImageFolder, NoImageError, Problems, json_type
from mmbert.data.readers.strict import iter_json_lines, load_json, read_text
from mmbert.data.readers.table import DELIMITERS, csv_header
from mmbert.errors import DataError, quote

log = logging.getLogger("mmbert")

IMAGE_KEYS = (
    "image", "image_path", "image_file", "filename", "file_name", "filepath", "file", "img", "img_path", "path",
    "image_name", "picture", "photo",
)  # fmt: skip
"""Usual names of the field with the image's path; the first one in a file is taken, ignoring case."""
CAPTION_KEYS = (
    "caption",
    "captions",
    "text",
    "sentence",
    "sentences",
    "alt",
    "alt_text",
    "description",
    "title",
    "comment",
)
"""Usual names of the field with the caption, as above."""

NLVR_KEYS = ("identifier", "sentence", "label")
"""Keys that all rows of nlvr and nlvr2 have."""

SUFFIXES = {".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl"}
SNIFFED_RECORDS = 100
"""Records whose keys are looked at."""
EXPECTED_FORMATS = (
    "an object with 'images' and 'annotations' (coco) or with 'images' that have 'sentences' (karpathy), one object "
    "with image and caption per line (jsonl), a table with a header (csv), questions or annotations of vqav2, rows of "
    "nlvr or nlvr2, foils, or boxes of COCO instances; set --format"
)


def detect_format(path: Path) -> str:
    """Detect the format of an annotation file by its suffix, or else by its content.

    Returns:
        A name in `mmbert.data.readers.FORMATS`, or vqav2, nlvr, nlvr2, foils or boxes.

    Raises:
        DataError: the file cannot be read, is broken JSON, or has no known format.
    """
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        return _detect_row_format(path) if SUFFIXES[suffix] == "jsonl" else SUFFIXES[suffix]
    text = read_text(path)
    if suffix != ".json" and text.lstrip()[0] not in "{[":
        if _has_row_keys(dict.fromkeys(csv_header(path, None)[1])):
            return "csv"
        raise DataError(str(path), f"a name in {suffix!r} and content that is no JSON", EXPECTED_FORMATS)
    try:
        top = load_json(path)
    except DataError:
        if any(_is_row(line) for line in text[: 1 << 20].splitlines()[:10]):
            return _detect_row_format(path)
        raise
    if isinstance(top, dict):
        if _has_row_keys(top):  # a file of one line is a JSON text too
            return _detect_row_format(path)
        records = top.get("annotations")
        if "questions" in top or (isinstance(records, list) and any("answers" in r for r in _dicts(records))):
            return "vqav2"
        if isinstance(records, list) and any("bbox" in r and "caption" not in r for r in _dicts(records)):
            return "boxes"
        if any("negative_caption" in record for record in _dicts(top.values())):
            return "foils"
        images = top.get("images")
        keys = {key for record in _dicts(images if isinstance(images, list) else ()) for key in record}
        if "sentences" in keys:
            return "karpathy"
        if "annotations" in top:
            return "coco"
        if "images" in top and keys & {"file_name", "filename"}:  # a key is missing: the reader reports it
            return "coco" if "file_name" in keys else "karpathy"
    raise DataError(str(path), f"the file is {json_type(top)}", EXPECTED_FORMATS)


def has_labels(path: Path) -> bool:
    """Return whether the rows of a JSON-lines file are labelled examples of a task with the usual keys."""
    rows = [record for _, record in islice(iter_json_lines(path, Problems()), SNIFFED_RECORDS)]
    return bool(rows) and any("label" in row for row in rows) and all({"text"} <= {*row} for row in rows)


def _detect_row_format(path: Path) -> str:
    """Distinguish nlvr and nlvr2 from other JSON lines."""
    try:
        _, record = next(iter_json_lines(path, Problems()), ("", {}))
    except DataError:  # the reader reports it
        return "jsonl"
    identifier = record.get("identifier")
    if not isinstance(identifier, str) or not {*NLVR_KEYS} <= {*record}:
        return "jsonl"
    return "nlvr2" if identifier.count("-") == 3 else "nlvr"


def _is_row(line: str) -> bool:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and _has_row_keys(record)


def _has_row_keys(record: dict[str, Any]) -> bool:
    return {*NLVR_KEYS} <= {*record} or all(_first(known, record) for known in (IMAGE_KEYS, CAPTION_KEYS))


def _dicts(records: Iterable[Any]) -> list[dict[str, Any]]:
    return [record for record in islice(records, SNIFFED_RECORDS) if isinstance(record, dict)]


def detect_keys(path: Path, format: str, given: dict[str, Any], *, text: str = "caption_key") -> dict[str, Any]:
    """Find the keys of a jsonl or csv file that are not given, among the usual names.

    Args:
        path: the annotation file.
        format: jsonl or csv.
        given: options of the reader that are known: `image_key`, `caption_key`, `delimiter`.
        text: the option that names the text: `caption_key`, or `text_key` of a task.

    Returns:
        `given` with `image_key` and the text's key; without them where the file has no record to look at, which its
        reader then reports.

    Raises:
        DataError: the file cannot be read, or none of the usual names is in its first records.
    """
    wanted = {"image_key": IMAGE_KEYS, text: CAPTION_KEYS}
    missing = [key for key in wanted if key not in given]
    if not missing:
        return given
    if format == "csv":
        place, names = csv_header(path, given.get("delimiter"))
        if len(names) == 1 and any(mark in names[0] for mark in DELIMITERS):
            return given  # another delimiter: the reader reports which
    else:
        rows = list(islice(iter_json_lines(path, Problems()), SNIFFED_RECORDS))
        place = rows[0][0] if rows else ""
        names = list(dict.fromkeys(name for _, record in rows for name in record))
    if not names:
        return given
    found = {}
    for key in missing:
        name = _first(wanted[key], names)
        if name is None:
            what = key.removesuffix("_key")
            raise DataError(
                place,
                f"no known name of the {what} among {json_type(dict.fromkeys(names)).removeprefix('an object with ')}",
                f"one of {', '.join(wanted[key])}; --{key} gives another",
            )
        found[key] = name
    log.info("detected keys: %s", ", ".join(f"{key} {name}" for key, name in found.items()))
    return {**given, **found}


def _first(known: Iterable[str], names: Iterable[str]) -> str | None:
    spelled = {name.lower(): name for name in reversed(list(names))}
    return next((spelled[name] for name in known if name in spelled), None)


class DetectedFolder(ImageFolder):
    """Image folder that is detected by the first image that is found.

    Searched in this order: the folder of the annotation file, `images` in it, `images` beside it.

    Args:
        path: the annotation file.
    """

    def __init__(self, path: Path) -> None:
        self.root = os.path.dirname(os.path.abspath(path))
        known = (self.root, os.path.join(self.root, "images"), os.path.join(os.path.dirname(self.root), "images"))
        self._candidates = [ImageFolder(folder) for folder in known if os.path.isdir(folder)]
        self._settled: ImageFolder | None = None
        self._missed = 0
        self._first = ("", "")

    def find(self, name: str, place: str) -> tuple[Path, str]:
        """Return what `ImageFolder.find` does.

        Raises:
            NoImageError: there is no such file, in none of the folders as long as none is settled.
            DataError: as in `ImageFolder.find`.
        """
        if self._settled is not None:
            return self._settled.find(name, place)
        missing: list[NoImageError] = []
        for folder in self._candidates:
            try:
                found = folder.find(name, place)
            except NoImageError as error:
                missing.append(error)
            else:
                self._settled, self.root = folder, folder.root
                log.info("images in %s", folder.root)
                return found
        self._missed += 1
        if self._missed == 1:
            self._first = name, place
        for error in missing:
            if error.has_hint:  # a similar name
                raise error
        raise NoImageError(place, f"no image file {quote(name)}", f"it in {self._where()}; or give --images DIR")

    def raise_if_unsettled(self) -> None:
        """Report once that no folder has the images, rather than for each of them.

        Raises:
            NoImageError: at least two images were looked for, and none was found.
        """
        if self._settled is None and self._missed > 1:
            name, place = self._first
            found = f"no image file {quote(name)}, nor any other of {self._missed:,}"
            raise NoImageError(place, found, f"them in {self._where()}; or give --images DIR")

    def _where(self) -> str:
        return " or ".join(folder.root for folder in self._candidates)
