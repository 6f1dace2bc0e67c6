"""Progress of training: a bar on a terminal or in a notebook, a log line at intervals elsewhere."""

import logging
import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar

log = logging.getLogger("mmbert")


class RunProgressBar(RichProgressBar):
    """Lightning's bar of rich, which names the last epoch only where the run has one."""

    def _get_train_description(self, current_epoch: int) -> str:
        last = self.trainer.max_epochs
        return f"Epoch {current_epoch}" + (f"/{last - 1} " if last is not None and last > 0 else " ")


class ProgressLog(L.Callback):
    """Log step, losses, samples/s and time left at intervals, where no terminal shows a bar (nohup, a pipe, Slurm).

    Args:
        every_seconds: Seconds between two lines.
    """

    def __init__(self, every_seconds: float = 30.0):
        self.every_seconds = every_seconds
        self._last = self._started = time.monotonic()
        self._first_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._last = self._started = time.monotonic()
        self._first_step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Log a line when it is time."""
        now = time.monotonic()
        if now - self._last < self.every_seconds or not trainer.is_global_zero:
            return
        self._last = now
        metrics = trainer.callback_metrics
        losses = {name: float(value) for name, value in metrics.items() if name.startswith("train/") and "loss" in name}
        shown = ", ".join(f"{name.removeprefix('train/')} {value:.4g}" for name, value in losses.items())
        log.info("%s", self._line(trainer, pl_module, now, shown))

    def _line(self, trainer: L.Trainer, pl_module: L.LightningModule, now: float, losses: str) -> str:
        step = trainer.global_step
        total = pl_module.total_steps() if hasattr(pl_module, "total_steps") else 0  # pyright: ignore
        rate = (step - self._first_step) / max(now - self._started, 1e-9)
        parts = [f"step {step:,}" + (f" of {total:,}" if total else ""), losses]
        speed = trainer.callback_metrics.get("samples/s")
        if speed is not None:
            parts.append(f"{float(speed):.3g} samples/s")
        if total and rate:
            parts.append(f"about {_duration((total - step) / rate)} of training left")
        return " | ".join(filter(None, parts))


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


def progress_callbacks(callbacks: list[Any], enabled: bool | None) -> tuple[list[Any], bool]:
    """Add what shows the progress, unless the caller brought a bar or switched it off.

    Args:
        callbacks: Those of the run so far.
        enabled: trainer.enable_progress_bar; None means yes.

    Returns:
        The callbacks, and the value of trainer.enable_progress_bar.
    """
    if enabled is False:
        return callbacks, False
    if any(isinstance(callback, ProgressBar) for callback in callbacks):
        return callbacks, True
    if in_notebook():  # tqdm draws a widget there where ipywidgets is installed; rich prints a line for each refresh
        return [*callbacks, TQDMProgressBar()], True
    if sys.stderr.isatty() or sys.stdout.isatty():
        return [*callbacks, RunProgressBar()], True
    return [*callbacks, ProgressLog()], False


def in_notebook() -> bool:
    """Whether an IPython kernel runs this process."""
    try:
        return get_ipython().__class__.__name__ == "ZMQInteractiveShell"  # type: ignore[name-defined]
    except NameError:
        return False
