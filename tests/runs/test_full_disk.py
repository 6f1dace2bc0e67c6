"""A run whose disk is full stops with one sentence, loses at most one save interval, and goes on when there is room."""

import errno
import multiprocessing
import resource
import sys
from pathlib import Path

import pytest
import torch
from interrupted import fit, killed, trace

from mmbert.training.trace import Trace


def fit_on_a_full_disk(tiny: list[str], root: Path, *more: str) -> tuple[int | None, str]:
    """Exit code and error stream of a run that can write no file of more than 600 kB; its checkpoints have 0.8 MB."""
    log = root / "stderr.txt"

    def target() -> None:
        torch.set_num_threads(1)
        sys.stderr = log.open("w", buffering=1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))
        fit(tiny, root, *more)

    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    process.join(timeout=60)
    return process.exitcode, log.read_text()


def test_full_disk_stops_the_run_and_costs_one_save_interval(tiny: list[str], tmp_path: Path) -> None:
    whole, full = tmp_path / "whole", tmp_path / "full"
    fit(tiny, whole, "--name=run")
    killed(lambda: fit(tiny, full, "--name=run"), after_batch=6)
    before = {p.name: p.read_bytes() for p in (full / "run/checkpoints").iterdir()}
    code, errors = fit_on_a_full_disk(tiny, full, "--name=run", "--resume=auto")
    assert code == 1
    assert "step=7.ckpt: the checkpoint could not be written" in errors
    assert "make room and resume with --resume auto" in errors
    assert "Traceback" not in errors
    assert {p.name: p.read_bytes() for p in (full / "run/checkpoints").iterdir()} == before
    fit(tiny, full, "--name=run", "--resume=auto")
    assert trace(full) == trace(whole)


def test_trace_that_can_not_be_written_stops_the_run(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: Trace, *_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(self.file))

    monkeypatch.setattr(Trace, "on_train_batch_end", full)
    with pytest.raises(SystemExit) as stopped:
        fit(tiny, tmp_path, "--name=run")
    assert stopped.value.code == 1
    assert "trace.csv: No space left on device; make room" in capsys.readouterr().err
