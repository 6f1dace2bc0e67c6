"""SIGTERM, SIGINT and SIGUSR1: finish the optimizer step, save, exit with a code that a scheduler understands."""

import logging
import multiprocessing
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, ClassVar

log = logging.getLogger("mmbert")

EXIT_CODES = {"SIGTERM": 143, "SIGINT": 130, "SIGUSR1": 75}
"""Exit code of a run that each signal ended; 75 (EX_TEMPFAIL of sysexits.h) asks to be queued again."""


class StopSignals:
    """Context manager that handles SIGTERM, SIGINT and SIGUSR1.

    Outside of training there is nothing to save, so a signal ends the process at once, with its exit code. During
    training (`defer`) the code is kept in `exit_code` until the end of the optimizer step; a second signal ends the
    process at once.

    Python runs signal handlers in the main thread only, so entered in another thread it handles no signals and changes
    nothing.
    """

    _num_entered: ClassVar[int] = 0

    def __init__(self) -> None:
        self.exit_code = 0
        """Exit code of the signal that was received; 0 = none."""
        self._deferred = False
        self._previous_handlers: dict[int, Any] = {}
        self._previous_children: list[Any] | None = None

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._previous_handlers = self._install_handlers()
            self._previous_children = multiprocessing.active_children()
            StopSignals._num_entered += 1
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous_children is None:
            return
        StopSignals._num_entered -= 1
        for number, handler in self._previous_handlers.items():
            if handler is not None:  # None: installed by other means than Python, which can't restore it
                signal.signal(number, handler)
        # After an error the DataLoader's workers are still running, and at exit Python would wait for them for ever,
        # since they ignore the SIGTERM that it sends them.
        workers = [p for p in multiprocessing.active_children() if p.daemon and p not in self._previous_children]
        child = getattr(signal, "SIGCHLD", None)
        # torch's handler would raise where one of its workers is killed.
        handler = signal.signal(child, signal.SIG_DFL) if workers and child else None
        for process in workers:
            process.kill()
            process.join()
        if handler is not None and child:
            signal.signal(child, handler)
        self._previous_children = None

    @classmethod
    def worker_init_fn(cls) -> Callable[[int], None] | None:
        """`worker_init_fn` for a `DataLoader`; None while no `StopSignals` is entered."""
        return ignore_signals_in_worker if cls._num_entered else None

    def defer(self, deferred: bool) -> None:
        """Set whether a signal waits for the end of the optimizer step from now on."""
        self._deferred = deferred
        if deferred and self._previous_handlers:
            self._install_handlers()  # replaces Lightning's handler of SIGTERM, which would exit with 0

    def exit_gracefully(self) -> None:
        """End the process with the exit code of the signal that was received.

        Raises:
            SystemExit: Always, with `exit_code`.
        """
        raise SystemExit(self.exit_code)

    def _install_handlers(self) -> dict[int, Any]:
        """Install the handler of each signal that this system has, and return the previous handlers."""
        known = [getattr(signal, name) for name in EXIT_CODES if hasattr(signal, name)]
        return {int(number): signal.signal(number, self._handle) for number in known}

    def _handle(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not self._deferred or self.exit_code:
            raise SystemExit(EXIT_CODES[name])
        self.exit_code = EXIT_CODES[name]
        log.warning("%s: finishing the optimizer step, then saving; send it again to exit at once", name)


def ignore_signals_in_worker(_: int) -> None:
    """Ignore the signals in a `DataLoader` worker: the optimizer step that is being finished may need its batches."""
    for name in EXIT_CODES:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
