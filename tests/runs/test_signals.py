"""SIGTERM, SIGINT and SIGUSR1 end a run with a checkpoint and their code, wherever they strike."""

import gc
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import fit, results, trace, weights
from torch.utils.data import DataLoader, Dataset

from mmbert.errors import DataError
from mmbert.runtime.signals import StopSignals
from mmbert.training import run_folder
from mmbert.training.checkpoints import RunCheckpoints
from mmbert.training.module import TrainingModule

NEVER = "--checkpoint.every_n_steps=1000"


def struck(
    run: Callable[[], None], *, by: str, owner: type, hook: str, call: int, workers_too: bool = False
) -> int | None:
    """Exit code of a run that gets a signal at the start of a call, counted from 1, of a hook."""

    def target() -> None:
        torch.set_num_threads(1)
        os.setpgrp()
        original, seen = getattr(owner, hook), [0]

        def signalled(self: object, *arguments: object, **options: object) -> object:
            seen[0] += 1
            if seen[0] == call:
                (os.killpg if workers_too else os.kill)(os.getpid(), getattr(signal, by))
            return original(self, *arguments, **options)

        setattr(owner, hook, signalled)
        run()

    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    process.join(timeout=60)
    assert process.exitcode is not None, "the run did not end"
    return process.exitcode


@pytest.fixture(scope="module")
def whole(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that was never interrupted."""
    root = tmp_path_factory.mktemp("whole")
    fit(tiny, root, "--name=run", NEVER, "--data.eval_batch_size=8")
    return root


PLACES = {  # where the signal strikes -> (class, hook, call, steps that are saved)
    "in a step": (TrainingModule, "training_step", 6, 6),
    "in the last step of an epoch": (TrainingModule, "training_step", 4, 4),
    "in validation": (TrainingModule, "validation_step", 3, 8),
    "in the last validation": (TrainingModule, "validation_step", 5, 12),
    "while a checkpoint is written": (RunCheckpoints, "save", 1, 12),
    "in the final test": (TrainingModule, "test_step", 1, 12),
}


@pytest.mark.parametrize("place", PLACES)
def test_signal_saves_exits_with_its_code_and_the_resumed_run_is_bit_identical(
    place: str, whole: Path, tiny: list[str], tmp_path: Path
) -> None:
    owner, hook, call, steps = PLACES[place]
    options = ["--name=run", NEVER, "--data.eval_batch_size=8"]
    code = struck(lambda: fit(tiny, tmp_path, *options), by="SIGTERM", owner=owner, hook=hook, call=call)
    assert code == 143
    assert (tmp_path / "run/checkpoints/latest").read_text() == f"step={steps}.ckpt\n"
    assert not (tmp_path / "run/metrics.json").exists()
    fit(tiny, tmp_path, *options, "--resume=auto")
    assert trace(tmp_path) == trace(whole)
    assert results(tmp_path) == results(whole)
    curves, expected = (run_folder.read_curves(root / "run") for root in (tmp_path, whole))
    for name in (name for name in expected if name.startswith("val/")):
        assert curves[name] == expected[name], name
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(tmp_path)[name]), name


@pytest.mark.parametrize(("by", "code"), [("SIGINT", 130), ("SIGUSR1", 75), ("SIGTERM", 143)])
def test_signal_to_the_whole_process_group_waits_for_the_loader(
    by: str, code: int, tiny: list[str], tmp_path: Path
) -> None:
    # Ctrl-C and scancel strike the loader's processes too; the accumulated step still needs their batches.
    options = [
        "--name=run",
        NEVER,
        "--data.num_workers=2",
        "--trainer.accumulate_grad_batches=4",
        "--data.batch_size=4",
    ]
    seen = struck(
        lambda: fit(tiny, tmp_path, *options),
        by=by, owner=TrainingModule, hook="training_step", call=6, workers_too=True,
    )  # fmt: skip
    assert seen == code
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step=2.ckpt\n"


def test_signal_before_training_ends_at_once(tiny: list[str], tmp_path: Path) -> None:
    hook = "configure_optimizers"
    code = struck(lambda: fit(tiny, tmp_path), by="SIGINT", owner=TrainingModule, hook=hook, call=1)
    assert code == 130
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_second_signal_leaves_at_once(tiny: list[str], tmp_path: Path) -> None:
    original = TrainingModule.training_step

    def impatient() -> None:
        def twice(self: TrainingModule, *arguments: object) -> object:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            return original(self, *arguments)  # pyright: ignore

        TrainingModule.training_step = twice  # pyright: ignore
        fit(tiny, tmp_path, NEVER)

    code = struck(impatient, by="SIGCONT", owner=TrainingModule, hook="training_step", call=1)
    assert code == 143
    assert not list(tmp_path.glob("run/checkpoints/*"))


class _Numbers(Dataset[int]):
    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> int:
        return index


def test_error_with_loader_processes_around_stays_the_error() -> None:
    gc.collect()  # ends the processes of loaders that earlier tests left in reference cycles
    others = multiprocessing.active_children()
    own: list[Any] = []

    def raising(*_: object) -> None:  # as torch's handler, which it sets once in the life of a process
        if any(process.exitcode is not None for process in own):
            raise AssertionError("a loader process was killed")

    before = signal.signal(signal.SIGCHLD, raising)
    try:
        with pytest.raises(DataError, match="the error"), StopSignals():
            batches = iter(DataLoader(_Numbers(), num_workers=2, worker_init_fn=StopSignals.worker_init_fn()))
            next(batches)
            own += [process for process in multiprocessing.active_children() if process not in others]
            assert len(own) == 2
            handler = signal.getsignal(signal.SIGCHLD)
            raise DataError("the error")
        assert not any(process.is_alive() for process in own)
        assert signal.getsignal(signal.SIGCHLD) == handler, "as it was before"
        del batches
    finally:
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
