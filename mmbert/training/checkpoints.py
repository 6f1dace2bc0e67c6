"""Checkpoints that are whole or not there, when they are written, and which one a run goes on from."""

import hashlib
import logging
import os
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from mmbert.errors import DataError
from mmbert.runtime.distributed import all_reduce_max, world_size
from mmbert.runtime.files import atomic_write_text
from mmbert.runtime.signals import StopSignals
from mmbert.training.options import CheckpointOptions

log = logging.getLogger("mmbert")
STEP = re.compile(r"step=(\d+)\.ckpt")
_CHUNK = 1 << 20


def default_monitor(known: Sequence[str]) -> str:
    """The result that chooses the best checkpoint where nothing is asked for."""
    preferred = ("val/itm_auroc", "val/text_to_image/R@1", "val/mlm_accuracy")
    return next((name for name in preferred if name in known), known[0] if known else "")


def is_better(name: str, value: float, than: float) -> bool:
    """Whether a validation result is better than an earlier one; its name tells which way is up."""
    less = name.removesuffix("_shuffled").endswith(("loss", "median_rank"))
    return value < than if less else value > than


class VerifiedCheckpointIO(TorchCheckpointIO):
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
        sum_file = checksum_path(path)
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
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
                if not path.exists():
                    sum_file.unlink(missing_ok=True)
            raise DataError(
                str(path),
                f"the checkpoint could not be written ({error})",
                f"rights there and room for about {tensor_bytes(checkpoint) / 1e6:,.1f} MB; the checkpoints before it "
                "are as they were: make room and go on with --resume auto",
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        """Loads a checkpoint that is whole; never runs code.

        Raises:
            DataError: Not there, torn, or no checkpoint.
        """
        path = Path(path)
        if not path.is_file():
            raise DataError(str(path), "no such file", "a checkpoint")
        if checksum_path(path).is_file() and not is_complete(path):
            raise DataError(
                str(path), "its SHA-256 is not that in the file beside it", "a whole checkpoint: it is torn"
            )
        return torch.load(path, map_location=map_location, weights_only=True)

    def remove_checkpoint(self, path: Any) -> None:
        """Removes a checkpoint and its sum."""
        Path(path).unlink(missing_ok=True)
        checksum_path(Path(path)).unlink(missing_ok=True)


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in nested dicts and lists: nearly the size of their file."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(tensor_bytes(x) for x in inner)


class _HashingWriter:
    """File object for torch.save that sums what passes through."""

    def __init__(self, file: Any):
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def checksum_path(path: Path) -> Path:
    """Where the sum of a checkpoint stands."""
    return path.with_name(path.name + ".sha256")


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            total.update(chunk)
    return total.hexdigest()


def is_complete(path: Path) -> bool:
    """Whether a checkpoint is there with the sum that it was written with."""
    try:
        return digest(path) == checksum_path(path).read_text().strip()
    except OSError:
        return False


def step_of(path: Path) -> int:
    """Optimizer steps in a name like `step=120.ckpt`; -1 for other names."""
    found = STEP.fullmatch(path.name)
    return int(found.group(1)) if found else -1


def latest_complete_checkpoint(folder: Path) -> Path | None:
    """The checkpoint to go on from: the newest that is whole, with a warning for every newer one that is not."""
    for path in sorted((p for p in folder.glob("step=*.ckpt") if step_of(p) >= 0), key=step_of, reverse=True):
        if is_complete(path):
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
    """Saves the last two checkpoints by steps or time, the best on validation, and one where a signal ends the run.

    All processes decide alike. Nothing is saved within a step that ends an epoch: Lightning would repeat the epoch.
    A checkpoint that a signal writes during validation says so, and the resumed run begins with that validation.
    """

    def __init__(self, folder: Path, options: CheckpointOptions, stop: StopSignals | None = None):
        self.folder, self.options, self.stop = folder, options, stop or StopSignals()
        self.best_score: float | None = None
        self.best_path = ""
        self._in_validation = self._validation_is_due = False
        self._step, self._saved_step, self._saved_at = 0, 0, time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """Which checkpoint is the best so far, and whether a validation was cut short."""
        return {
            "best_score": self.best_score,
            "best_name": Path(self.best_path).name,
            "validation_is_due": self._in_validation,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with the best so far."""
        self.best_score = state_dict["best_score"]
        self.best_path = str(self.folder / state_dict["best_name"]) if state_dict["best_name"] else ""
        self._validation_is_due = state_dict["validation_is_due"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Tells all processes the folder that the first one has made."""
        self.folder = Path(trainer.strategy.broadcast(str(self.folder)))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock, and does the validation that was cut short."""
        self._step = self._saved_step = trainer.global_step
        self._saved_at = time.monotonic()
        self.stop.defer(True)
        if self._validation_is_due:
            self._validation_is_due = False
            validation = trainer.fit_loop.epoch_loop.val_loop
            validation.restarting = False  # from its first batch
            trainer.validating = True
            validation.run()
            trainer.training = True
            validation._has_run = False  # or Lightning would take the epoch for one that has no batches

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Saves when it is time, at the end of an optimizer step: no checkpoint holds gradients half summed."""
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        ends_epoch = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if stepped and not ends_epoch:
            self._save_or_exit(trainer)

    def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Does not let a signal wait for the end of validation; several processes can't agree here and do wait."""
        self._in_validation = trainer.state.fn == "fit" and not trainer.sanity_checking
        if self._in_validation and self.stop.exit_code and world_size() == 1:
            self.save(trainer)
            self.stop.exit_gracefully()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves when it is time, after validation."""
        self._save_or_exit(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the end of training, so that tests which are killed can be done again."""
        if trainer.global_step > self._saved_step:
            self.save(trainer)
        self.stop.defer(False)
        if all_reduce_max(self.stop.exit_code)[0]:
            self.stop.exit_gracefully()

    def _save_or_exit(self, trainer: L.Trainer) -> None:
        code, due = all_reduce_max(self.stop.exit_code, self._is_due(trainer.global_step))
        if due or (code and trainer.global_step > self._saved_step):
            self.save(trainer)
        if code:
            self.stop.exit_code = code
            self.stop.exit_gracefully()

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
            atomic_write_text(self.folder / "latest", path.name + "\n")
            others = sorted(self.folder.glob("step=*.ckpt"), key=step_of)
            for old in others[:-2]:
                trainer.strategy.remove_checkpoint(old)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keeps the checkpoint with the best validation result."""
        self._in_validation = False
        value = trainer.callback_metrics.get(str(self.options.monitor))
        if trainer.state.fn != "fit" or trainer.sanity_checking or value is None:
            return
        score = float(value)
        if self.best_score is None or is_better(str(self.options.monitor), score, self.best_score):
            before, self.best_score = self.best_path, score
            self.best_path = str(self.folder / f"best-step={trainer.global_step}.ckpt")
            trainer.save_checkpoint(self.best_path)
            if before and before != self.best_path and trainer.is_global_zero:
                trainer.strategy.remove_checkpoint(before)
