"""Check output paths before the work, and write files atomically."""

import os
from pathlib import Path

from mmbert.errors import UsageError


def check_output_file(path: str | Path | None, option: str = "--out") -> None:
    """Raise before the work if a file can't be written there; None is no file.

    Raises:
        UsageError: The path is a folder, its folder does not exist, or permissions are missing.
    """
    if path is None:
        return
    path = Path(path)
    if path.is_dir():
        reason = "is a folder"
    elif not path.parent.is_dir():
        reason = "its folder does not exist"
    elif not os.access(path if _is_special(path) else path.parent, os.W_OK):
        reason = "no permission to write it"
    else:
        return
    raise UsageError(f"{option} {path}: {reason}; give a file.")


def atomic_write_text(path: Path, text: str) -> None:
    """Atomically write a UTF-8 text file: readers see the old content or the new one, never a part.

    A device or pipe, such as /dev/stdout, is written directly.

    Raises:
        OSError: The disk is full, or permissions are missing; the old file is unchanged.
    """
    if _is_special(path):
        path.write_text(text, encoding="utf-8")
        return
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _is_special(path: Path) -> bool:
    """Whether it is a device or a pipe."""
    return path.exists() and not path.is_file()
