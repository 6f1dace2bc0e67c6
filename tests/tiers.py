"""How much a test does: little on every change, much with `MMBERT_FULL=1` (`make test-full`)."""

import os

FULL = os.environ.get("MMBERT_FULL", "") not in ("", "0")


def tier(fast: int, full: int) -> int:
    """The number for the tier that runs."""
    return full if FULL else fast
