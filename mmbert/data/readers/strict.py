"""Strict readers of JSON, JSON lines and text; every error is a `DataError` with its place."""

import gc
import json
import os
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar

from mmbert.data.readers.base import Problems, json_type
from mmbert.errors import DataError, did_you_mean, quote

MAX_FILE_BYTES = 1 << 32
MAX_LINE_BYTES = 1 << 24
MAX_INT_DIGITS = 20
"""Longest whole number accepted; 64-bit ids need 20 characters."""

Value = TypeVar("Value")


class _Rejected(ValueError):
    """Error for a value that Python's JSON parser accepts and this reader does not."""


def read_text(path: Path) -> str:
    """Return the file as text: UTF-8, with or without a byte order mark.

    Raises:
        DataError: no readable regular file, too large, empty, or not UTF-8 text.
    """
    with _open(path) as file:
        data = file.read()
    text = _decode(data, str(path))
    if not text.strip():
        raise DataError(str(path), "the file is empty", "annotations")
    return text


def load_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Errors beside broken syntax: NaN and Infinity, a key twice in one object, very long whole numbers and
    nesting deeper than Python's recursion limit.

    Raises:
        DataError: with the line and column where they are known.
    """
    return _parse(read_text(path), str(path), line=None)


def iter_json_lines(path: Path, problems: Problems) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place ("FILE:LINE") and the object of each line; blank lines are skipped.

    A bad line is added to `problems` and skipped, so that one pass finds them all.

    Raises:
        DataError: no readable regular file, or it holds nothing.
    """
    with _open(path) as file:
        offset, seen, number = 0, False, 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            place = f"{path}:{number}"
            if len(line) > MAX_LINE_BYTES:
                problems.add(place, f"a line longer than {MAX_LINE_BYTES:,} bytes", "one record per line")
                return
            with problems:
                text = _decode(line, place, offset).strip()
                seen = seen or bool(text)
                if text:
                    if number == 1 and text[0] == "[":
                        problems.add(place, "the start of a JSON list", "JSON lines: one object per line")
                        return
                    yield place, expect(_parse(text, str(path), line=number), dict, "the line", place)
            offset += len(line)
        if not seen and not problems.total:
            raise DataError(str(path), "the file is empty", "one JSON object per line")


def expect(value: object, kind: type[Value], name: str, place: str) -> Value:
    """Return `value` if it is a `kind` (true and false are not numbers).

    Raises:
        DataError: it is something else.
    """
    if isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool):
        return value
    names = {str: "a string", int: "a whole number", list: "a list", dict: "an object"}
    raise DataError(place, f"{name} is {json_type(value)}", names.get(kind, kind.__name__))


def field(record: dict[str, Any], key: str, kind: type[Value], place: str) -> Value:
    """Return `record[key]`, which must be a `kind`.

    Raises:
        DataError: the key is missing (the message lists the keys there are) or its value is something else.
    """
    if key not in record:
        raise missing_key(key, record, place)
    return expect(record[key], kind, key, place)


def missing_key(key: str, record: dict[str, Any], place: str) -> DataError:
    """Create the error for a record that lacks `key`, with the keys it has."""
    return DataError(place, f"no key {key!r} in {json_type(record)}", f"{key!r}.{did_you_mean(key, record)}")


def _open(path: Path) -> BinaryIO:
    try:
        # Without O_NONBLOCK, opening a named pipe waits for a writer for ever.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise DataError(str(path), "no such file", "an annotation file") from None
    except (OSError, ValueError) as error:  # ValueError: NUL or a lone surrogate in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(str(path), f"cannot be opened ({reason})", "a readable annotation file") from None
    info = os.fstat(handle)
    regular = stat.S_ISREG(info.st_mode)
    if regular and info.st_size <= MAX_FILE_BYTES:
        return os.fdopen(handle, "rb")
    os.close(handle)
    if not regular:
        raise DataError(str(path), "not a regular file", "an annotation file")
    raise DataError(
        str(path), f"{info.st_size:,} bytes", f"at most {MAX_FILE_BYTES:,}; use JSON lines in several files"
    )


def _decode(data: bytes, place: str, offset: int = 0) -> str:
    """Decode UTF-8; `offset` is where `data` starts in its file, in bytes."""
    for start, name in ((b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"), (b"\x1f\x8b", "gzip")):
        if data.startswith(start) and offset == 0:
            fix = "unpack it first" if name == "gzip" else "save it as UTF-8"
            raise DataError(place, f"{name} data", f"UTF-8 text; {fix}")
    if (nul := data.find(b"\0")) >= 0:
        raise DataError(place, f"a NUL byte at byte offset {offset + nul}", "UTF-8 text (is it UTF-16?)")
    try:
        return data.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{data[error.start]:02x} at byte offset {offset + error.start} is not UTF-8"
        raise DataError(place, found, "UTF-8 text; save the file as UTF-8") from None


def _parse(text: str, path: str, line: int | None) -> Any:
    """Parse one JSON text; `line` is its number in a file of JSON lines."""
    collecting = gc.isenabled()
    gc.disable()  # a tree of millions of records holds no cycles, and looking for them takes a third of the time
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        place = f"{path}:{line or error.lineno}:{error.colno}"
        near = text[error.pos : error.pos + 20]
        found = f"broken JSON: {error.msg}" + (f" at {quote(near)}" if near else ", the text ends here")
        raise DataError(place, found, "JSON; is the file cut off, or a comma or quote wrong?") from None
    except RecursionError:
        place = path if line is None else f"{path}:{line}"
        raise DataError(place, "JSON nested too deep to read", "a few levels") from None
    except _Rejected as error:
        position = _locate(text)
        row = line or text.count("\n", 0, position) + 1
        column = position - (text.rfind("\n", 0, position) + 1) + 1
        raise DataError(f"{path}:{row}:{column}", *error.args) from None
    finally:
        if collecting:
            gc.enable()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Answers and types come back many times: one copy of each saves a third of the memory of VQA's annotations.
    record = {key: sys.intern(value) if type(value) is str and len(value) < 32 else value for key, value in pairs}
    if len(record) != len(pairs):
        raise _Rejected("the same key twice in one object", "each key once")
    return record


def _reject_constant(name: str) -> NoReturn:
    raise _Rejected(f"the number {name}", "valid JSON, which has no NaN or Infinity; write null")


def _short_int(digits: str) -> int:
    if len(digits) > MAX_INT_DIGITS:
        raise _Rejected(f"a whole number of {len(digits):,} digits", f"at most {MAX_INT_DIGITS} digits")
    return int(digits)


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_reject_constant, parse_int=_short_int)
# A number ends where Python's parser ends it: behind "12-" there is a syntax error, but 12 was read before.
_TOKEN = re.compile(r'("(?:[^"\\]|\\.)*")(\s*:)?|[{}\[\]]|-?Infinity|NaN|-?[0-9]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?')


def _locate(text: str) -> int:
    """Find the offset of the first value that a parser hook rejected; hooks do not get offsets.

    Args:
        text: JSON with right syntax at least up to that value.
    """
    keys: list[set[str]] = []
    for token in _TOKEN.finditer(text):
        word = token.group()
        if word in "{[":
            keys.append(set())
        elif word in "}]":
            keys.pop()
        elif word[0] == '"':
            if token.group(2):
                key = json.loads(token.group(1), strict=False)
                if key in keys[-1]:
                    return token.start()
                keys[-1].add(key)
        elif word[-1] in "yN" or (len(word) > MAX_INT_DIGITS and word.lstrip("-").isdigit()):
            return token.start()
    return 0
