"""Exclusive file locks: one process per comparison folder, one process per arm."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmbert.errors import UsageError


@contextmanager
def file_lock(file: Path, *, wait: bool) -> Iterator[None]:
    """Hold an exclusive lock on a file; the operating system releases it if the process is killed.

    Args:
        file: Lock file, created if it is missing.
        wait: Wait until another process releases the lock.

    Raises:
        BlockingIOError: Another process holds the lock, and `wait` is false.
        UsageError: The operating system has no such locks.
    """
    try:
        import fcntl  # here, so that mmbert can be imported on systems without it
    except ImportError:
        raise UsageError(
            "mmbert compare requires Linux or macOS: it uses file locks of Python's module fcntl."
        ) from None
    with file.open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
