"""SIGTERM, SIGINT and SIGUSR1: finish the step, save, leave with a code that a scheduler understands."""

import logging
import multiprocessing
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any, ClassVar

log = logging.getLogger("mmbert")

EXIT_CODES = {"SIGTERM": 143, "SIGINT": 130, "SIGUSR1": 75}
"""What a run exits with; 75 (EX_TEMPFAIL of sysexits.h) asks to be queued again."""


class StopSignals:
    """Takes the signals while it is entered.

    Outside of training nothing is to be saved, so a signal ends the process at once, with its code. Within training
    (`defer`) it is kept in `code` for the end of the optimizer step; a second signal ends the process at once.
    """

    _entered: ClassVar[int] = 0

    def __init__(self) -> None:
        self.code = 0
        """Exit code of the signal that has come; 0 = none."""
        self._deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        self._before = self._install()
        self._children = multiprocessing.active_children()
        StopSignals._entered += 1
        return self

    def __exit__(self, *_: object) -> None:
        StopSignals._entered -= 1
        for number, handler in self._before.items():
            signal.signal(number, handler)
        # After an error the loader's processes are still there, and Python would wait for them at its end: for ever,
        # since they ignore the SIGTERM that it sends them.
        left = [p for p in multiprocessing.active_children() if p.daemon and p not in self._children]
        child = getattr(signal, "SIGCHLD", None)
        # torch's handler would raise where one of its processes is killed.
        handler = signal.signal(child, signal.SIG_DFL) if left and child else None
        for process in left:
            process.kill()
            process.join()
        if handler is not None and child:
            signal.signal(child, handler)

    @classmethod
    def worker_init_fn(cls) -> Callable[[int], None] | None:
        """What the loader's processes start with: nothing where nobody takes the signals."""
        return ignore_signals_in_worker if cls._entered else None

    def _install(self) -> dict[int, Any]:
        known = {name: getattr(signal, name) for name in EXIT_CODES if hasattr(signal, name)}
        return {int(number): signal.signal(number, self._received) for number in known.values()}

    def defer(self, deferred: bool) -> None:
        """Whether signals wait for the end of a step from now on."""
        self._deferred = deferred
        if deferred and self._before:
            self._install()  # Lightning's handler for SIGTERM, which would exit with 0, stands here by now

    def _received(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not self._deferred or self.code:
            raise SystemExit(EXIT_CODES[name])
        self.code = EXIT_CODES[name]
        log.warning("%s: finishing the step, then saving; once more to leave at once", name)

    def leave(self) -> None:
        """Ends the process with the code of the signal that has come."""
        raise SystemExit(self.code)


def ignore_signals_in_worker(_: int) -> None:
    """Lets the loader's processes live on: they go when the run goes, and a step may need their batches."""
    for name in EXIT_CODES:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
