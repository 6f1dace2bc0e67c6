"""Log lines at the start of a run, and the result files and table at its end."""

import logging
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch

from mmbert.data.datamodule import SplitsDataModule
from mmbert.data.options import is_used
from mmbert.evaluation.cost import fusion_passes
from mmbert.metrics.outcomes import write_outcomes
from mmbert.model.modeling import MMBertForTask
from mmbert.training import run_folder
from mmbert.training.module import TrainingModule
from mmbert.training.sample_counts import SampleCounts

log = logging.getLogger("mmbert")
MANY_PASSES = 100_000
"""Fusion passes of a test above which their number is announced: minutes on a CPU."""


def log_run_summary(
    module: TrainingModule,
    data: SplitsDataModule,
    trainer: L.Trainer,
    *,
    precision_reason: str,
    monitor: str,
    output: str,
) -> None:
    """Log model, data, precision and output of a run, and the splits that it does not use.

    Args:
        module: The model and its evaluation options.
        data: The splits.
        trainer: Not yet started.
        precision_reason: Why the trainer computes in its precision.
        monitor: Metric that chooses the best checkpoint.
        output: Where the results go.
    """
    model = module.model
    parameters = sum(p.numel() for p in module.parameters())
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    sizes = ", ".join(f"{count:,} {split}" for split, count in data.sizes().items())
    if isinstance(model, MMBertForTask):
        evaluated = f"{model.config.task} with {len(model.task.labels)} labels, best by {monitor}"
    elif {"itm", "itc"} & {*model.objectives}:
        scorers = f"{_scorer(module, 'val')} in validation, {_scorer(module, 'test')} in test"
        evaluated = f"retrieval by {scorers}, 1 caption per image"
    else:
        evaluated = "no retrieval"
    log.info(
        "%s fusion, %.1f M parameters (%.1f M trained) | %s pairs | %s: %s, %d threads | %s | %s",
        model.config.fusion, parameters / 1e6, trainable / 1e6, sizes, trainer.precision,
        precision_reason, torch.get_num_threads(), evaluated, output,
    )  # fmt: skip

    if not isinstance(model, MMBertForTask) and {"itm", "itc"} & {*model.objectives}:
        _log_ranking_cost(module, data)
    unused = {name: len(found) for name, found in data.examples.items() if not is_used(name)}
    if unused:
        log.info("splits not used, as none is called train, val or test...: %s; data.split_values maps them", unused)
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
    facts |= {f"run/{name}_items_fraction": part for name, part in module.coverage.items() if part < 1}
    for split, rows in module.predictions.items():
        run_folder.write_predictions(folder / f"predictions_{split}.json", rows)
    for split, items in module.items.items():
        write_outcomes(folder / f"items_{split}.npz", items)
    run_folder.plot_curves(folder)
    facts["run/wall_seconds"] = time.time() - started
    metrics = run_folder.write_metrics(folder, {**module.results, **facts})
    run_folder.print_results(module.results, folder=folder)
    return metrics


def _log_ranking_cost(module: TrainingModule, data: SplitsDataModule) -> None:
    """Warn about tests that fuse very many pairs."""
    options = module.evaluation_options
    sizes = {name: min(count, options.test_images) for name, count in data.sizes().items() if name in data.test_splits}
    passes = sum(fusion_passes(_scorer(module, "test"), size, size) for size in sizes.values())
    if passes >= MANY_PASSES:
        log.warning(
            "the test ranks by itm, which fuses every image with every caption: %s fusion passes at the end of the "
            "run; a smaller evaluation.test_images (%d) or evaluation.test_scorer=itc lowers that",
            f"{passes:,}",
            options.test_images,
        )


def _scorer(module: TrainingModule, split: str) -> str:
    """Scorer that ranks images and captions of a split; pre-training only."""
    requested = getattr(module.evaluation_options, f"{split}_scorer")
    return module.model.scorer if requested == "auto" else requested  # pyright: ignore - a task's model ranks nothing
