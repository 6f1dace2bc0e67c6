"""`EvaluatingModule`: validation and test of a model in Lightning, the half of `TrainingModule` without training."""

import logging
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from mmbert.data.datamodule import PairsDataModule, SplitsDataModule
from mmbert.data.labelled_datamodule import LabelledDataModule
from mmbert.data.labelled_samples import LabelledSamples
from mmbert.data.pairs import Pairs
from mmbert.data.samples import Samples
from mmbert.errors import quote
from mmbert.evaluation.options import EvaluationOptions
from mmbert.evaluation.pairs import PairEvaluation
from mmbert.evaluation.tasks import TaskEvaluation
from mmbert.metrics.outcomes import ItemOutcomes
from mmbert.model.modeling import HeadedModel, MMBertForPreTraining, MMBertForTask
from mmbert.runtime.distributed import merge_across_ranks, world_size
from mmbert.training.closed_form import refit_closed_form, wants_refit
from mmbert.training.lightning_features import LightningFeatures, validate_loaders
from mmbert.training.match_calibration import calibrate_matching, wants_calibration
from mmbert.training.sample_counts import Skipped
from mmbert.training.sharding import gather_shards, spread_shards

log = logging.getLogger("mmbert")


class EvaluatingModule(LightningFeatures):
    """Evaluates the validation split, and every test split under its own name.

    Before validation in training it solves again what is solved and not trained: ITC's closed form (`itc.refit`) and
    ITM's threshold (`itm.calibrate`).

    Args:
        model: The model.
        data: Its splits are evaluated.
        evaluation: How images and captions are ranked.
        seed: Seed of the samples that are solved from.
    """

    def __init__(self, model: HeadedModel, data: SplitsDataModule, evaluation: EvaluationOptions, seed: int):
        super().__init__()
        self.model, self.evaluation_options, self.seed = model, evaluation, seed
        self._data = data
        self._evaluations: list[PairEvaluation | TaskEvaluation] = []
        self.predictions: dict[str, list[dict[str, Any]]] = {}
        """Test split -> predictions of a fine-tuned model, one row an example."""
        self.items: dict[str, dict[str, ItemOutcomes]] = {}
        """Test split -> metric -> outcome of each test item."""
        self.results: dict[str, float] = {}
        self.coverage: dict[str, float] = {}
        """Split -> fraction of its items that the metrics are over; below 1 with trainer.limit_*_batches."""
        self.skipped = Skipped(data.options.max_bad_fraction)
        self._unshared: dict[str, dict[int, list[str]]] = {}  # split -> what this process skipped in its evaluation

    def on_validation_epoch_start(self) -> None:
        """Start a new evaluation of the validation split."""
        options, pairs = self.evaluation_options, self._data.val_samples
        if self.trainer.state.fn == TrainerFn.FITTING:
            self._solve_again()
        validate_loaders(self.trainer.val_dataloaders, [] if pairs is None else [pairs], "val")
        self._start_evaluations([] if pairs is None else [pairs], options.val_images, options.val_scorer)

    def _solve_again(self) -> None:
        """Solve ITC's closed form and ITM's threshold on the present weights, which are gathered after it."""
        is_refitted, is_calibrated = wants_refit(self.model), wants_calibration(self.model)
        if not (is_refitted or is_calibrated):
            return
        assert isinstance(self.model, MMBertForPreTraining) and isinstance(self._data, PairsDataModule)
        gather_shards(self.model)
        with self.trainer.precision_plugin.forward_context():
            if is_refitted and not self.trainer.fast_dev_run:  # pyright: ignore
                refit_closed_form(self.model, self._data, seed=self.seed)
            if is_calibrated:
                calibrate_matching(self.model, self._data, seed=self.seed)

    def solve_for_evaluation(self) -> None:
        """Solve again what was last solved before a validation, for weights that none has seen; after training."""
        if not (wants_refit(self.model) or wants_calibration(self.model)):
            return
        before, was_training = self.device, self.training
        self.to(self.trainer.strategy.root_device).eval()
        self._solve_again()
        spread_shards(self.model)
        self.to(before).train(was_training)

    def on_test_epoch_start(self) -> None:
        """Start a new evaluation of every test split."""
        options = self.evaluation_options
        validate_loaders(self.trainer.test_dataloaders, [*self._data.test_samples.values()], "test")
        self._start_evaluations([*self._data.test_samples.values()], options.test_images, options.test_scorer)

    def _start_evaluations(self, splits: list[Samples], images: int, scorer: str) -> None:
        gather_shards(self.model)
        self._evaluations = [self._evaluation(samples, images, scorer) for samples in splits]

    def _evaluation(self, samples: Samples, images: int, scorer: str) -> PairEvaluation | TaskEvaluation:
        if isinstance(self.model, MMBertForTask):
            assert isinstance(samples, LabelledSamples) and isinstance(self._data, LabelledDataModule)
            return TaskEvaluation(self.model, samples, self._data.priors)
        assert isinstance(samples, Pairs)
        indices = samples.image_sample(images)
        return PairEvaluation(self.model, indices, scorer=scorer, num_samples=len(samples))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to the evaluation."""
        assert self._data.val_samples is not None
        batch = self._normalized(batch)
        self._count_skipped("val", self._data.val_samples, batch)
        self._evaluations[dataloader_idx].step(batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to the evaluation."""
        split, batch = self._data.test_splits[dataloader_idx], self._normalized(batch)
        self._count_skipped(split, self._data.test_samples[split], batch)
        self._evaluations[dataloader_idx].step(batch)

    def on_validation_epoch_end(self) -> None:
        """Log `val/...`."""
        self._log_evaluations(["val"])

    def on_test_epoch_end(self) -> None:
        """Log `test/...` and the other test splits under their own names."""
        self._log_evaluations(self._data.test_splits)

    def _log_evaluations(self, names: list[str]) -> None:
        for name, evaluation in zip(names, self._evaluations, strict=False):
            pairs = self._data.val_samples if name == "val" else self._data.test_samples[name]
            if self._data.options.on_bad_sample == "skip" and pairs is not None:
                self._share_skipped(name, pairs, self._unshared.pop(name, {}))
            with self.trainer.precision_plugin.forward_context():  # Lightning has it around the steps only
                found = evaluation.metrics()
            self.coverage[name] = evaluation.coverage().fraction
            if self.trainer.state.fn != "fit":
                evaluation.log_warnings(name)
            if name != "val":
                self.items[name] = evaluation.outcomes()
            if isinstance(evaluation, TaskEvaluation) and name != "val":
                self.predictions[name] = evaluation.predictions()
            metrics = {f"{name}/{key}": value for key, value in found.items()}
            self.results |= metrics  # Lightning's copy is rounded to fp32
            self.log_dict(metrics, rank_zero_only=False, sync_dist=False)
        self._evaluations = []
        spread_shards(self.model)

    def _count_skipped(self, split: str, pairs: Samples, batch: dict[str, Any]) -> None:
        if self._data.options.on_bad_sample != "skip":
            return
        why: dict[int, list[str]] = {}
        for i, reason in (
            zip(batch["skipped"].tolist(), batch["skip_reasons"], strict=True) if "skipped" in batch else ()
        ):
            example = pairs.examples[i]
            why[i] = [f"{example.place}: image {quote(example.image.name)}", reason]
        if split == "train" or world_size() == 1:
            self._share_skipped(split, pairs, why)
        else:  # processes may have unequal numbers of batches, so they can't talk before the end
            self._unshared.setdefault(split, {}).update(why)

    def _share_skipped(self, split: str, pairs: Samples, why: dict[int, list[str]]) -> None:
        """Merge skipped samples across ranks, so that all ranks count and stop alike."""
        merged = merge_across_ranks(why)
        new = self.skipped.add(split, len(pairs), merged) if merged else []
        for i in new if self.global_rank == 0 else ():
            log.warning("skipped in %s: %s", split, ": ".join(merged[i]))
