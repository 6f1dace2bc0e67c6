"""Append-only file of rows with checksums, found by a digest: survives a kill at any moment and detects damage."""

import json
import logging
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmbert.runtime.files import atomic_write_text

log = logging.getLogger("mmbert")

DIGEST_BYTES = 16
RECORD = np.dtype([("digest", f"V{DIGEST_BYTES}"), ("row_sum", "<u4"), ("record_sum", "<u4")])
"""Record of a row in the index: what the row is found by, the CRC-32 of the row, and that of the record before it."""
META, ROWS, INDEX = "meta.json", "rows.bin", "index.bin"


class RowStore:
    """Rows of one size in `rows.bin`, read through a memory map, and a record for each in `index.bin`.

    A row is written before its record, so a record whose checksums agree stands for a complete row. A process that
    writes must hold a lock of its own; others may read the rows that were there when they opened the store.

    Args:
        folder: Created where it is missing.
        facts: What the rows were computed from, written to `meta.json`; a store with other facts is emptied.
        row_bytes: Size of a row.

    Raises:
        OSError: The folder can't be written.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], row_bytes: int):
        self.folder, self.row_bytes = folder, row_bytes
        self._facts = json.dumps({**facts, "row_bytes": row_bytes}, sort_keys=True, indent=1) + "\n"
        self._slots: dict[bytes, int] = {}
        self._count = 0  # slots in the file, valid or not
        self._map: np.ndarray | None = None
        self._open()

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._slots

    def __getitem__(self, digest: bytes) -> np.ndarray:
        """Return a row as (row_bytes,) uint8, a view of the memory map.

        Raises:
            KeyError: There is no such row.
        """
        slot = self._slots[digest]
        if self._map is None or slot >= len(self._map):
            self._map = self._map_rows()
        return self._map[slot]

    def __getstate__(self) -> dict[str, Any]:
        """Leave the memory map out, which pickling would copy."""
        return {**self.__dict__, "_map": None}

    def append(self, digests: Sequence[bytes], rows: np.ndarray) -> None:
        """Write (K, row_bytes) uint8 rows, then their records.

        Raises:
            OSError: The disk is full; the rows before are kept.
        """
        content = np.ascontiguousarray(rows)
        records = np.array([(d, zlib.crc32(row), 0) for d, row in zip(digests, content, strict=True)], dtype=RECORD)
        records["record_sum"] = [_record_sum(record) for record in records]
        _write_at(self.folder / ROWS, self._count * self.row_bytes, content)
        _write_at(self.folder / INDEX, self._count * RECORD.itemsize, records)
        self._slots |= {digest: self._count + i for i, digest in enumerate(digests)}
        self._count += len(digests)

    def _map_rows(self) -> np.ndarray:
        """Map the complete rows of the file, (N, row_bytes) uint8."""
        count = (self.folder / ROWS).stat().st_size // self.row_bytes
        if count == 0:  # which can't be mapped
            return np.empty((0, self.row_bytes), dtype=np.uint8)
        # Copy-on-write, since torch warns of arrays that can't be written.
        return np.memmap(self.folder / ROWS, dtype=np.uint8, mode="c", shape=(count, self.row_bytes))

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        meta, rows, index = (self.folder / name for name in (META, ROWS, INDEX))
        found = meta.read_text(encoding="utf-8", errors="replace") if meta.is_file() else None
        if found != self._facts:
            if rows.is_file() or index.is_file():
                log.warning("encoder cache %s: filled by other weights or another mmbert, so it is filled anew", meta)
            for file in (index, rows):  # unlinked, not emptied: another process may be reading the rows
                file.unlink(missing_ok=True)
            atomic_write_text(meta, self._facts)
        for file in (rows, index):
            file.touch()
        records = np.frombuffer(index.read_bytes()[: index.stat().st_size // RECORD.itemsize * RECORD.itemsize], RECORD)
        self._count = len(records)
        self._map = self._map_rows()  # kept: should another process empty the store, these rows are still there
        damaged = 0
        for slot, record in enumerate(records):
            valid = slot < len(self._map) and record["record_sum"] == _record_sum(record)
            if valid and zlib.crc32(self._map[slot]) == record["row_sum"]:
                self._slots[record["digest"].tobytes()] = slot
            else:
                damaged += 1
        if damaged:
            log.warning("encoder cache %s: %d of %d rows are damaged and are computed anew", rows, damaged, self._count)


def _record_sum(record: Any) -> int:
    return zlib.crc32(record.tobytes()[: DIGEST_BYTES + 4])


def _write_at(file: Path, offset: int, content: np.ndarray) -> None:
    """Write an array at an offset and wait until it is on the disk."""
    with open(file, "r+b") as handle:
        handle.seek(offset)
        handle.write(content.tobytes())
        handle.flush()
        os.fsync(handle.fileno())
