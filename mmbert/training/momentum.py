"""Momentum distillation: a moving average of the model gives soft targets to ITC and MLM (ALBEF, arXiv:2107.07651)."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from mmbert.errors import UsageError
from mmbert.model.modeling import HeadedModel, MMBertForPreTraining
from mmbert.model.objectives import OBJECTIVES, Objective, SoftTargets
from mmbert.model.objectives.base import Batch
from mmbert.model.objectives.itc import ImageTextContrast
from mmbert.training.options import MomentumOptions, OptimOptions


class MomentumDistillation:
    """Momentum model of a pretraining model, and its soft targets (ALBEF, arXiv:2107.07651, Sec. 3.3, Eq. 6 and 7).

    A parameter of the momentum model is the exponential moving average of the trained one; frozen parameters are
    shared. It computes without dropout and gradients, and is no submodule of the training module: neither optimizer,
    parameter counts, DDP nor `model/` see it. Checkpoints hold its averages. The losses are (1 - alpha) times
    that of the labels plus alpha times the cross-entropy with the soft targets, as in the authors' code; it differs
    from the paper's KL divergence by the entropy of the soft targets, which has no gradient. ITM has labels only.
    Deviation: no queue, so ITC's soft targets are over the global batch.

    Args:
        model: The trained model.
        options: See `MomentumOptions`.

    Raises:
        UsageError: The model has a task, or no objective that takes soft targets.
    """

    def __init__(self, model: HeadedModel, options: MomentumOptions):
        able = [name for name, objective in OBJECTIVES.items() if objective.has_soft_targets]
        names = [] if not isinstance(model, MMBertForPreTraining) else [*model.objectives]
        if not {*able} & {*names}:
            given = f"the objectives {', '.join(names)}" if names else f"model.task={model.config.task}"
            raise UsageError(
                f"optim.momentum_distillation has no effect on {given}: it gives soft targets to {' and '.join(able)}; "
                "leave it out, or add one of these objectives."
            )
        assert isinstance(model, MMBertForPreTraining)
        self.trained, self.options = model, options
        self.model: MMBertForPreTraining | None = None
        """The momentum model; None before `start`."""
        self._saved: Mapping[str, Tensor] | None = None

    @classmethod
    def of(cls, model: HeadedModel, optim: OptimOptions) -> "MomentumDistillation | None":
        """Build from `optim.momentum_distillation`; None without it."""
        options = optim.momentum_distillation
        return None if options is None else cls(model, MomentumOptions.parse(options))

    def start(self) -> None:
        """Copy the trained model, on its device; or continue with the averages of a loaded checkpoint."""
        shared = {id(p): p for p in self.trained.parameters() if not p.requires_grad}
        self.model = copy.deepcopy(self.trained, {**shared})
        for name, objective in [*self.model.objectives.items()]:
            if not objective.has_soft_targets:
                del self.model.objectives[name]
            elif isinstance(objective, ImageTextContrast):
                objective.refit = False  # a training step reads the projections of training
        self.model.eval().requires_grad_(False)
        trained = dict(self.trained.named_parameters())
        self._averages = {n: p for n, p in self.model.named_parameters() if trained[n].requires_grad}
        self._trained = [trained[name] for name in self._averages]
        if self._saved is not None:
            for name, average in self._averages.items():
                average.copy_(self._saved[name])
            self._saved = None

    @torch.no_grad()
    def soft_targets(self, batch: Batch, *, step: int) -> SoftTargets:
        """Predict a training batch.

        Args:
            batch: As for the trained model.
            step: Optimizer steps since the end of the first stage, for the ramp of alpha.
        """
        assert self.model is not None
        encoded = self.model.encode(batch)
        heads: dict[str, Objective] = dict(self.model.objectives.items())  # pyright: ignore[reportAssignmentType]
        predictions = {name: head.predictions(encoded) for name, head in heads.items()}
        ramp = self.options.ramp_steps
        alpha = self.options.alpha * (min(1.0, step / ramp) if ramp else 1.0)
        return SoftTargets(torch.tensor(alpha, device=batch["input_ids"].device), predictions)

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the trained parameters, after an optimizer step."""
        for average, value in zip(self._averages.values(), self._trained, strict=True):
            average.lerp_(value, 1 - self.options.decay)

    def state_dict(self) -> dict[str, Tensor] | None:
        """Return the averages for a checkpoint; None before `start`."""
        return None if self.model is None else {name: average.detach() for name, average in self._averages.items()}

    def load_state_dict(self, state: Mapping[str, Tensor] | None) -> None:
        """Keep the averages of a checkpoint for `start`."""
        self._saved = state
