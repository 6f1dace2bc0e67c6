"""Files that are the old one or the new one, whatever happens in between."""

import os
from pathlib import Path


def atomic_write_text(path: Path, text: str) -> None:
    """Atomically write a text file: readers see the old content or the new one, never a part.

    Raises:
        OSError: The disk is full, or rights are missing; the old file is left as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
