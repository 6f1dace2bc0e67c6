"""Signal handlers are installed in the main thread only; elsewhere `StopSignals` changes nothing."""

import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from mmbert.cli.main import main
from mmbert.runtime.signals import EXIT_CODES, StopSignals

NUMBERS = [getattr(signal, name) for name in EXIT_CODES]


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in NUMBERS]


def test_main_thread_handles_the_signals_and_restores_the_previous_handlers() -> None:
    before = handlers()
    with StopSignals() as stop:
        assert handlers() == [stop._handle] * 3 and StopSignals.worker_init_fn() is not None
        stop.defer(True)
        signal.raise_signal(signal.SIGTERM)
        assert stop.exit_code == 143
        with pytest.raises(SystemExit) as second:
            signal.raise_signal(signal.SIGINT)
        assert second.value.code == 130
        with pytest.raises(SystemExit) as end:
            stop.exit_gracefully()
        assert end.value.code == 143
    assert handlers() == before and StopSignals.worker_init_fn() is None


def test_other_thread_handles_no_signals() -> None:
    before = handlers()

    def work() -> tuple[list[Any], Any]:
        with StopSignals() as stop:
            stop.defer(True)
            return handlers(), StopSignals.worker_init_fn()

    with ThreadPoolExecutor() as pool:
        assert pool.submit(work).result() == (before, None)
    assert handlers() == before


def test_command_runs_in_another_thread(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> object:
        try:
            return main(["match", "no/such/model", "a.png", "a cat"])
        except SystemExit as stopped:
            return stopped.code

    with ThreadPoolExecutor() as pool:
        assert pool.submit(work).result() == 2
    assert "'no/such/model' is no mmbert model folder" in capsys.readouterr().err


def test_handler_that_python_did_not_install_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """`signal.signal` gives None for it, and can't install None."""
    stop = StopSignals()
    monkeypatch.setattr(stop, "_install_handlers", lambda: dict.fromkeys(map(int, NUMBERS)))
    before = handlers()
    with stop:
        pass
    assert handlers() == before
