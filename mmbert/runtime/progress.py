"""Progress of a long loop: a bar on a terminal, log lines elsewhere."""

import logging
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger("mmbert")

SECONDS_PER_LOG_LINE = 10.0


class ProgressLog:
    """Progress bar with the time left on a terminal, log lines at intervals elsewhere.

    Args:
        name: Name in the lines.
        total: Number of items.
        unit: What the items are.
    """

    def __init__(self, name: str, total: int, unit: str = "images"):
        self.name, self.total, self.unit, self.done = name, total, unit, 0
        self._started = self._last = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True) if sys.stderr.isatty() else None
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(name, total=total)

    def add(self, count: int) -> None:
        """Count items."""
        self.done += count
        now = time.monotonic()
        if self._bar is not None:
            self._bar.advance(self._task, count)
        elif now - self._last >= SECONDS_PER_LOG_LINE:
            self._last = now
            left = (now - self._started) / max(1, self.done) * (self.total - self.done)
            done, total = f"{self.done:,}", f"{self.total:,}"
            log.info("%s: %s of %s %s, about %.0f s left", self.name, done, total, self.unit, left)

    def stop(self) -> None:
        """Remove the bar, and log the time that it took."""
        if self._bar is not None:
            self._bar.stop()
        log.info("%s: %s %s in %.1f s", self.name, f"{self.done:,}", self.unit, time.monotonic() - self._started)
