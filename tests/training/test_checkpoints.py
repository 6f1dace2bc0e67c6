"""A checkpoint is whole or not there, and what goes wrong is said."""

import hashlib
import multiprocessing
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmbert.errors import DataError
from mmbert.evaluation.pairs import metric_names
from mmbert.model.objectives import OBJECTIVES
from mmbert.model.tasks import TASKS
from mmbert.training.checkpoints import (
    RunCheckpoints,
    VerifiedCheckpointIO,
    checksum_path,
    is_better,
    is_complete,
    latest_complete_checkpoint,
    tensor_bytes,
)
from mmbert.training.frozen import weights_sha256
from mmbert.training.options import CheckpointOptions


def test_frozen_weights_of_any_type_are_hashed() -> None:
    module = torch.nn.Linear(2, 2)
    names = ["weight", "bias"]
    expected = hashlib.sha256()
    for name in names:
        value = module.get_parameter(name).detach()
        expected.update(f"{name} {tuple(value.shape)} torch.float32".encode() + value.numpy().tobytes())
    assert weights_sha256(module, names) == expected.hexdigest()
    assert weights_sha256(module.bfloat16(), names) != expected.hexdigest()


CHECKPOINT = {"state_dict": {"weight": torch.arange(50_000.0), "bias": torch.ones(3)}, "epoch": 3}


def limited(work: Any, *, file_bytes: int) -> dict[str, Any]:
    """Runs `work` where no file may grow beyond `file_bytes`, as on a full disk, and returns what it returned."""
    receive, send = multiprocessing.Pipe(duplex=False)

    def target() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
        send.send(work())

    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    process.join(timeout=60)
    assert process.exitcode == 0
    return receive.recv()


def test_full_disk_leaves_the_checkpoint_before_it_and_says_what_is_needed(tmp_path: Path) -> None:
    io = VerifiedCheckpointIO()
    io.save_checkpoint({"state_dict": {}, "epoch": 1}, tmp_path / "step=1.ckpt")

    def save() -> dict[str, str]:
        try:
            io.save_checkpoint(CHECKPOINT, tmp_path / "step=2.ckpt")
        except DataError as error:
            return {"error": str(error)}
        return {}

    error = limited(save, file_bytes=100_000)["error"]
    assert f"{tmp_path}/step=2.ckpt: the checkpoint could not be written" in error
    assert "about 0.2 MB" in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step=1.ckpt", "step=1.ckpt.sha256"]
    assert latest_complete_checkpoint(tmp_path) == tmp_path / "step=1.ckpt"
    assert io.load_checkpoint(tmp_path / "step=1.ckpt")["epoch"] == 1


def test_failed_save_over_an_older_one_keeps_the_older_one(tmp_path: Path) -> None:
    io, path = VerifiedCheckpointIO(), tmp_path / "best-step=5.ckpt"
    io.save_checkpoint({"epoch": 1}, path)

    def save() -> dict[str, str]:
        with pytest.raises(DataError):
            io.save_checkpoint(CHECKPOINT, path)
        return {}

    limited(save, file_bytes=100_000)
    assert is_complete(path)
    assert io.load_checkpoint(path) == {"epoch": 1}


def test_folder_that_can_not_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file stands where the folder should")
    with pytest.raises(DataError, match="could not be written"):
        VerifiedCheckpointIO().save_checkpoint(CHECKPOINT, tmp_path / "checkpoints/step=1.ckpt")


def test_temporary_folder_plays_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/nowhere")
    monkeypatch.setattr("tempfile.tempdir", None)
    VerifiedCheckpointIO().save_checkpoint(CHECKPOINT, tmp_path / "step=1.ckpt")
    assert is_complete(tmp_path / "step=1.ckpt")


def test_every_cut_and_every_flipped_bit_is_found(tmp_path: Path) -> None:
    io, path = VerifiedCheckpointIO(), tmp_path / "step=1.ckpt"
    io.save_checkpoint(CHECKPOINT, path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for number in range(50):
        damaged = bytearray(whole)
        at = int(rng.integers(len(whole)))
        if number % 2:
            damaged[at] ^= 1 << int(rng.integers(8))
        else:
            del damaged[at:]
        path.write_bytes(damaged)
        assert not is_complete(path)
        with pytest.raises(DataError, match="damaged"):
            io.load_checkpoint(path)
    path.write_bytes(whole)
    assert is_complete(path)


def test_write_that_loses_bytes_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(self: Any, data: bytes) -> int:
        self.size += len(data)
        return len(data)

    monkeypatch.setattr("mmbert.training.checkpoints._HashingWriter.write", write)
    with pytest.raises(DataError, match="could not be written"):
        VerifiedCheckpointIO().save_checkpoint(CHECKPOINT, tmp_path / "step=1.ckpt")
    assert not list(tmp_path.iterdir())


def test_less_is_better_of_losses_and_median_ranks_and_more_of_all_other_results() -> None:
    known = [
        *metric_names(OBJECTIVES),
        *(f"{name}_{result}" for name, task in TASKS.items() for result in task.monitors),
    ]
    less = {f"val/{name}" for name in known if is_better(f"val/{name}", 1.0, than=2.0)}
    ways = ("image_to_text", "text_to_image")
    losses = {"val/mlm_loss", "val/mlm_loss_shuffled", "val/itm_loss"}
    assert less == losses | {f"val/{way}/median_rank" for way in ways}
    assert not any(is_better(f"val/{name}", 1.0, than=1.0) for name in known), "the first of equals stays"
    assert len(known) > len(less) + 10


def test_sum_without_checkpoint_is_no_checkpoint(tmp_path: Path) -> None:
    checksum_path(tmp_path / "step=1.ckpt").write_text("0\n")
    assert latest_complete_checkpoint(tmp_path) is None


def test_checkpoint_with_code_is_refused(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path}/executed",)

    path = tmp_path / "step=1.ckpt"
    torch.save({"state_dict": {}, "loops": Hostile()}, path)
    with pytest.raises(Exception, match="Weights only load failed"):
        VerifiedCheckpointIO().load_checkpoint(path)
    assert not (tmp_path / "executed").exists()


def test_tensor_bytes_counts_nested_tensors() -> None:
    assert tensor_bytes({"a": [torch.zeros(3), {"b": torch.zeros(2, dtype=torch.int8)}], "c": "text"}) == 14


def test_expensive_checkpoints_are_saved_less_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save of 3 s may be repeated after 150 s at 2 %; a cheap one every 10 steps at first, then every 30 s."""
    now = [0.0]
    monkeypatch.setattr("mmbert.training.checkpoints.time.monotonic", lambda: now[0])
    checkpoints = RunCheckpoints(tmp_path, CheckpointOptions())
    now[0] = 1.0
    assert next(step for step in range(1, 25) if checkpoints._is_due(step)) == 10
    checkpoints._save_seconds = 3.0
    for now[0], due in ((29.0, False), (149.0, False), (151.0, True)):
        assert checkpoints._is_due(11) == checkpoints._is_due(500) == due
    checkpoints._save_seconds = 0.1
    for now[0], due in ((29.0, False), (31.0, True)):
        assert checkpoints._is_due(500) == due
    every = RunCheckpoints(tmp_path, CheckpointOptions(every_n_steps=4))
    every._save_seconds = 1000.0
    assert [every._is_due(step) for step in (3, 4)] == [False, True]


@pytest.mark.parametrize("change", ["", "data.val_size", "trainer.limit_val_batches", "validation pairs (SHA-256)"])
def test_best_of_another_validation_is_forgotten_on_resume(
    change: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = CheckpointOptions(monitor="val/mlm_loss")
    validation = {"data.val_size": 1000, "trainer.limit_val_batches": None, "validation pairs (SHA-256)": "ab"}
    before = RunCheckpoints(tmp_path, options, validation=validation)
    before.best_score, before.best_path = 1.5, str(tmp_path / "best-step=4.ckpt")
    after = RunCheckpoints(tmp_path, options, validation=validation | ({change: 2} if change else {}))
    after.load_state_dict(before.state_dict())
    assert after.best_score == (None if change else 1.5)
    assert after.best_path == ("" if change else before.best_path)
    expected = f"{change} was {validation.get(change)} and is 2: the best checkpoint is chosen anew" if change else ""
    assert (expected in caplog.text) if change else not caplog.text
