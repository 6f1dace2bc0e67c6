"""`trace.csv`: the samples and the exact loss of every optimizer step; and logs that resume from a checkpoint."""

import csv
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger

from mmbert.errors import DataError, NotFiniteError
from mmbert.runtime.distributed import all_gather, all_reduce_sum, world_size
from mmbert.runtime.files import atomic_write_text
from mmbert.training.sample_counts import SampleCounts

HEADER = "step,epoch,sample_ids_sha256,loss_hex\n"


class Trace(L.Callback):
    """Write `trace.csv`: step, epoch, hash of the step's samples, and its loss as `float.hex()`.

    The loss is the sum over the batches that were accumulated; the samples are those of all processes, in order. A line
    is on the disk before the step's checkpoint is.
    """

    def __init__(self, file: Path):
        self.file = file
        self.counts = SampleCounts(0, 0)
        self._restored: dict[str, Any] = {}
        self._ids: list[int] = []
        self._loss = 0.0
        self._step = 0
        self._at = "before the first batch"

    def state_dict(self) -> dict[str, Any]:
        """Sample counts so far."""
        return self.counts.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the sample counts."""
        self._restored = state_dict
        counts = self.counts  # of a run that has nothing left to train, too
        counts.seen, counts.repeated, counts.lost = (state_dict[k] for k in ("seen", "repeated", "lost"))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Truncate the file to the step that the run starts from."""
        self._step = trainer.global_step
        batches: Any = trainer.train_dataloader
        per_epoch = int(trainer.num_training_batches) * batches.batch_sampler.batch_size * world_size()
        self.counts = SampleCounts(batches.batch_sampler.count, per_epoch)
        if self._restored:
            self.counts.load_state_dict(self._restored)
        if trainer.is_global_zero:
            cut_trace(self.file, trainer.global_step)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, number: int) -> None:
        """Remember batch and samples, for `on_exception`."""
        samples = ", ".join(map(str, batch["index"].tolist()))
        self._at = f"in or after batch {number + 1} of epoch {trainer.current_epoch}, samples {samples}"

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, _: int
    ) -> None:
        """Add the batch, and write the line where it ends an optimizer step."""
        delivered, requested = all_gather(torch.stack([batch["index"], batch["requested_index"]], dim=1)).T.tolist()
        self._ids += delivered
        self.counts.add(trainer.current_epoch, requested)
        # Each process's loss is its share of the sum times the number of processes.
        loss = float(all_reduce_sum(outputs["loss"].double())) / world_size()
        self._loss += loss * trainer.accumulate_grad_batches
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if trainer.is_global_zero:
            ids = hashlib.sha256(",".join(map(str, self._ids)).encode()).hexdigest()
            with self.file.open("a", encoding="utf-8") as file:
                file.write(f"{self._step},{trainer.current_epoch},{ids},{self._loss.hex()}\n")
        self._ids, self._loss = [], 0.0

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Add step and samples to an error; write not_finite.json where the loss was not finite."""
        if isinstance(exception, Exception) and not isinstance(exception, DataError):
            exception.add_note(f"mmbert: {trainer.global_step} optimizer steps done, {self._at}; --resume auto goes on")
        if isinstance(exception, NotFiniteError):
            name = "not_finite.json" if trainer.global_rank == 0 else f"not_finite-{trainer.global_rank}.json"
            file = self.file.with_name(name)
            atomic_write_text(file, json.dumps(exception.facts, indent=2) + "\n")
            exception.others = (f"  losses and samples of the step are in {file}; it changed no weights",)


class MetricsTable(CSVLogger):
    """Lightning's CSV logger without a file of hyperparameters: `config.yaml` has them."""

    def log_hyperparams(self, params: Any = None) -> None:
        """Do nothing."""


def cut_trace(file: Path, step: int) -> None:
    """Keep the lines up to an optimizer step, and drop a last line that is incomplete."""
    kept = []
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines(keepends=True)[1:]:
            fields = line.rstrip("\n").split(",")
            if line.endswith("\n") and len(fields) == 4 and int(fields[0]) <= step:
                kept.append(line)
    atomic_write_text(file, HEADER + "".join(kept))


def continue_metrics(logger: CSVLogger, step: int) -> None:
    """Let a CSV logger keep the rows before an optimizer step; by itself it deletes the file it finds."""
    file = Path(logger.log_dir) / "metrics.csv"
    rows, keys = [], []
    if file.is_file():
        with file.open(newline="", encoding="utf-8") as source:
            reader = csv.DictReader(source)
            keys = list(reader.fieldnames or [])
            rows = [row for row in reader if row.get("step") and int(float(row["step"])) < step]
    writer: Any = logger.experiment  # deletes the file
    if rows:
        target = io.StringIO(newline="")
        out = csv.DictWriter(target, keys)
        out.writeheader()
        out.writerows(rows)
        atomic_write_text(file, target.getvalue())
        writer.metrics_keys = keys
