"""Atomic file writes."""

import os
from pathlib import Path


def atomic_write_text(path: Path, text: str) -> None:
    """Atomically write a UTF-8 text file: readers see the old content or the new one, never a part.

    Raises:
        OSError: The disk is full, or permissions are missing; the old file is unchanged.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
