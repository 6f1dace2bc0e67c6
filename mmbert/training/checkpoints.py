"""Checkpoints that are complete or absent, when they are saved, and which one a run resumes from."""

import hashlib
import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Timer

from mmbert.errors import DataError
from mmbert.runtime.distributed import all_reduce_max, world_size
from mmbert.runtime.files import atomic_write_text
from mmbert.runtime.signals import StopSignals
from mmbert.training.options import CheckpointOptions

log = logging.getLogger("mmbert")
STEP = re.compile(r"step=(\d+)\.ckpt")
_CHUNK = 1 << 20
EARLY_STEPS = 120
"""Optimizer steps within which checkpoints are saved every `EARLY_INTERVAL` steps, if that is cheap."""
EARLY_INTERVAL = 10


def default_monitor(known: Sequence[str]) -> str:
    """The validation metric that chooses the best checkpoint by default."""
    preferred = ("val/itm_auroc", "val/text_to_image/R@1", "val/mlm_accuracy")
    return next((name for name in preferred if name in known), known[0] if known else "")


def is_better(name: str, value: float, than: float) -> bool:
    """Whether a value of a metric is better than another: lower for losses and median ranks, else higher."""
    less = name.removesuffix("_shuffled").endswith(("loss", "median_rank"))
    return value < than if less else value > than


class VerifiedCheckpointIO(TorchCheckpointIO):
    """Atomically write checkpoints with a checksum, and verify the checksum on loading.

    The SHA-256 is computed while the file is written and stored in `<name>.sha256`, before the checkpoint is moved to
    its name: a checkpoint without its checksum is never complete.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Save a checkpoint, or leave everything as it was.

        Raises:
            DataError: The file could not be written.
        """
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        checksum_file = checksum_path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                writer = _HashingWriter(file)
                torch.save(checkpoint, writer)  # pyright: ignore[reportArgumentType] - write and flush are all it calls
                file.flush()
                os.fsync(file.fileno())
                size = os.fstat(file.fileno()).st_size
            if size != writer.size:
                raise OSError(f"{size:,} of {writer.size:,} bytes arrived")
            checksum_file.write_text(writer.sha256.hexdigest() + "\n", encoding="utf-8")
            os.replace(temporary, path)
            _sync_folder(path.parent)
        except (OSError, RuntimeError) as error:  # RuntimeError: torch's writer on a full disk
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
                if not path.exists():
                    checksum_file.unlink(missing_ok=True)
            raise DataError(
                str(path),
                f"the checkpoint could not be written ({error})",
                f"write permission and free space for about {tensor_bytes(checkpoint) / 1e6:,.1f} MB; the checkpoints "
                "before it are as they were: make room and resume with --resume auto",
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        """Load a complete checkpoint; never runs code.

        Raises:
            DataError: The file is missing, truncated or damaged.
        """
        path = Path(path)
        if not path.is_file():
            raise DataError(str(path), "no such file", "a checkpoint")
        if checksum_path(path).is_file() and not is_complete(path):
            raise DataError(
                str(path), "its SHA-256 is not that in the file beside it", "a complete checkpoint: it is damaged"
            )
        return torch.load(path, map_location=map_location, weights_only=True)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint and its checksum."""
        Path(path).unlink(missing_ok=True)
        checksum_path(Path(path)).unlink(missing_ok=True)


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in nested dicts and lists: nearly the size of their file."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(tensor_bytes(x) for x in inner)


class _HashingWriter:
    """File object for `torch.save` that hashes and counts what passes through."""

    def __init__(self, file: Any):
        self.file, self.sha256, self.size = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        self.size += memoryview(data).nbytes
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def checksum_path(path: Path) -> Path:
    """The file beside a checkpoint that holds its SHA-256."""
    return path.with_name(path.name + ".sha256")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            total.update(chunk)
    return total.hexdigest()


def is_complete(path: Path) -> bool:
    """Whether a checkpoint exists with the checksum that it was written with."""
    try:
        return file_sha256(path) == checksum_path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return False


def step_of(path: Path) -> int:
    """Optimizer steps in a name like `step=120.ckpt`; -1 for other names."""
    found = STEP.fullmatch(path.name)
    return int(found.group(1)) if found else -1


def latest_complete_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run, with a warning for every newer one that is damaged."""
    for path in sorted((p for p in folder.glob("step=*.ckpt") if step_of(p) >= 0), key=step_of, reverse=True):
        if is_complete(path):
            return path
        log.warning("%s is damaged; going back to the checkpoint before it", path)
    return None


def _sync_folder(folder: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):  # Windows has no folders to open
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def ran_out_of_time(trainer: L.Trainer) -> bool:
    """Whether trainer.max_time, or a `Timer` callback, ended the training."""
    callbacks: list[Any] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    remaining = [callback.time_remaining() for callback in callbacks if isinstance(callback, Timer)]
    return any(seconds is not None and seconds <= 0 for seconds in remaining)


def log_at_global_step(trainer: L.Trainer) -> None:
    """Let Lightning log at the optimizer step; its own counter may be one off after a resume."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


class RunCheckpoints(L.Callback):
    """Save the last two checkpoints, the best on validation, and one where a signal ends the run.

    All processes decide alike. Nothing is saved within a step that ends an epoch: Lightning would repeat the epoch.
    A checkpoint that a signal writes during validation records that, and the resumed run begins with that validation.
    The same holds for a run that ended early (early stopping): resumed, it does not train on.

    Args:
        folder: Where checkpoints are saved.
        options: What is saved, and how often.
        stop: Signals that end the run.
        validation: What the monitored metric depends on besides the weights; see `validation_identity`.
    """

    def __init__(
        self,
        folder: Path,
        options: CheckpointOptions,
        stop: StopSignals | None = None,
        validation: Mapping[str, Any] | None = None,
    ):
        self.folder, self.options, self.stop = folder, options, stop or StopSignals()
        self.validation = {"checkpoint.monitor": options.monitor, **(validation or {})}
        self.best_score: float | None = None
        self.best_path = ""
        self.seconds_saving = 0.0
        """Seconds that training waited for checkpoints, in this process."""
        self._in_validation = self._validation_is_due = False
        self._ended_early = False
        self._step, self._saved_step, self._saved_at = 0, 0, time.monotonic()
        self._save_seconds = 0.0  # of the last save

    def state_dict(self) -> dict[str, Any]:
        """The best checkpoint so far, and how the run stood."""
        return {
            "validation": self.validation,
            "best_score": self.best_score,
            "best_name": Path(self.best_path).name,
            "validation_is_due": self._in_validation,
            "ended_early": self._ended_early,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best so far; values of another metric or other samples can't be compared with it."""
        self._validation_is_due = state_dict["validation_is_due"]
        self._ended_early = state_dict["ended_early"]
        before = state_dict.get("validation", {"checkpoint.monitor": state_dict.get("monitor")})
        changed = [
            f"{name} was {before[name]} and is {value}"
            for name, value in self.validation.items()
            if name in before and before[name] != value
        ]
        if changed:
            log.warning("%s: the best checkpoint is chosen anew from here on", ", ".join(changed))
            return
        self.best_score = state_dict["best_score"]
        self.best_path = str(self.folder / state_dict["best_name"]) if state_dict["best_name"] else ""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Tell all processes the folder that the first one has made."""
        self.folder = Path(trainer.strategy.broadcast(str(self.folder)))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock, and do the validation that was cut short."""
        self._step = self._saved_step = trainer.global_step
        self._saved_at = time.monotonic()
        self.stop.defer(True)
        if self._ended_early:
            log.info("the run ended early at step %d: it is tested again, not trained on", trainer.global_step)
            trainer.should_stop = True
        if self._validation_is_due:
            self._validation_is_due = False
            validation = trainer.fit_loop.epoch_loop.val_loop
            validation.restarting = False  # from its first batch
            trainer.validating = True
            validation.run()
            trainer.training = True
            validation._has_run = False  # or Lightning would take the epoch for one that has no batches

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Restore the step that is logged: if max_epochs=-1, Lightning adds one when it resumes at an epoch's end."""
        log_at_global_step(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the step that is logged also where a resumed run has nothing left to train.

        The counter of its checkpoint is one too low if the last step ended no epoch.
        """
        if trainer.state.fn != "fit":
            log_at_global_step(trainer)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """As `on_validation_start`."""
        log_at_global_step(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Save when it is time, at the end of an optimizer step: no checkpoint holds gradients half summed."""
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        ends_epoch = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if stepped and not ends_epoch:
            self._save_or_exit(trainer)

    def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Do not let a signal wait for the end of validation; several processes can't agree here and do wait."""
        self._in_validation = trainer.state.fn == "fit" and not trainer.sanity_checking
        if self._in_validation and self.stop.exit_code and world_size() == 1:
            self.save(trainer)
            self.stop.exit_gracefully()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save when it is time, after validation."""
        self._save_or_exit(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the end of training, so that a test which is killed can be repeated."""
        ended_early = trainer.should_stop and not ran_out_of_time(trainer)
        if trainer.global_step > self._saved_step or ended_early != self._ended_early:
            self._ended_early = ended_early
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
        seconds = time.monotonic() - self._saved_at
        if self._save_seconds > self.options.max_time_fraction * seconds:
            return False  # saving costs too much to be repeated so soon
        early = step <= EARLY_STEPS and since >= EARLY_INTERVAL
        return early or seconds >= self.options.every_seconds

    def save(self, trainer: L.Trainer) -> None:
        """Save now, and remove all but the last two."""
        started = time.monotonic()
        path = self.folder / f"step={trainer.global_step}.ckpt"
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            atomic_write_text(self.folder / "latest", path.name + "\n")
            others = sorted(self.folder.glob("step=*.ckpt"), key=step_of)
            for old in others[:-2]:
                trainer.strategy.remove_checkpoint(old)
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()
        self._save_seconds = self._saved_at - started
        self.seconds_saving += self._save_seconds

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the checkpoint with the best validation metric."""
        self._in_validation = False
        value = trainer.callback_metrics.get(str(self.options.monitor))
        if trainer.state.fn != "fit" or trainer.sanity_checking or value is None:
            return
        score = float(value)
        if self.best_score is None or is_better(str(self.options.monitor), score, self.best_score):
            before, self.best_score = self.best_path, score
            self.best_path = str(self.folder / f"best-step={trainer.global_step}.ckpt")
            started = time.monotonic()
            trainer.save_checkpoint(self.best_path)
            self.seconds_saving += time.monotonic() - started
            if before and before != self.best_path and trainer.is_global_zero:
                trainer.strategy.remove_checkpoint(before)
