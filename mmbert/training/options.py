"""Options of the sections `optim` and `checkpoint`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from mmbert.errors import UsageError, did_you_mean

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "linear", "constant")


@dataclass(kw_only=True)
class MomentumOptions:
    """Options of `optim.momentum_distillation` (ALBEF, arXiv:2107.07651, Sec. 3.3)."""

    decay: float = 0.995
    """Weight of the momentum model in its update after an optimizer step; the trained model has the rest."""
    alpha: float = 0.4
    """Weight of the soft targets in the losses of itc and mlm; the labels have the rest."""
    ramp_steps: int = 0
    """Optimizer steps, after a first stage, in which alpha rises linearly from 0. 0: it has its value at once."""

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> "MomentumOptions":
        """Build from a mapping.

        Raises:
            UsageError: No mapping, an unknown key, or a value that is not allowed.
        """
        place, keys = "optim.momentum_distillation", [field.name for field in fields(cls)]
        if not isinstance(options, Mapping):
            raise UsageError(f"{place}={options!r}: a mapping, such as {{decay: 0.995, alpha: 0.4}}.")
        for name in options:
            if name not in keys:
                raise UsageError(f"{place}.{name}: allowed are {', '.join(keys)}.{did_you_mean(name, keys)}")
        found = cls(**options)
        if not _is_number(found.decay) or not 0 <= found.decay < 1:
            raise UsageError(
                f"{place}.decay={found.decay!r}: from 0 to below 1, such as 0.995; with 1 the momentum model would "
                "never change."
            )
        if not _is_number(found.alpha) or not 0 <= found.alpha <= 1:
            raise UsageError(f"{place}.alpha={found.alpha!r}: a fraction from 0 to 1.")
        if not isinstance(found.ramp_steps, int) or isinstance(found.ramp_steps, bool) or found.ramp_steps < 0:
            raise UsageError(f"{place}.ramp_steps={found.ramp_steps!r}: a whole number of 0 or more.")
        return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(kw_only=True)
class OptimOptions:
    """Optimizer, learning-rate schedule and frozen layers."""

    name: str = "adamw"
    """Optimizer: adamw, or muon for the weight matrices of all layers with AdamW for the rest; muon learns faster from
    scratch."""
    lr: float = 1e-4
    """Peak learning rate; that of each part of the model is this times its factor."""
    text_lr_factor: float = 1.0
    """Factor on `lr` for the text encoder."""
    image_lr_factor: float = 1.0
    """Factor on `lr` for the image encoder."""
    fusion_lr_factor: float = 1.0
    """Factor on `lr` for the fusion module and the projections into it."""
    head_lr_factor: float = 1.0
    """Factor on `lr` for the heads of objectives or task."""
    itc_lr_factor: float = 1.0
    """Further factor for the head of the objective itc, its projections and temperature; 0 keeps the projections of a
    closed form."""
    muon_lr: float = 0.004
    """Peak learning rate of muon's matrices, times the same factors; `lr` is for the rest."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices; none on biases, norms, the ViT's position embeddings and learned tokens."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's decay rates of the first and second moment, each from 0 to below 1."""
    warmup: float = 0.1
    """Linear warm-up, as a fraction of all optimizer steps."""
    schedule: str = "cosine"
    """Learning-rate schedule after the warm-up: cosine, linear or constant."""
    final_lr: float = 0.0
    """Learning rate at the last step, as a fraction of the peak."""
    first_stage: str | None = None
    """Objective that is trained alone in a first stage, before all objectives are trained together: ngrams, boxes or
    mim warms up an image encoder from scratch. None: no such stage."""
    first_stage_steps: int = 0
    """Optimizer steps of the first stage, part of the run's steps. Each stage has its own learning-rate schedule."""
    momentum_distillation: dict[str, Any] | None = None
    """Soft targets for itc and mlm from a moving average of the model's weights: `{"decay": 0.995, "alpha": 0.4,
    "ramp_steps": 0}`, the default of each. decay is that of the average, alpha the weight of the soft targets, which
    rises linearly over the first ramp_steps optimizer steps. None: the labels alone."""
    freeze_text: int | str = "none"
    """Frozen part of the text encoder: none, all, or n for the embeddings and the first n layers."""
    freeze_image: int | str = "none"
    """Frozen part of the image encoder: none, all, or n for the embeddings and the first n layers."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile the model with torch.compile."""

    def check(self) -> None:
        """Check the values.

        Raises:
            UsageError: A value out of range.
        """
        if self.name not in OPTIMIZERS:
            raise UsageError(
                f"optim.name='{self.name}'; allowed are {', '.join(OPTIMIZERS)}.{did_you_mean(self.name, OPTIMIZERS)}"
            )
        if (self.first_stage is None) != (self.first_stage_steps == 0) or self.first_stage_steps < 0:
            raise UsageError(
                f"optim.first_stage={self.first_stage} with first_stage_steps={self.first_stage_steps}: name an "
                "objective and 1 or more steps, or neither."
            )
        if self.momentum_distillation is not None:
            MomentumOptions.parse(self.momentum_distillation)
        if self.schedule not in SCHEDULES:
            near = did_you_mean(self.schedule, SCHEDULES)
            raise UsageError(f"optim.schedule='{self.schedule}'; allowed are {', '.join(SCHEDULES)}.{near}")
        for name in ("lr", "muon_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"optim.{name}={getattr(self, name)}: must be above 0.")
        for part in ("text", "image", "fusion", "head", "itc"):
            name = f"{part}_lr_factor"
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"optim.{name}={getattr(self, name)}: must be 0 or more.")
        if not 0 <= self.weight_decay < math.inf:
            raise UsageError(f"optim.weight_decay={self.weight_decay}: must be 0 or more.")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UsageError(f"optim.betas={list(self.betas)}: two numbers, each from 0 to below 1.")
        for name in ("warmup", "final_lr"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"optim.{name}={getattr(self, name)}: a fraction from 0 to 1.")


@dataclass(kw_only=True)
class CheckpointOptions:
    """Which checkpoints of a run are kept, and how often they are saved."""

    monitor: str | None = None
    """Validation metric that chooses the best checkpoint. None: the task's accuracy; in pretraining ITM's AUROC,
    without ITM the first of R@1 and the accuracy on masked words. Lower is better for losses and median ranks, higher
    for all others."""
    every_n_steps: int | None = None
    """Optimizer steps between checkpoints. None: every 10 steps up to step 120, then by time."""
    every_seconds: float = 30.0
    """Seconds between checkpoints, unless `every_n_steps` is set."""
    max_time_fraction: float = 0.02
    """Largest fraction of the time that saving may take, unless `every_n_steps` is set: a large model is saved less
    often. A kill costs the training since the last checkpoint."""

    def check(self) -> None:
        """Check the values.

        Raises:
            UsageError: A value out of range.
        """
        if self.every_n_steps is not None and self.every_n_steps < 1:
            raise UsageError(f"checkpoint.every_n_steps={self.every_n_steps}: must be 1 or more.")
        if not self.every_seconds >= 0:  # also false for NaN
            raise UsageError(f"checkpoint.every_seconds={self.every_seconds}: must be 0 or more.")
        if not 0 < self.max_time_fraction <= 1:
            raise UsageError(f"checkpoint.max_time_fraction={self.max_time_fraction}: above 0, up to 1.")
