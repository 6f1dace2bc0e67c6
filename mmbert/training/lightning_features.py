"""Features of Lightning in scripts of the user's own: prediction, tuning, hyperparameters, loaders."""

import inspect
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
)
from torch import Tensor, nn
from torch.utils.data import Dataset

from mmbert.data.datamodule import SplitsDataModule
from mmbert.errors import UsageError
from mmbert.evaluation.options import EvaluationOptions
from mmbert.model.configuration import MMBertConfig
from mmbert.model.modeling import HeadedModel, MMBertForTask
from mmbert.model.objectives import EncodedBatch
from mmbert.model.options import KEYS
from mmbert.training.options import OptimOptions

log = logging.getLogger("mmbert")


def attached_trainer(module: L.LightningModule) -> L.Trainer | None:
    """Return the trainer of a module; None where it has none, as in `load_from_checkpoint`."""
    try:
        return module.trainer
    except RuntimeError:
        return None


def hyperparameters(
    config: MMBertConfig, data: SplitsDataModule, optim: OptimOptions, evaluation: EvaluationOptions, seed: int
) -> dict[str, Any]:
    """Collect the options of a training module as plain values, for `hparams`, loggers and checkpoints."""
    content = {
        "model": {key: getattr(config, key) for key in KEYS},
        "data": asdict(data.options),
        "optim": asdict(optim),
        "evaluation": asdict(evaluation),
        "seed": seed,
    }
    return json.loads(json.dumps(content, default=str))  # paths as text: a checkpoint holds no classes


def validate_callbacks(trainer: L.Trainer, optim: OptimOptions) -> None:
    """Raise on callbacks that would train something else than they seem to.

    Raises:
        UsageError: With the callback, and what to use instead.
    """
    callbacks: list[Any] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    for callback in callbacks:
        name = type(callback).__name__
        if isinstance(callback, GradientAccumulationScheduler):
            raise UsageError(
                f"{name}: the learning-rate schedule counts the steps of a fixed number of batches; use "
                "accumulate_grad_batches of the trainer."
            )
        if isinstance(callback, BaseFinetuning) and trainer.world_size > 1:
            raise UsageError(
                f"{name} with {trainer.world_size} processes: DDP does not average gradients of parameters that were "
                "frozen at the start; train in two runs, with optim.freeze_text and optim.freeze_image in the first."
            )
        if isinstance(callback, BaseFinetuning) and optim.momentum_distillation is not None:
            raise UsageError(
                f"{name}: the momentum model of optim.momentum_distillation shares frozen parameters, which must stay "
                "frozen; leave the callback or momentum_distillation out."
            )
        if not isinstance(callback, LearningRateFinder | BatchSizeFinder):
            continue
        if not callback._early_exit:  # set by the Tuner: the fit ends with the search
            tuned = "lr_find" if isinstance(callback, LearningRateFinder) else "scale_batch_size"
            raise UsageError(
                f"{name} would search after the learning-rate schedule is built; call Tuner(trainer).{tuned}(module, "
                "datamodule=data) before the training."
            )
        if isinstance(callback, LearningRateFinder):
            _validate_search(optim)


def _validate_search(optim: OptimOptions) -> None:
    """Raise where one learning rate for all parameters, as `lr_find` tries, is not what would be trained with."""
    if optim.name != "adamw":
        raise UsageError(
            f"lr_find tries one learning rate for all parameters, but optim.name={optim.name} has two: set optim.lr "
            "and optim.muon_lr yourself, or use optim.name=adamw."
        )
    factors = [f"{part}_lr_factor" for part in ("text", "image", "fusion", "head")]
    used = [f"optim.{name}={getattr(optim, name)}" for name in factors if getattr(optim, name) != 1]
    if used:
        log.warning("lr_find tries one learning rate for all parts of the model, without %s", ", ".join(used))


def validate_loaders(loaders: Any, samples: Sequence[Dataset], stage: str) -> None:
    """Raise on loaders of other samples than those of the data module, over which metrics are computed.

    Args:
        loaders: One loader or a list, as the trainer has them.
        samples: Of the data module, one for each loader.
        stage: val or test.

    Raises:
        UsageError: With what to pass instead.
    """
    given = loaders if isinstance(loaders, list | tuple) else [] if loaders is None else [loaders]
    if [getattr(loader, "dataset", None) for loader in given] != [*samples]:
        raise UsageError(
            f"dataloaders of your own for {stage}: metrics are over the splits of the module's data module; pass "
            f"datamodule=data or data.{stage}_dataloader()."
        )


def has_finetuning(trainer: L.Trainer) -> bool:
    """Whether a callback freezes and unfreezes parameters during training."""
    return any(isinstance(c, BaseFinetuning) for c in trainer.callbacks)  # pyright: ignore[reportAttributeAccessIssue]


def unfreeze_optimized(trainer: L.Trainer) -> None:
    """Make all parameters of the optimizer trainable: a resumed `BaseFinetuning` restores only their groups."""
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.requires_grad_(True)


class LightningFeatures(L.LightningModule):
    """What a `TrainingModule` has for scripts of the user's own: prediction, Lightning's Tuner, loading, finetuning.

    A subclass sets the attributes below and calls `save_hyperparameters(hyperparameters(...))`.
    """

    model: HeadedModel
    optim_options: OptimOptions
    _data: SplitsDataModule

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *arguments: Any, **keywords: Any) -> Any:  # pyright: ignore
        """Load the weights of a checkpoint into a new module, `load_from_checkpoint(path, model=model, data=data)`.

        The options optim, evaluation and seed are those in the checkpoint, unless they are given.

        Raises:
            UsageError: Model or data are missing, which no checkpoint holds; or they do not fit it.
        """
        expected = [name for name in ("model", "data") if name in inspect.signature(cls.__init__).parameters]
        missing = [name for name in expected if name not in keywords]
        if missing:
            raise UsageError(
                f"{cls.__name__}.load_from_checkpoint needs {' and '.join(missing)}, which a checkpoint does not hold: "
                "give model= and data= as to the constructor, or load the folder model/ of a run by mmbert.load."
            )
        return super().load_from_checkpoint(checkpoint_path, *arguments, **keywords)

    @property
    def backbone(self) -> nn.Module:
        """Encoders and fusion without heads, which Lightning's `BackboneFinetuning` freezes and unfreezes."""
        return self.model.mmbert

    @property
    def lr(self) -> float:
        """Peak learning rate `optim.lr`, which Lightning's `Tuner.lr_find` sets."""
        return self.optim_options.lr

    @lr.setter
    def lr(self, value: float) -> None:
        self.optim_options = replace(self.optim_options, lr=float(value))
        self.save_hyperparameters({"optim": {**self.hparams["optim"], "lr": float(value)}})

    @property
    def batch_size(self) -> int:
        """Training samples of each process and step, which Lightning's `Tuner.scale_batch_size` sets."""
        return self._data.options.batch_size

    @batch_size.setter
    def batch_size(self, value: int) -> None:
        self._data.set_batch_size(value)
        self.save_hyperparameters({"data": {**self.hparams["data"], "batch_size": self.batch_size}})

    def setup(self, stage: str) -> None:
        """Check the callbacks of the trainer."""
        validate_callbacks(self.trainer, self.optim_options)

    def _normalized(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Normalize uint8 images of a loader of the user's own; the data module does it for its loaders."""
        images = batch.get("pixel_values")
        is_raw = images is not None and images.dtype == torch.uint8
        return self._data.on_after_batch_transfer({**batch}, 0) if is_raw else batch

    def forward(self, *arguments: Any, **inputs: Any) -> Any:
        """Compute the output of the model."""
        return self.model(*arguments, **inputs)

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Predict a batch: the logits of a task; after pretraining match scores and contrastive embeddings.

        Returns:
            `index` (B,), the samples' positions in their split; `logits` (B, labels) of a task; or of the objective itm
            `match_scores` (B,), log-odds that text and image match, and of itc `text_embeddings` and `image_embeddings`
            (B, E), with interaction=tokens (B, T, E) and (B, P, E).

        Raises:
            UsageError: A pretraining model without the objectives itm and itc.
        """
        batch = self._normalized(batch)
        found = {"index": batch["index"]} if "index" in batch else {}
        if "input_ids" not in batch:  # all of its images were unreadable
            return found
        if isinstance(self.model, MMBertForTask):
            return {**found, "logits": self.model(**batch).logits}
        encoded, heads = EncodedBatch(self.model.mmbert, batch), self.model.objectives
        if not {"itm", "itc"} & {*heads}:
            raise UsageError(
                "predict needs a task, or the objective itm or itc: for words use mmbert.load(...).fill_mask."
            )
        if "itm" in heads:
            found["match_scores"] = self.model.match_scores(encoded.text, encoded.image)
        if "itc" in heads:
            contrast: Any = heads["itc"]
            found["text_embeddings"] = contrast.embed_text(encoded.text)
            found["image_embeddings"] = contrast.embed_image(encoded.image)
        return found
