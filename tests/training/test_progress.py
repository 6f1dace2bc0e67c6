"""Progress without a terminal: a line at intervals."""

import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import TQDMProgressBar

from mmbert.training.progress import ProgressLog, RunProgressBar, progress_callbacks


def test_line_has_step_losses_speed_and_time_left(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("mmbert.training.progress.time.monotonic", lambda: clock[0])
    metrics = {"train/loss": torch.tensor(1.5), "train/mlm_loss": torch.tensor(1.0), "samples/s": torch.tensor(320.0)}
    trainer: Any = SimpleNamespace(global_step=0, is_global_zero=True, callback_metrics=metrics)
    module: Any = SimpleNamespace(total_steps=lambda: 1000)
    progress = ProgressLog(every_seconds=30)
    progress.on_train_start(trainer, module)
    with caplog.at_level(logging.INFO, "mmbert"):
        for step, seconds in ((100, 20.0), (200, 40.0), (250, 50.0)):
            trainer.global_step, clock[0] = step, seconds
            progress.on_train_batch_end(trainer, module)
    assert [record.message for record in caplog.records] == [
        "step 200 of 1,000 | loss 1.5, mlm_loss 1 | 320 samples/s | about 2 min 40 s of training left"
    ]


def test_bar_on_a_terminal_and_lines_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert progress_callbacks([], False) == ([], False)
    bar = TQDMProgressBar()
    assert progress_callbacks([bar], None) == ([bar], True)
    for terminal, kind in ((True, RunProgressBar), (False, ProgressLog)):
        for stream in (sys.stderr, sys.stdout):
            monkeypatch.setattr(stream, "isatty", lambda terminal=terminal: terminal)
        (callback,), enabled = progress_callbacks([], None)
        assert type(callback) is kind and enabled is terminal


def test_bar_of_a_run_without_last_epoch_names_none() -> None:
    bar = RunProgressBar()
    bar._trainer = SimpleNamespace(max_epochs=-1)  # pyright: ignore
    assert bar._get_train_description(3) == "Epoch 3 "
    bar._trainer = SimpleNamespace(max_epochs=5)  # pyright: ignore
    assert bar._get_train_description(3) == "Epoch 3/4 "
