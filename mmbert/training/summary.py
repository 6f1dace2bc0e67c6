"""What a run says of itself: one line at its start, files and a table at its end."""

import logging
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch

from mmbert.data.datamodule import SplitsDataModule
from mmbert.data.options import is_used
from mmbert.metrics.outcomes import write_outcomes
from mmbert.model.modeling import MMBertForTask
from mmbert.training import run_folder
from mmbert.training.module import TrainingModule
from mmbert.training.sample_counts import SampleCounts

log = logging.getLogger("mmbert")


def log_run_summary(
    module: TrainingModule,
    data: SplitsDataModule,
    trainer: L.Trainer,
    *,
    precision_reason: str,
    monitor: str,
    output: str,
) -> None:
    """Says what is about to run, and what of the data it does not use.

    Args:
        module: The model and how it is judged.
        data: The splits.
        trainer: Not yet started.
        precision_reason: Why the trainer computes in its precision.
        monitor: The result that chooses the best checkpoint.
        output: Where the results go, in words.
    """
    model = module.model
    parameters = sum(p.numel() for p in module.parameters())
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    sizes = ", ".join(f"{count:,} {split}" for split, count in data.sizes().items())
    if isinstance(model, MMBertForTask):
        judged = f"{model.config.task} with {len(model.task.labels)} labels, best by {monitor}"
    else:
        judged = f"ranked by {_scorer(module, 'val')} in validation, {_scorer(module, 'test')} in test"
    log.info(
        "%s fusion, %.1f M parameters (%.1f M trained) | %s pairs | %s: %s, %d threads | %s | %s",
        model.config.fusion, parameters / 1e6, trainable / 1e6, sizes, trainer.precision,
        precision_reason, torch.get_num_threads(), judged, output,
    )  # fmt: skip

    unused = {name: len(found) for name, found in data.examples.items() if not is_used(name)}
    if unused:
        log.info("not used, as no split is called train, val or test...: %s; data.split_values can tell", unused)
    cut = data.truncated_fraction()
    if cut:
        length = data.options.max_text_length
        log.info("data.max_text_length=%d cuts %.1f %% of captions (a sample of at most 1,000)", length, 100 * cut)


def write_results(
    module: TrainingModule, folder: Path, *, counts: SampleCounts, started: float, seconds_saving: float = 0.0
) -> dict[str, Any]:
    """Write predictions, per-item outcomes, curves and `metrics.json`, and print the table of metrics.

    Args:
        module: After validation or test.
        folder: The run's.
        counts: Training samples that were seen, repeated and lost.
        started: When the run began, in seconds since 1970.
        seconds_saving: Time that training waited for checkpoints.

    Returns:
        The content of metrics.json.
    """
    model = module.model
    facts: dict[str, Any] = {
        "run/seed": module.seed,
        "run/fusion": model.config.fusion,
        "run/parameters": sum(p.numel() for p in module.parameters()),
        **module.skipped.facts(),
        "run/steps": module.trainer.global_step,
        "run/precision": str(module.trainer.precision),
        "run/peak_memory_bytes": run_folder.peak_memory_bytes(),
        **run_folder.versions(),
    }
    if isinstance(model, MMBertForTask):
        facts["run/labels"] = len(model.task.labels)
    else:
        facts |= {"run/val_scorer": _scorer(module, "val"), "run/test_scorer": _scorer(module, "test")}
    if counts.seen:
        facts["run/samples_seen"] = counts.seen
        facts["run/samples_repeated"], facts["run/samples_lost"] = counts.repeated, counts.lost
    if counts.seen and module.training_seconds:
        facts["run/training_seconds"] = module.training_seconds
        facts["run/samples_per_second"] = counts.seen / module.training_seconds
        facts["run/checkpoint_seconds"] = seconds_saving
    for split, rows in module.predictions.items():
        run_folder.write_predictions(folder / f"predictions_{split}.json", rows)
    for split, items in module.items.items():
        write_outcomes(folder / f"items_{split}.npz", items)
    run_folder.plot_curves(folder)
    facts["run/wall_seconds"] = time.time() - started
    metrics = run_folder.write_metrics(folder, {**module.results, **facts})
    run_folder.print_results(module.results, folder=folder)
    return metrics


def _scorer(module: TrainingModule, split: str) -> str:
    """How images and texts are ranked; only pretraining asks."""
    asked = getattr(module.evaluation_options, f"{split}_scorer")
    return module.model.scorer if asked == "auto" else asked  # pyright: ignore - a task's model ranks nothing
