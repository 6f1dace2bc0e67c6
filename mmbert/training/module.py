"""`TrainingModule`: the LightningModule for pre-training and fine-tuning."""

import logging
import math
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mmbert.data.datamodule import PairsDataModule, SplitsDataModule
from mmbert.data.pairs import Pairs
from mmbert.data.sampling import limited_steps
from mmbert.errors import NotFiniteError, UsageError
from mmbert.evaluation.options import EvaluationOptions
from mmbert.model.modeling import HeadedModel, MMBertForPreTraining
from mmbert.model.objectives import ObjectiveOutput
from mmbert.model.outputs import PreTrainingOutput, TaskOutput
from mmbert.runtime.distributed import all_reduce_sum, world_size
from mmbert.runtime.randomness import torch_generator, torch_seed
from mmbert.training.closed_form import (
    start_from_closed_form,
    wants_closed_form,
)
from mmbert.training.evaluating_module import EvaluatingModule
from mmbert.training.frozen import drop_frozen, restore_frozen, validate_cached
from mmbert.training.lightning_features import (
    attached_trainer,
    has_finetuning,
    hyperparameters,
    unfreeze_optimized,
)
from mmbert.training.momentum import MomentumDistillation
from mmbert.training.optim import build_optimizer
from mmbert.training.options import OptimOptions
from mmbert.training.sharding import full_tensor, shard

log = logging.getLogger("mmbert")
CACHE_KEY = "encoder cache (data.cache)"
"""Key of the run's fingerprint for the type in which an encoder cache is read, where `data.cache_dtype` is set."""
RECENT = 10
"""Training batches over which samples/s is averaged."""


class TrainingModule(EvaluatingModule):
    """Lightning module that pre-trains an `MMBertForPreTraining` or fine-tunes an `MMBertForTask`.

    Works with a plain `lightning.Trainer` too, see docs/lightning.md; the trace, exact resume, the test of the best
    checkpoint and the result files are added by `mmbert.fit`.

    Args:
        model: The model.
        data: Its splits are evaluated.
        optim: Optimizer, learning-rate schedule and frozen layers; a mapping as in `hparams` is accepted.
        evaluation: How images and captions are ranked; a mapping as in `hparams` is accepted.
        seed: Seed of negatives and dropout, with the step.
        identity: Run fingerprint: what must not change on resume; stored in every checkpoint.
    """

    def __init__(
        self,
        model: HeadedModel,
        data: SplitsDataModule,
        *,
        optim: OptimOptions | Mapping[str, Any],
        evaluation: EvaluationOptions | Mapping[str, Any],
        seed: int,
        identity: dict[str, Any] | None = None,
    ):
        optim = OptimOptions(**optim) if isinstance(optim, Mapping) else optim
        evaluation = EvaluationOptions(**evaluation) if isinstance(evaluation, Mapping) else evaluation
        super().__init__(model, data, evaluation, seed)
        self.optim_options, self._identity = optim, identity or {}
        self._total_steps = 1  # known when training starts
        self.momentum = MomentumDistillation.of(model, optim)
        if "ngrams" in model.config.objective_options() and isinstance(data.train_samples, Pairs):
            data.train_samples.use_ngrams(model.config.ngrams)
        edited = model.config.objective_options().get("itm", {}).get("edited", 0.0)
        if edited and isinstance(data, PairsDataModule):
            data.use_edits(edited)
        self.training_seconds = 0.0
        self._frozen: dict[str, Any] | None = None  # names and hash of the weights that checkpoints leave out
        self._clock = 0.0
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT)
        self._since_step: list[dict[str, Tensor]] = []  # losses of the batches since the last optimizer step
        self._indices: list[int] = []  # and their samples
        self.save_hyperparameters(hyperparameters(model.config, data, optim, evaluation, seed))

    def configure_model(self) -> None:
        """Shard the model over the processes with FSDP2, where the strategy is model_parallel.

        Raises:
            UsageError: The optimizer is muon, which needs whole matrices, or there is a momentum model.
        """
        if attached_trainer(self) is None:
            return
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and self.optim_options.name == "muon":
            raise UsageError(
                "optim.name=muon needs whole matrices, but trainer.strategy=model_parallel shards them: choose "
                "optim.name=adamw or trainer.strategy=ddp."
            )
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and self.momentum is not None:
            raise UsageError(
                "optim.momentum_distillation copies the model, but trainer.strategy=model_parallel shards it: choose "
                "trainer.strategy=ddp or leave momentum_distillation out."
            )
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and self.device_mesh is not None:
            shard(self.model, self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> Any:
        """Optimizer with parameter groups, and the learning-rate schedule."""
        precision = str(self.trainer.precision)
        self._total_steps = self.total_steps()
        optimizer, schedule = build_optimizer(
            self.model,
            self.optim_options,
            self._total_steps,
            fused=not precision.startswith("16"),  # as the fp16 gradient scaler unscales gradients
            muon_dtype=torch.bfloat16 if precision.startswith("bf16") else torch.float32,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add counters, labels and the run fingerprint; leave frozen weights out."""
        checkpoint["mmbert"] = {
            "skipped": self.skipped.why,
            "training_seconds": self.training_seconds,
            "labels": self.model.config.labels,
            "identity": self._present_identity(),
        }
        if self.momentum is not None:
            checkpoint["mmbert"]["momentum"] = self.momentum.state_dict()
        # What a callback unfreezes later would not be that of the checkpoint any more.
        if not isinstance(self.trainer.strategy, ModelParallelStrategy) and not has_finetuning(self.trainer):
            self._frozen = drop_frozen(checkpoint, self, self._frozen)
            checkpoint["mmbert"]["frozen"] = self._frozen

    def _present_identity(self) -> dict[str, Any]:
        """Return the run's fingerprint with what is known once it has started: processes, and a cache that rounds."""
        dtype, is_read = self._data.options.cache_dtype, self._data.train_samples.cache is not None
        rounded = {} if dtype is None else {CACHE_KEY: dtype if is_read else "none"}
        return {**self._identity, "processes": world_size(), **rounded}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore counters and the position in the data.

        Raises:
            UsageError: The checkpoint is of another run: model, data or optimizer differ; or has other labels.
        """
        restore_frozen(checkpoint, self)
        if self._data.train_samples.cache is not None:
            validate_cached(checkpoint, self)
        own = checkpoint["mmbert"]
        before, now = own.get("labels", []), self.model.config.labels
        if before != now:
            raise UsageError(
                f"the checkpoint has {len(before)} labels ({', '.join(before[:3])}, ...), this training "
                f"data gives {len(now)} ({', '.join(now[:3])}, ...): take the data and the data.min_answer_count that "
                "it was made with."
            )
        trainer = attached_trainer(self)
        if trainer is not None and trainer.state.fn == "fit":
            before, now = own["identity"], self._present_identity()
            compared = {*before, *now} - ({CACHE_KEY} - {*before})  # older checkpoints do not have it
            changed = [k for k in sorted(compared) if before.get(k) != now.get(k)]
            if changed:
                differences = "; ".join(f"{k} was {before.get(k)!r} and is {now.get(k)!r}" for k in changed[:5])
                raise UsageError(
                    f"this is not the run that the checkpoint was saved in: {differences}. Start a new one."
                )
            if self.momentum is not None:
                if "momentum" not in own:
                    raise UsageError(
                        "optim.momentum_distillation: the checkpoint has no momentum model, as its run had none; start "
                        "a new run, or leave the option out."
                    )
                self.momentum.load_state_dict(own["momentum"])
            # Lightning hands a loader its state within an epoch only: after its last batch the order would start anew.
            # A search of Lightning's Tuner saves before there are loaders, and those of the user have no such state.
            if trainer.datamodule is self._data:  # pyright: ignore[reportAttributeAccessIssue]
                states = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", [None])
                self._data.loader_state = states[0]
        self.skipped.why, self.training_seconds = own["skipped"], own["training_seconds"]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take an optimizer step, clamp constrained parameters (ITC's temperature), update the momentum model."""
        super().optimizer_step(*args, **kwargs)
        self.model.after_step()
        if self.momentum is not None:
            self.momentum.update()

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip gradients to a global norm and log the norm; Lightning's own refuses fused optimizers."""
        if gradient_clip_algorithm == "value":
            raise UsageError("trainer.gradient_clip_algorithm=value; mmbert clips by norm only.")
        limit = torch.inf if not gradient_clip_val else float(gradient_clip_val)
        norm = full_tensor(torch.nn.utils.clip_grad_norm_([p for p in self.parameters() if p.requires_grad], limit))
        self._stop_if_not_finite(optimizer, norm)
        self.log("train/grad_norm", norm)

    def _stop_if_not_finite(self, optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
        loss = float(
            all_reduce_sum(torch.stack([loss for losses in self._since_step for loss in losses.values()]).sum())
        )
        # fp16's scaler tries larger and larger scales and skips the steps whose gradients overflow.
        scaled = str(self.trainer.precision).startswith("16")
        if not math.isfinite(loss) or not (scaled or bool(norm.isfinite())):
            what = "loss" if not math.isfinite(loss) else "norm of the gradient"
            value = loss if not math.isfinite(loss) else float(norm)
            raise NotFiniteError(
                f"step {self.trainer.global_step + 1}", f"the {what} is {value}", self._facts(optimizer)
            )
        self._since_step = []

    def _facts(self, optimizer: torch.optim.Optimizer) -> dict[str, object]:
        """Losses, learning rates, gradient norms and samples of the step, for not_finite.json."""
        groups = optimizer.param_groups
        norms = {
            str(group.get("name", "added by a callback")): float(
                torch.stack([p.grad.norm() for p in group["params"] if p.grad is not None]).norm()
            )
            for group in groups
            if any(p.grad is not None for p in group["params"])
        }
        pairs = [self._data.train_samples.examples[i] for i in self._indices]
        return {
            "step": self.trainer.global_step + 1,
            "epoch": self.trainer.current_epoch,
            "losses": [{name: float(loss) for name, loss in losses.items()} for losses in self._since_step],
            "learning_rates": {str(group.get("name", "added by a callback")): group["lr"] for group in groups},
            "gradient_norms_after_clipping": norms,
            "sample_ids": self._indices,
            "samples": [{"place": pair.place, "image": str(pair.image)} for pair in pairs],
        }

    def total_steps(self) -> int:
        """Number of optimizer steps of the run, from the data rather than from Lightning's loaders.

        `trainer.estimated_stepping_batches` would make Lightning forget a resumed position.
        """
        trainer = self.trainer
        if trainer.datamodule is not self._data:  # pyright: ignore[reportAttributeAccessIssue] - loaders of the user
            steps = trainer.estimated_stepping_batches
            if not math.isfinite(steps):
                raise UsageError("the learning-rate schedule needs an end: set max_steps or max_epochs of the trainer.")
            return max(1, int(steps))
        steps, most = planned_steps(trainer, self._data.steps_per_epoch()), trainer.max_steps
        if steps < most:
            epochs = trainer.max_epochs
            log.info("trainer.max_epochs=%s ends the run after %d of trainer.max_steps=%d", epochs, steps, most)
        return steps

    def on_fit_start(self) -> None:
        """Solve the closed form of ITC, unless the run is resumed; start the momentum model; do not broadcast buffers.

        All processes compute the same buffers (ITM's calibration), and they may validate unequal numbers of batches.
        """
        wrapped = self.trainer.strategy.model
        if isinstance(wrapped, DistributedDataParallel):
            wrapped.broadcast_buffers = False
        if has_finetuning(self.trainer):
            unfreeze_optimized(self.trainer)
        resumed = self.trainer.ckpt_path is not None
        if wants_closed_form(self.model) and not resumed and not self.trainer.fast_dev_run:  # pyright: ignore
            assert isinstance(self.model, MMBertForPreTraining) and isinstance(self._data, PairsDataModule)
            images = self.evaluation_options.val_images
            with self.trainer.precision_plugin.forward_context():
                start_from_closed_form(self.model, self._data, val_images=images, seed=self.seed)
        if self.momentum is not None:
            self.momentum.start()

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Seed dropout by the step, so that it does not depend on what happened before."""
        torch.manual_seed(torch_seed(self.seed, "dropout", self._batch_number(), self.global_rank))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Compute the weighted loss of one batch."""
        batch = self._normalized(batch)
        self._count_skipped("train", self._data.train_samples, batch)
        generator = torch_generator(self.seed, "negatives", self._batch_number())
        output: PreTrainingOutput | TaskOutput = self.model(**batch, generator=generator, **self._stage(batch))
        if output.loss is None:
            raise UsageError(f"the model computes no loss of a batch with {', '.join(batch)}: labels are missing.")
        objectives = output.objectives or {}  # none for a batch of the user's own with `labels`
        if not self._since_step:
            self._indices = []
        losses = {name: objective.loss for name, objective in objectives.items()} or {"loss": output.loss}
        self._since_step.append({name: loss.detach() for name, loss in losses.items()})
        if getattr(self.trainer.train_dataloader, "dataset", None) is self._data.train_samples:
            self._indices += batch["index"].tolist()
        self._log_step(output.loss, objectives)
        return output.loss

    def _stage(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """Arguments of the model: the first stage trains one objective alone, by its labels."""
        options = self.optim_options
        step = self.trainer.global_step - options.first_stage_steps
        if step < 0 and options.first_stage:
            return {"only": options.first_stage}
        if not isinstance(self.model, MMBertForPreTraining):
            return {}
        steps = self._total_steps - options.first_stage_steps
        stage: dict[str, Any] = {
            "progress": torch.tensor(step / max(1, steps), dtype=torch.float32, device=self.device)
        }
        if self.momentum is not None:
            stage["soft_targets"] = self.momentum.soft_targets(batch, step=step)
        return stage

    def _log_step(self, loss: Tensor, objectives: dict[str, ObjectiveOutput]) -> None:
        """Log losses and accuracies of the step over all processes."""
        parts = [loss / world_size()]  # a process's loss is its share times their number
        for output in objectives.values():
            hits = (output.logits.argmax(dim=-1) == output.targets).sum()
            count = hits.new_tensor(len(output.targets))
            parts += [output.loss / world_size(), hits, count, output.left_out]
        loss, *values = all_reduce_sum(torch.stack([part.detach().double() for part in parts]).float()).unbind()
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/lr", self.optimizers().param_groups[0]["lr"])  # pyright: ignore - of this step, not the next
        for i, name in enumerate(objectives):
            mean, hits, count, left_out = values[4 * i : 4 * i + 4]
            self.log(f"train/{name}_loss", mean)
            self.log(f"train/{name}_accuracy", hits / count.clamp(min=1))
            if name != "itc":
                self.log(f"train/{name}_left_out", left_out, on_step=True, reduce_fx="sum")

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Count samples and training time, without validation."""
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        samples = len(batch["index" if "index" in batch else "input_ids"]) * world_size()
        self.training_seconds += seconds
        self._recent.append((samples, seconds))
        # Over several batches: the one that is logged may be the one that saved a checkpoint.
        samples, seconds = map(sum, zip(*self._recent, strict=True))
        self.log("samples/s", samples / seconds, prog_bar=True)

    def _batch_number(self) -> int:
        """Number of training batches since the start of the run."""
        return int(self.trainer.fit_loop.epoch_loop.total_batch_idx)

    def on_train_start(self) -> None:
        """Start the clock of a run that resumes within an epoch, which Lightning does not start again."""
        self._clock = time.perf_counter()

    def on_train_epoch_start(self) -> None:
        """Start the clock; it measures from batch end to batch end, so waiting for data counts."""
        self._clock = time.perf_counter()

    def on_validation_end(self) -> None:
        """Leave the time of validation out."""
        self._clock = time.perf_counter()


def planned_steps(trainer: L.Trainer, batches: int) -> int:
    """Compute the optimizer steps of a run by `max_epochs` and `max_steps`.

    Args:
        trainer: With these limits.
        batches: Of each process in an epoch, without `limit_train_batches`.
    """
    per_epoch = -(-limited_steps(batches, trainer.limit_train_batches) // trainer.accumulate_grad_batches)
    epochs = trainer.max_epochs
    by_epochs = per_epoch * epochs if epochs is not None and epochs >= 0 else None
    by_steps = trainer.max_steps if trainer.max_steps >= 0 else None
    return max(1, min((n for n in (by_epochs, by_steps) if n is not None), default=1000 * per_epoch))
