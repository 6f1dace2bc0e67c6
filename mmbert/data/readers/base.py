"""Shared parts of the annotation readers: examples, the list of problems, the image folder."""

import logging
import os
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Self
from urllib.parse import unquote

from mmbert.errors import DataError, describe, quote

logger = logging.getLogger("mmbert")


@dataclass(frozen=True, slots=True)
class Example:
    """One image of an annotation file with its captions."""

    image: Path
    """Image file: links resolved, inside the image root, known to exist."""
    captions: tuple[str, ...]
    """At least one; none empty, no white space at the ends."""
    image_id: str
    """Unique in its split."""
    split: str
    """train, val, test, or another name the file gives, such as test_seen."""
    place: str
    """Record of the file, "FILE:RECORD", for messages."""

    @property
    def contents(self) -> tuple[str, ...]:
        """Strings that identify the example, for the checksum of the training data."""
        return (self.image.name, *self.captions)


class Problems:
    """Collector of an annotation file's errors, so that one run reports many of them.

    A `DataError` raised inside `with problems:` is added, and execution continues after the block.

    Args:
        limit: errors listed in the final message; the rest is only counted.
        strict: notes are errors too, each with its own place.
        remarks: receives each note with its own place.
    """

    def __init__(self, limit: int = 10, *, strict: bool = False, remarks: "Problems | None" = None) -> None:
        self.limit = limit
        self.remarks = self if strict else remarks
        self.listed: list[tuple[str, str, str]] = []
        self.total = 0
        self.notes: dict[str, tuple[int, str]] = {}
        """Things dropped without being an error: kind -> (count, first place)."""

    def add(self, place: str, found: str, expected: str) -> None:
        """Add one error; the arguments are those of `DataError`."""
        self.total += 1
        if len(self.listed) < self.limit:
            self.listed.append((place, found, expected))

    def note(self, kind: str, place: str, found: str, expected: str) -> None:
        """Count something that is no error, such as an empty caption dropped among good ones.

        Args:
            kind: what is counted, for the one line of the log.
            place: as in `add`.
            found: as in `add`; used where notes are listed (`strict`, `remarks`).
            expected: as `found`.
        """
        if self.remarks is not None:
            self.remarks.add(place, found, expected)
            return
        count, first = self.notes.get(kind, (0, place))
        self.notes[kind] = (count + 1, first)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if isinstance(error, DataError):
            self.add(error.place, error.found, error.expected)
            for line in error.others:
                self.add(line, "", "")
            return True
        return False

    def raise_if_any(self) -> None:
        """Raise one `DataError` that lists all errors.

        Raises:
            DataError: at least one error was added.
        """
        if not self.listed:
            return
        others = [describe(*problem) for problem in self.listed[1:]]
        if self.total > len(self.listed):
            others.append(f"... and {self.total - len(self.listed):,} more problems")
        raise DataError(*self.listed[0], others=tuple(others))

    def log_notes(self) -> None:
        """Log one warning for each kind of thing that was dropped."""
        for kind, (count, first) in self.notes.items():
            logger.warning("%s: %s (first: %s)", kind, f"{count:,}", first)


class NoImageError(DataError):
    """Error for an image name without a file in the folder; `has_hint` if a similar name exists or is suggested."""

    has_hint = False


class ImageFolder:
    """Resolver of an annotation file's image names to files that exist inside one folder.

    Every folder is listed once, so 120,000 names cost a few folder scans and no call per image.

    Args:
        root: the folder; no image may lie outside it, not even through a link.

    Raises:
        DataError: `root` is not a folder.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = os.path.realpath(root)
        if not os.path.isdir(self.root):
            raise DataError(os.fspath(root), "no such folder", "the folder with the images; check data.images")
        self._folders: dict[str, tuple[Path, dict[str, os.DirEntry[str]]]] = {}
        self._hints_left = 20

    def find(self, name: str, place: str) -> tuple[Path, str]:
        """Return the image file called `name`, and its name in plain form ("a.jpg" for "./a.jpg").

        Args:
            name: path relative to the root, with forward slashes.
            place: record that names the image, for the message.

        Raises:
            NoImageError: there is no such file.
            DataError: the name leaves the root, or is not that of a file.
        """
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.name:
            raise DataError(place, f"the image name {quote(name)}", f"a relative path without '..' inside {self.root}")
        folder, entries = self._list(str(path.parent), name, place)
        entry = entries.get(path.name)
        if entry is None:
            raise self._no_image(name, place, "it", self._other_spelling(path, entries))
        file = folder / path.name
        if entry.is_symlink():
            file = self._inside(str(file), name, place)
        if not _is_file(entry):
            raise DataError(place, f"{quote(name)} is not a file", "an image file")
        return file, str(path)

    def _list(self, parent: str, name: str, place: str) -> tuple[Path, dict[str, os.DirEntry[str]]]:
        if parent not in self._folders:
            try:
                folder = self._inside(os.path.join(self.root, parent), name, place)
                with os.scandir(folder) as entries:
                    self._folders[parent] = folder, {entry.name: entry for entry in entries}
            except PermissionError:
                raise DataError(
                    place, f"no permission to list the folder of {quote(name)}", "a readable folder"
                ) from None
            except (OSError, ValueError):  # ValueError: NUL or a lone surrogate in the name
                # Not remembered: a wrong folder name is rare, and a typo may be in every record.
                raise self._no_image(name, place, "its folder", "") from None
        return self._folders[parent]

    def _no_image(self, name: str, place: str, missing: str, other_spelling: str) -> NoImageError:
        hint = self._hint(name) or other_spelling
        error = NoImageError(place, f"no image file {quote(name)}", f"{missing} inside {self.root}.{hint}")
        error.has_hint = bool(hint)
        return error

    def _hint(self, name: str) -> str:
        """Explain a name that was written on Windows, for a URL, or in another Unicode form."""
        if "\\" in name:
            fixed = re.sub(r"^[A-Za-z]:", "", name).replace("\\", "/").lstrip("/")
            return f" Write forward slashes{f': {fixed!r}' if self._is_file(fixed) else ', relative to that folder'}."
        if re.search(r"%[0-9A-Fa-f]{2}", name):
            fixed = unquote(name)
            there = f"there is {quote(fixed)}" if self._is_file(fixed) else "percent escapes are not resolved"
            return f" Names are taken literally: {there}."
        for form in () if name.isascii() else ("NFC", "NFD"):
            fixed = unicodedata.normalize(form, name)
            if fixed != name and self._is_file(fixed):
                return f" There is {fixed!a}, the same name in Unicode form {form}, instead of {name!a}."
        return ""

    def _is_file(self, name: str) -> bool:
        try:
            return ".." not in name.split("/") and os.path.isfile(os.path.join(self.root, name.lstrip("/")))
        except ValueError:  # NUL or a lone surrogate in the name
            return False

    def _inside(self, path: str, name: str, place: str) -> Path:
        real = os.path.realpath(path)
        if os.path.commonpath([real, self.root]) != self.root:
            raise DataError(
                place,
                f"the image {quote(name)} is a link to {real}",
                f"a file inside {self.root}; copy it there, or give the folder that holds both",
            )
        return Path(real)

    def _other_spelling(self, path: PurePosixPath, entries: dict[str, os.DirEntry[str]]) -> str:
        """Find a file that differs only in case or suffix; limited to a few times, as it scans the folder's list."""
        if self._hints_left == 0:
            return ""
        self._hints_left -= 1
        stem = path.stem.lower()
        match = next((name for name in entries if name.rpartition(".")[0].lower() == stem), None)
        return f" There is {str(path.with_name(match))!r}." if match else ""


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a loop of links
        return False


UNCAPTIONED = "at least one caption; data.drop_uncaptioned=true drops images without one"
"""Expectation in the error of an image without a caption."""


def note_uncaptioned(problems: Problems, place: str) -> None:
    """Count an image without a caption that was dropped."""
    problems.note("images without a caption dropped", place, "no caption", "at least one")


def note_empty_caption(problems: Problems, place: str) -> None:
    """Count an empty caption that was dropped."""
    problems.note("empty captions dropped", place, "an empty caption", "text, or no caption")


def clean_caption(text: object, place: str) -> str:
    """Return the caption without white space at its ends; it may be empty then.

    Raises:
        DataError: it is not text, or not valid Unicode (which a tokenizer cannot read).
    """
    if not isinstance(text, str):
        raise DataError(place, f"the caption is {json_type(text)}", "a string")
    try:
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            place, f"half a surrogate pair at character {error.start} of the caption", "valid Unicode"
        ) from None
    return text.strip()


def json_type(value: object) -> str:
    """Name a value the way JSON does, with the value itself when it is short: "the number 3", "null"."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return f"the number {value}"
        case str():
            return f"the string {quote(value, 40)}"
        case list():
            return f"a list of {len(value)}"
        case dict():
            return "an object with " + (", ".join(quote(key, 20) for key in list(value)[:4]) or "no keys")
    return f"a {type(value).__name__}"
