"""`lightning.Trainer` from the options of a run: what mmbert sets itself, adapts or can't support."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint

from mmbert.errors import UsageError, did_you_mean
from mmbert.evaluation.options import PRECISIONS
from mmbert.runtime.hardware import best_precision
from mmbert.training.sharding import fsdp_strategy

log = logging.getLogger(__name__)

ALIASES = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}
"""Lightning's short names."""

UNSUPPORTED_CALLBACKS = {
    "LearningRateFinder": "the options of a run are fixed; set optim.lr, to what Lightning's Tuner finds for a "
    "TrainingModule (docs/lightning.md)",
    "BatchSizeFinder": "the options of a run are fixed; set data.batch_size, to what Lightning's Tuner finds for a "
    "TrainingModule (docs/lightning.md)",
    "GradientAccumulationScheduler": "the learning-rate schedule counts the steps of a fixed number of batches; use "
    "trainer.accumulate_grad_batches",
    "ModelPruning": "its masks don't reach model/; prune the saved model by torch.nn.utils.prune",
}
"""Callbacks of Lightning that would fail in a run, or have another effect than expected -> why, and what to use."""


def resolve_precision(requested: Any) -> tuple[str, str]:
    """The precision of a run, and why: "as requested", or what suits the machine.

    Raises:
        UsageError: Not one of `PRECISIONS`.
    """
    if requested is None:
        return best_precision()
    precision = ALIASES.get(str(requested), str(requested))
    if precision not in PRECISIONS:
        raise UsageError(
            f"trainer.precision={requested}: mmbert keeps its weights in fp32; allowed are {', '.join(PRECISIONS)}."
            f"{did_you_mean(precision, PRECISIONS)}"
        )
    return precision, "as requested"


def validate_trainer_options(options: Mapping[str, Any]) -> None:
    """Raise on options of `lightning.Trainer` that would have no effect in a run, or another one than expected.

    Raises:
        UsageError: With the option, and what to use instead.
    """
    clip = options["gradient_clip_val"]
    if not (clip or 0) >= 0:  # also false for NaN
        raise UsageError(f"trainer.gradient_clip_val={clip}: above 0, or 0 for no clipping.")
    if isinstance(options["accumulate_grad_batches"], int) and options["accumulate_grad_batches"] < 1:
        raise UsageError(f"trainer.accumulate_grad_batches={options['accumulate_grad_batches']}: must be 1 or more.")
    if isinstance(options["logger"], bool):
        value = str(options["logger"]).lower()
        raise UsageError(
            f"trainer.logger={value}: a run always writes metrics.csv and tensorboard/; leave it out, or name a logger "
            "besides, such as WandbLogger."
        )
    if options["enable_checkpointing"] is not None:
        raise UsageError(
            f"trainer.enable_checkpointing={str(options['enable_checkpointing']).lower()}: a run always saves its own "
            "checkpoints, see the section checkpoint; leave it out."
        )
    if options["barebones"]:
        raise UsageError("trainer.barebones=true: a run logs, validates and saves; leave it out.")
    if options["reload_dataloaders_every_n_epochs"]:
        raise UsageError(
            f"trainer.reload_dataloaders_every_n_epochs={options['reload_dataloaders_every_n_epochs']}: the loaders of "
            "a run draw every epoch anew by themselves; leave it out."
        )
    if options["overfit_batches"]:
        raise UsageError(
            f"trainer.overfit_batches={options['overfit_batches']}: mmbert's order of samples differs in every epoch; "
            "to overfit a few samples use data.train_fraction."
        )


def trainer_options(options: Mapping[str, Any], *, explicit: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `lightning.Trainer` as a run needs them.

    Args:
        options: The section `trainer` as parsed, with a resolved precision.
        explicit: Flat options that files and command line name, {"trainer.limit_test_batches": 1}.

    Raises:
        UsageError: An option that a run can't support.
    """
    found = dict(options)
    if explicit.get("trainer.use_distributed_sampler"):
        log.warning(
            "trainer.use_distributed_sampler=true has no effect: each process takes its share of a batch; leave it out"
        )
    for key, value in found.items():
        # jsonargparse reads an int as a float where both are allowed: 1 batch would be all batches.
        written = explicit.get(f"trainer.{key}")
        if isinstance(value, float) and type(written) is int:
            found[key] = written
    if found["strategy"] == "model_parallel":
        found["strategy"] = fsdp_strategy(found["devices"], found["num_nodes"])
    elif found["strategy"] in ("auto", "ddp") and _several_processes(found):
        # A step need not use every parameter: a batch may leave out an objective, late fusion without ITM its fusion.
        found["strategy"] = "ddp_find_unused_parameters_true"
    callbacks = found["callbacks"] or []
    found["callbacks"] = list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks]
    for callback in found["callbacks"]:
        for name in (kind.__name__ for kind in type(callback).__mro__):
            if name in UNSUPPORTED_CALLBACKS:
                raise UsageError(f"trainer.callbacks: {name} can't be used: {UNSUPPORTED_CALLBACKS[name]}.")
    loggers = found["logger"]
    found["logger"] = (
        list(loggers) if isinstance(loggers, list | tuple) else [] if loggers in (None, True) else [loggers]
    )
    # Lightning's own default is off: ours is a callback. A checkpoint callback of the user's saves beside it.
    found["enable_checkpointing"] = any(isinstance(callback, Checkpoint) for callback in found["callbacks"])
    found["use_distributed_sampler"] = False
    return found


def _several_processes(options: Mapping[str, Any]) -> bool:
    devices = options["devices"]
    count = len(devices) if isinstance(devices, list) else int(devices) if str(devices).lstrip("-").isdigit() else 0
    if count in (0, -1):  # "auto" or all: what torchrun started, or the GPUs that are there
        import torch

        count = max(torch.cuda.device_count(), 1) if options["accelerator"] in ("auto", "gpu", "cuda") else 1
    return max(count * int(options["num_nodes"]), int(os.environ.get("WORLD_SIZE", "1"))) > 1


@contextmanager
def report_lightning_errors() -> Iterator[None]:
    """Raise Lightning's complaints about options and callbacks as `UsageError`."""
    try:
        yield
    except MisconfigurationException as error:
        raise UsageError(f"trainer: {_first_sentences(error)}") from error
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("mmbert"):
            raise
        raise UsageError(f"trainer: {_first_sentences(error)}") from error
    except ValueError as error:
        if not str(error).strip().startswith("`val_check_interval`"):
            raise
        raise UsageError(f"trainer.val_check_interval: {_first_sentences(error)}") from error
    except RuntimeError as error:
        if "Early stopping conditioned on metric" not in str(error):
            raise
        raise UsageError(f"trainer.callbacks: {_first_sentences(error)}") from error


def _first_sentences(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


def build_trainer(options: Mapping[str, Any]) -> L.Trainer:
    """A trainer from what `trainer_options` returns.

    Raises:
        UsageError: Lightning refuses the options.
    """
    try:
        with report_lightning_errors():
            return L.Trainer(**options)
    except UsageError:
        raise
    except (TypeError, ValueError) as error:
        raise UsageError(f"trainer: {_first_sentences(error)}") from error
