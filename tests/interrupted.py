"""Runs that are killed on purpose, and what is compared afterwards."""

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from mmbert.cli.main import main
from mmbert.training import run_folder
from mmbert.training.module import TrainingModule

ROOT = Path(__file__).parents[1]
# 64 training pairs in batches of 16: 4 steps an epoch, 3 epochs.
HARD = [
    "--trainer.max_epochs=3",
    "--trainer.precision=32-true",
    "--threads=1",
    "--model.hidden_dropout_prob=0.1",
    "--model.attention_probs_dropout_prob=0.1",
    "--model.objectives={mlm: 1, itm: {negatives: hard}, itc: 1}",
    "--data.crop=0.7",
    "--data.flip=true",
    "--checkpoint.every_n_steps=1",
    "--trainer.log_every_n_steps=1",
]


def fit(tiny: list[str], root: Path, *more: str) -> None:
    """A run with dropout, augmentation, hard negatives and a warm-up; without curves.png, a third of its time."""
    config = str(ROOT / "configs/pretrain/shapes_plain.yaml")
    with mock.patch.object(run_folder, "plot_curves"):
        main(["fit", "--config", config, *tiny, *HARD, f"--trainer.default_root_dir={root}", *more])


def killed(run: Callable[[], None], *, after_batch: int, hook: str = "on_train_batch_end") -> None:
    """Runs in a process of its own that dies, without any clean-up, in a hook of a batch (counted from 1)."""

    def target() -> None:
        torch.set_num_threads(1)
        original, seen = getattr(TrainingModule, hook), [0]

        def dying(self: TrainingModule, *arguments: object) -> None:
            original(self, *arguments)
            seen[0] += 1
            if seen[0] == after_batch:
                os._exit(9)

        setattr(TrainingModule, hook, dying)
        run()

    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    process.join(timeout=120)
    assert process.exitcode == 9, "the run should have been killed"


def killed_at(run: Callable[[], None], *, seconds: float) -> bool:
    """Runs in a process of its own and sends SIGKILL so many seconds after its start; False if it was done by then."""

    def target() -> None:
        torch.set_num_threads(1)
        run()

    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    process.join(timeout=seconds)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), "the run failed by itself"
    return process.exitcode != 0


def failed(run: Callable[[], None], log: Path) -> tuple[int | None, str]:
    """Exit code and error stream of a run in a process of its own."""

    def target() -> None:
        torch.set_num_threads(1)
        sys.stderr = log.open("w", buffering=1)
        run()

    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    process.join(timeout=120)
    assert process.exitcode is not None, "the run did not end"
    return process.exitcode, log.read_text()


def trace(root: Path, name: str = "run") -> list[str]:
    return (root / name / "trace.csv").read_text().splitlines()


def weights(root: Path, name: str = "run") -> dict[str, torch.Tensor]:
    newest = max((root / name / "checkpoints").glob("step=*.ckpt"), key=lambda p: int(p.stem.split("=")[1]))
    return torch.load(newest, weights_only=True)["state_dict"]


def results(root: Path, name: str = "run") -> dict[str, float]:
    found = json.loads((root / name / "metrics.json").read_text())
    return {k: v for k, v in found.items() if k.startswith(("val", "test"))}
