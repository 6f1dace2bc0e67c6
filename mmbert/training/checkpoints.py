"""Checkpoints that are whole or not there, when they are written, and which one a run goes on from."""

import hashlib
import logging
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from mmbert.errors import DataError, UsageError

log = logging.getLogger("mmbert")
STEP = re.compile(r"step=(\d+)\.ckpt")
_CHUNK = 1 << 20


@dataclass(kw_only=True)
class CheckpointOptions:
    """What is kept of a run, and how often."""

    monitor: str = "val/itm_auroc"
    """The validation result that chooses the best checkpoint."""
    mode: str = "max"
    """Whether more (max) or less (min) of it is better."""
    every_n_steps: int | None = None
    """Optimizer steps between checkpoints. None: every 10 steps up to step 120, then by time."""
    every_seconds: float = 30.0
    """Seconds between checkpoints, where `every_n_steps` does not say."""

    def check(self) -> None:
        """Refuses what can't be meant.

        Raises:
            UsageError: A value out of range.
        """
        if self.mode not in ("max", "min"):
            raise UsageError(f"checkpoint.mode='{self.mode}'; allowed are max, min.")
        if self.every_n_steps is not None and self.every_n_steps < 1:
            raise UsageError(f"checkpoint.every_n_steps={self.every_n_steps}: must be 1 or more.")
        if self.every_seconds < 0:
            raise UsageError(f"checkpoint.every_seconds={self.every_seconds}: must be 0 or more.")


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, reads it back and moves it there; checks its sum when it is read.

    The sum stands in `<name>.sha256`. It is written first, so a checkpoint without its sum is never whole.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Saves, or leaves everything as it was.

        Raises:
            DataError: The file could not be written whole.
        """
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        sum_file = sum_path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                writer = _HashingWriter(file)
                torch.save(checkpoint, writer)  # pyright: ignore[reportArgumentType] - write and flush are all it calls
                file.flush()
                os.fsync(file.fileno())
            written = digest(temporary)
            if written != writer.sha256.hexdigest():
                raise OSError("what was read back is not what was written")
            sum_file.write_text(written + "\n")
            os.replace(temporary, path)
            _sync_folder(path.parent)
        except (OSError, RuntimeError) as error:  # RuntimeError: torch's writer on a full disk
            temporary.unlink(missing_ok=True)
            if not path.exists():
                sum_file.unlink(missing_ok=True)
            raise DataError(
                str(path), f"the checkpoint could not be written ({error})", "room and rights there"
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        """Loads a checkpoint that is whole; never runs code.

        Raises:
            DataError: Not there, torn, or no checkpoint.
        """
        path = Path(path)
        if not path.is_file():
            raise DataError(str(path), "no such file", "a checkpoint")
        if sum_path(path).is_file() and not is_whole(path):
            raise DataError(
                str(path), "its SHA-256 is not that in the file beside it", "a whole checkpoint: it is torn"
            )
        return torch.load(path, map_location=map_location, weights_only=True)

    def remove_checkpoint(self, path: Any) -> None:
        """Removes a checkpoint and its sum."""
        Path(path).unlink(missing_ok=True)
        sum_path(Path(path)).unlink(missing_ok=True)


class _HashingWriter:
    """File object for torch.save that sums what passes through."""

    def __init__(self, file: Any):
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def sum_path(path: Path) -> Path:
    """Where the sum of a checkpoint stands."""
    return path.with_name(path.name + ".sha256")


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            total.update(chunk)
    return total.hexdigest()


def is_whole(path: Path) -> bool:
    """Whether a checkpoint is there with the sum that it was written with."""
    try:
        return digest(path) == sum_path(path).read_text().strip()
    except OSError:
        return False


def step_of(path: Path) -> int:
    """Optimizer steps in a name like `step=120.ckpt`; -1 for other names."""
    found = STEP.fullmatch(path.name)
    return int(found.group(1)) if found else -1


def newest_whole(folder: Path) -> Path | None:
    """The checkpoint to go on from: the newest that is whole, with a warning for every newer one that is not."""
    for path in sorted((p for p in folder.glob("step=*.ckpt") if step_of(p) >= 0), key=step_of, reverse=True):
        if is_whole(path):
            return path
        log.warning("%s is torn; going back to the checkpoint before it", path)
    return None


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class RunCheckpoints(L.Callback):
    """Saves the last two checkpoints by steps or time, and the best on validation.

    Nothing is saved within a step that ends an epoch: there Lightning can't tell afterwards whether validation had run.
    """

    def __init__(self, folder: Path, options: CheckpointOptions):
        self.folder, self.options = folder, options
        self.best_score: float | None = None
        self.best_path = ""
        self._step, self._saved_step, self._saved_at = 0, 0, time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """Which checkpoint is the best so far."""
        return {"best_score": self.best_score, "best_name": Path(self.best_path).name}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with the best so far."""
        self.best_score = state_dict["best_score"]
        self.best_path = str(self.folder / state_dict["best_name"]) if state_dict["best_name"] else ""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock."""
        self._step = self._saved_step = trainer.global_step
        self._saved_at = time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Saves when it is time, at the end of an optimizer step: no checkpoint holds gradients half summed."""
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        ends_epoch = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if stepped and not ends_epoch and self._is_due(trainer.global_step):
            self.save(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves when it is time, after validation."""
        if self._is_due(trainer.global_step):
            self.save(trainer)

    def _is_due(self, step: int) -> bool:
        since = step - self._saved_step
        if since <= 0:
            return False
        if self.options.every_n_steps is not None:
            return since >= self.options.every_n_steps
        early = step <= 120 and since >= 10
        return early or time.monotonic() - self._saved_at >= self.options.every_seconds

    def save(self, trainer: L.Trainer) -> None:
        """Saves now, and forgets all but the last two."""
        path = self.folder / f"step={trainer.global_step}.ckpt"
        trainer.save_checkpoint(path)
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()
        if trainer.is_global_zero:
            _write_whole(self.folder / "latest", path.name + "\n")
            others = sorted(self.folder.glob("step=*.ckpt"), key=step_of)
            for old in others[:-2]:
                trainer.strategy.remove_checkpoint(old)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keeps the checkpoint with the best validation result."""
        value = trainer.callback_metrics.get(self.options.monitor)
        if trainer.state.fn != "fit" or trainer.sanity_checking or value is None:
            return
        score = float(value)
        better = self.best_score is None or (
            score > self.best_score if self.options.mode == "max" else score < self.best_score
        )
        if better:
            before, self.best_score = self.best_path, score
            self.best_path = str(self.folder / f"best-step={trainer.global_step}.ckpt")
            trainer.save_checkpoint(self.best_path)
            if before and before != self.best_path and trainer.is_global_zero:
                trainer.strategy.remove_checkpoint(before)


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
