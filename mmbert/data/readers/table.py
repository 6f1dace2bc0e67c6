"""Readers of caption tables, JSON lines or CSV: one row has an image and one or more captions."""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmbert.data.readers.base import (
    UNCAPTIONED,
    Example,
    ImageFolder,
    Problems,
    clean_caption,
    json_type,
    note_empty_caption,
    note_uncaptioned,
)
from mmbert.data.readers.strict import field, iter_json_lines, missing_key, read_text
from mmbert.errors import DataError, UsageError, did_you_mean, quote

ALIASES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}
"""Usual spellings of the splits; other names are kept as they are."""

DELIMITERS = (",", ";", "\t", "|")
"""Delimiters that are detected; the first of equally good ones is taken."""

Row = tuple[str, dict[str, Any]]
"""Place ("FILE:LINE") and record."""


def read_jsonl(
    path: Path,
    images: ImageFolder,
    problems: Problems,
    *,
    split: str | None = None,
    image_key: str = "image",
    caption_key: str | Sequence[str] = "caption",
    split_key: str | None = None,
    split_values: Mapping[str, Sequence[str]] | None = None,
    drop_uncaptioned: bool = False,
) -> list[Example]:
    """Read a file of one JSON object per line. Rows with the same image become one example.

    Args:
        path: the annotation file.
        images: folder of the images.
        problems: receives errors.
        split: the split of all rows.
        image_key: key of the image name.
        caption_key: key or keys of the captions; a value may be a string or a list of strings. Empty ones
            are dropped; a row is wrong only if it has none left.
        split_key: key of the split; without it (and without `split`) all rows are "train".
        split_values: values of `split_key` that make up a split, {"val": ["philosophy"]}. All others are
            "train", unless train is listed too: then another value is an error. Without it, the value
            itself is the name of the split.
        drop_uncaptioned: drop rows without a caption instead of raising an error.

    Raises:
        DataError: the file cannot be read.
        UsageError: the options contradict each other.
    """
    splits = Splits(path, split, split_key, split_values)
    rows = iter_json_lines(path, problems)
    return _read_rows(rows, path, images, problems, image_key, caption_key, splits, drop_uncaptioned)


def read_csv(
    path: Path,
    images: ImageFolder,
    problems: Problems,
    *,
    split: str | None = None,
    image_key: str = "image",
    caption_key: str | Sequence[str] = "caption",
    split_key: str | None = None,
    split_values: Mapping[str, Sequence[str]] | None = None,
    drop_uncaptioned: bool = False,
    delimiter: str | None = None,
) -> list[Example]:
    """Read a CSV file with a header line; keys are column names, all else is as in `read_jsonl`.

    Args:
        path: the annotation file.
        images: folder of the images.
        problems: receives errors.
        split: as in `read_jsonl`.
        image_key: as in `read_jsonl`.
        caption_key: as in `read_jsonl`.
        split_key: as in `read_jsonl`.
        split_values: as in `read_jsonl`.
        drop_uncaptioned: as in `read_jsonl`.
        delimiter: character between columns, a tab also as "tab"; None: detected from the header.

    Raises:
        DataError: the file cannot be read.
        UsageError: the options contradict each other.
    """
    splits = Splits(path, split, split_key, split_values)
    needed = [image_key, *_key_list(caption_key), *([split_key] if split_key else [])]
    rows = _csv_rows(path, problems, needed, delimiter)
    return _read_rows(rows, path, images, problems, image_key, caption_key, splits, drop_uncaptioned)


def _read_rows(
    rows: Iterable[Row],
    path: Path,
    images: ImageFolder,
    problems: Problems,
    image_key: str,
    caption_key: str | Sequence[str],
    splits: "Splits",
    drop_uncaptioned: bool,
) -> list[Example]:
    keys = _key_list(caption_key)
    unseen = dict.fromkeys(keys)
    columns: dict[str, None] = {}
    examples: dict[Path, Example] = {}
    for place, record in rows:
        columns |= dict.fromkeys(record)
        for key in [key for key in unseen if key in record]:
            del unseen[key]
        with problems:
            name = splits.of(record, place)
            file, image_id = images.find(field(record, image_key, str, place), place)
            captions = _captions(record, keys, place, problems)
            if not captions and drop_uncaptioned:
                note_uncaptioned(problems, place)
                continue
            if not captions:
                raise DataError(place, f"no text in {' or '.join(map(repr, keys))}", UNCAPTIONED)
            first = examples.get(file)
            if first is None:
                examples[file] = Example(file, captions, image_id, name, place)
            elif first.split == name:
                examples[file] = replace(first, captions=first.captions + captions)
            else:
                raise DataError(place, f"the image of {first.place} again, now in {name}", f"it in {first.split} only")
    if len(keys) > 1:  # with one key, every row that lacks it is already reported
        for key in unseen if columns else ():
            problems.add(str(path), f"no row has the key {key!r}", f"a caption key.{did_you_mean(key, columns)}")
    splits.report_unused(problems)
    return list(examples.values())


def _captions(record: dict[str, Any], keys: list[str], place: str, problems: Problems) -> tuple[str, ...]:
    captions = []
    dropped = 0
    for key in keys:
        value = record.get(key)
        for text in value if isinstance(value, list) else [value]:
            if text is None and len(keys) > 1:
                continue
            if text is None and key not in record:
                raise missing_key(key, record, place)
            if caption := clean_caption(text, place):
                captions.append(caption)
            else:
                dropped += 1
    for _ in range(dropped if captions else 0):
        note_empty_caption(problems, place)
    return tuple(captions)


class Splits:
    """Assignment of rows to splits by a key, or of all rows to one split."""

    def __init__(
        self, path: Path, split: str | None, key: str | None, values: Mapping[str, Sequence[str]] | None
    ) -> None:
        if split is not None and key is not None:
            raise UsageError(f"split_key is {key!r}, but all of {path} is given as {split!r}; drop one")
        if values is not None and key is None:
            raise UsageError("split_values is given without split_key; expected the key these values are in")
        self.path, self.split, self.key = path, split or "train", key
        owner: dict[str, str] = {}
        for name, listed in (values or {}).items():
            for value in [listed] if isinstance(listed, str) else listed:
                other = owner.setdefault(value, name)
                if other != name:
                    raise UsageError(f"split_values: {value!r} is in {other} and in {name}; expected one split")
        self.of_value = None if values is None else owner
        self.rest = None if values and "train" in values else "train"
        self.seen: set[str] = set()

    def of(self, record: dict[str, Any], place: str) -> str:
        """Return the split of a row."""
        if self.key is None:
            return self.split
        value = field(record, self.key, str, place).strip()
        self.seen.add(value)
        if self.of_value is None:
            name = ALIASES.get(value.lower(), value)
        else:
            name = self.of_value.get(value, self.rest)
        if not name:
            known = ", ".join(self.of_value or ALIASES)
            hint = did_you_mean(value, self.of_value or ALIASES)
            raise DataError(place, f"{self.key} is {quote(value)}, in no split", f"{known}.{hint}")
        return name

    def report_unused(self, problems: Problems) -> None:
        """Report listed values that no row has: a typo would silently leave a split short."""
        for value in self.of_value or ():
            if self.seen and value not in self.seen:
                found = f"no row has {self.key} = {value!r}, which split_values lists"
                near = did_you_mean(value, self.seen)
                problems.add(str(self.path), found, f"a value of {self.key}.{near}")


def _key_list(keys: str | Sequence[str]) -> list[str]:
    listed = [keys] if isinstance(keys, str) else list(keys)
    if not listed:
        raise UsageError("caption_key is empty; expected a key or a list of keys")
    return listed


def parse_delimiter(value: str) -> str:
    """Return the delimiter that an option names: one character, or "tab".

    Raises:
        UsageError: something else.
    """
    delimiter = "\t" if value in ("tab", "\\t") else value
    if len(delimiter) != 1 or delimiter in '"\r\n':
        raise UsageError(f"delimiter is {value!r}; expected one character, such as ',' ';' '|', or tab")
    return delimiter


def _delimiter(path: Path, text: str, needed: Sequence[str], given: str | None) -> str:
    if given is not None:
        return parse_delimiter(given)
    return "\t" if path.suffix.lower() == ".tsv" else detect_delimiter(text, needed)


def detect_delimiter(text: str, needed: Sequence[str] = ()) -> str:
    """Choose the delimiter of a CSV file by its header: one that gives all needed columns, else the most columns."""
    headers = {delimiter: _first_cells(text, delimiter)[1] for delimiter in DELIMITERS}
    complete = [delimiter for delimiter, cells in headers.items() if needed and {*needed} <= {*cells}]
    return complete[0] if complete else max(DELIMITERS, key=lambda delimiter: len(headers[delimiter]))


def _csv_rows(path: Path, problems: Problems, needed: list[str], delimiter: str | None) -> Iterator[Row]:
    text = read_text(path)
    delimiter = _delimiter(path, text, needed, delimiter)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    start = 1
    try:
        for row in reader:
            # A quoted field may span lines: a record is named by its first line.
            place, start = f"{path}:{start}", reader.line_num + 1
            cells = [cell.strip() for cell in row]
            if not any(cells) and len(cells) < 2:
                continue
            if not header:
                header = _checked_header(cells, needed, delimiter, place)
            elif len(cells) != len(header):
                problems.add(place, f"{len(cells)} columns", f"{len(header)}, as in the header")
            else:
                yield place, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        problems.add(f"{path}:{start}", f"broken CSV ({error})", 'a closing quote; write a quote inside as ""')


def csv_header(path: Path, delimiter: str | None) -> tuple[str, list[str]]:
    """Return the place and the cells of the header, unchecked; ("", []) if it is broken.

    Raises:
        DataError: no readable text file.
    """
    text = read_text(path)
    line, cells = _first_cells(text, _delimiter(path, text, (), delimiter))
    return (f"{path}:{line}", cells) if cells else ("", [])


def _first_cells(text: str, delimiter: str) -> tuple[int, list[str]]:
    """Return the line number and the cells of the first row that is not blank; (0, []) if it is broken."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line = 1
    try:
        for row in reader:
            start, line = line, reader.line_num + 1
            cells = [cell.strip() for cell in row]
            if any(cells):
                return start, cells
    except csv.Error:  # the reader reports it
        pass
    return 0, []


def _checked_header(cells: list[str], needed: list[str], delimiter: str, place: str) -> list[str]:
    if len(cells) == 1 and (other := next((mark for mark in DELIMITERS if mark in cells[0]), None)):
        expected = f"columns separated by {delimiter!r}; leave the option delimiter out, or set it to {other!r}"
        raise DataError(place, f"one column {quote(cells[0])}", expected)
    if len(set(cells)) != len(cells):
        twice = next(cell for cell in cells if cells.count(cell) > 1)
        raise DataError(place, f"the column {quote(twice)} twice in the header", "each column once")
    for name in needed:
        if name not in cells:
            record = dict.fromkeys(cells)
            found = f"no column {name!r} in the header ({json_type(record).removeprefix('an object with ')})"
            raise DataError(place, found, f"{name!r}.{did_you_mean(name, cells)}")
    return cells
