"""Files of an index of images: append-only parts that survive a kill, and the merged part.

- `index.json`: model, its hash, folder of the images.
- `000004-merged.vectors` and `.jsonl`: (N, E) fp16, and a line for each image. Written at the end of indexing.
- `000005-rank-0000.vectors` and `.jsonl`: what a process of an unfinished run appended; later numbers have priority.
- `000004-merged.faiss`: approximate index, only with `--faiss`.
"""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmbert.errors import DataError, UsageError, printable
from mmbert.runtime.files import atomic_write_text

FACTS_FILE = "index.json"
VECTORS, MANIFEST, APPROXIMATE = ".vectors", ".jsonl", ".faiss"
ROWS_PER_COMMIT, SECONDS_PER_COMMIT = 4096, 10.0
"""Images, and seconds, after which vectors are written: what a kill can cost."""


class Entry(NamedTuple):
    """State of an image file when it was indexed, and the place of its vector."""

    file: str  # relative to the folder, with "/"
    size: int  # bytes; -1: there was no file
    mtime_ns: int
    digest: str = ""  # of its content
    error: str = ""  # why it can't be read; it has no vector then
    part: int = -1
    row: int = -1


@dataclass(frozen=True)
class IndexFacts:
    """What all vectors of an index have in common: the content of `index.json`."""

    model: str
    """Folder of the model."""
    model_hash: str
    """See `model_hash`."""
    embedding_size: int
    folder: str
    """Absolute path of the folder with the images."""
    format: int = 1
    """Version of the file format."""

    @classmethod
    def read(cls, index: Path) -> "IndexFacts":
        """Read `index.json`.

        Raises:
            UsageError: The folder is no index.
            DataError: The file is broken, or of another version.
        """
        file = index / FACTS_FILE
        if not file.is_file():
            make = f"mmbert index RUN/model FOLDER --out {printable(str(index))}"
            raise UsageError(f"'{index}' is no index: it has no {FACTS_FILE}; make one by {make}.")
        try:
            facts = cls(**json.loads(file.read_text(encoding="utf-8")))
            types = [type(value) for value in asdict(facts).values()]
            if types != [str, str, int, str, int] or facts.format != 1 or facts.embedding_size < 1:
                raise ValueError(f"unexpected values, or format {facts.format}")
        except (OSError, ValueError, TypeError) as error:
            raise DataError(str(file), str(error), "what mmbert index writes; make the index anew") from error
        return facts


def read_parts(
    index: Path, embedding_size: int, *, drop_missing: bool = False, before: int | None = None
) -> tuple[dict[str, Entry], list[np.ndarray], list[Path]]:
    """Read the manifests and map the vectors of all parts; an incomplete last line is what a kill left, and ignored.

    Args:
        index: Folder of the index.
        embedding_size: E.
        drop_missing: Leave out entries whose vectors are missing, so that they can be computed anew.
        before: Read only parts with smaller numbers; None: all.

    Returns:
        The entries by file, the vectors (N, E) fp16 of each part, and the manifest of each part.

    Raises:
        DataError: A broken line, or fewer vectors than lines.
    """
    entries: dict[str, Entry] = {}
    manifests = [file for file in sorted(index.glob(f"*{MANIFEST}")) if before is None or part_number(file) < before]
    parts = [_map_vectors(manifest.with_suffix(VECTORS), embedding_size) for manifest in manifests]
    for part, manifest in enumerate(manifests):
        with manifest.open(encoding="ascii", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith("\n"):
                    break
                try:
                    entry = Entry(**json.loads(line), part=part)
                    if (bool(entry.error), entry.row >= 0) not in ((True, False), (False, True)):
                        raise ValueError("either an error or a row")
                    entries[entry.file] = entry
                except (ValueError, TypeError) as error:
                    raise DataError(
                        f"{manifest}:{number}", "a broken line", "a complete index; make it anew"
                    ) from error
    for entry in [entry for entry in entries.values() if entry.row >= len(parts[entry.part])]:
        if not drop_missing:
            raise DataError(
                str(manifests[entry.part].with_suffix(VECTORS)),
                f"truncated: {len(parts[entry.part]):,} vectors, but the manifest has number {entry.row + 1:,}",
                "all of them; run mmbert index once more, which computes the missing ones",
            )
        del entries[entry.file]
    return entries, parts, manifests


def is_merged(manifests: Sequence[Path]) -> bool:
    """Return whether indexing was finished, which leaves a single part."""
    return len(manifests) == 1 and manifests[0].stem.endswith("-merged")


def part_number(manifest: Path) -> int:
    """Return the number that the name of a part starts with."""
    return int(manifest.name.split("-")[0])


def _map_vectors(file: Path, embedding_size: int) -> np.ndarray:
    count = file.stat().st_size // (2 * embedding_size) if file.is_file() else 0
    if count == 0:  # which can't be mapped
        return np.empty((0, embedding_size), dtype=np.float16)
    # Copy-on-write, since torch warns of arrays that can't be written.
    return np.memmap(file, dtype=np.float16, mode="c", shape=(count, embedding_size))


class PartWriter:
    """Append-only vectors and manifest; a line is written when its vector is on the disk."""

    def __init__(self, index: Path, name: str):
        self._vectors = (index / f"{name}{VECTORS}").open("xb")
        self._manifest = (index / f"{name}{MANIFEST}").open("xb")
        self._rows, self._last = 0, time.monotonic()
        self._new: list[np.ndarray] = []
        self._lines: list[str] = []

    def add(self, entries: Sequence[Entry], vectors: np.ndarray | None = None) -> None:
        """Add entries, with vectors (N, E) fp16 or, being unreadable, without."""
        for entry in entries:
            self._lines.append(_line(entry, self._rows))
            self._rows += vectors is not None
        self._new += [] if vectors is None else [vectors]
        if len(self._lines) >= ROWS_PER_COMMIT or time.monotonic() - self._last >= SECONDS_PER_COMMIT:
            self.commit()

    def commit(self) -> None:
        """Write what was added, the vectors first."""
        vectors, lines = b"".join(rows.tobytes() for rows in self._new), "".join(self._lines).encode()
        for file, content in ((self._vectors, vectors), (self._manifest, lines)):
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self._new, self._lines, self._last = [], [], time.monotonic()

    def close(self) -> None:
        """Close the files."""
        self._vectors.close()
        self._manifest.close()


def write_merged(merged: Path, entries: dict[str, Entry], parts: list[np.ndarray]) -> None:
    """Write one part with the vectors in the order of the entries; its manifest appears with all of its content."""
    lines, row = [], 0
    with merged.with_suffix(VECTORS).open("wb") as vectors:
        for entry in entries.values():
            lines.append(_line(entry, row))
            if not entry.error:
                vectors.write(parts[entry.part][entry.row].tobytes())
                row += 1
        vectors.flush()
        os.fsync(vectors.fileno())
    manifest = merged.with_suffix(MANIFEST)
    atomic_write_text(manifest, "".join(lines))
    with manifest.open("rb") as file:  # the parts are removed next, so it must be on the disk
        os.fsync(file.fileno())


def _line(entry: Entry, row: int) -> str:
    line: dict[str, Any] = {"file": entry.file, "size": entry.size, "mtime_ns": entry.mtime_ns}
    line |= {"error": entry.error} if entry.error else {"digest": entry.digest, "row": row}
    return json.dumps(line) + "\n"
