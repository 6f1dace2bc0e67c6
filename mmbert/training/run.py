"""`TrainingRun`: the parts of a run, put together, trained, tested and saved."""

import logging
import os
import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # texts are tokenised in the loader's own processes

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger

from mmbert.data.decoded_images import keep_decoded_images
from mmbert.errors import UsageError, did_you_mean
from mmbert.evaluation.model_cache import Computation
from mmbert.evaluation.pairs import metric_names
from mmbert.model.initialization import STARTS_ANEW, quiet_transformers
from mmbert.model.lora import merge_adapters
from mmbert.model.modeling import MMBertForTask
from mmbert.model.options import KEYS
from mmbert.runtime.hardware import compute_threads
from mmbert.runtime.isolation import deterministic_algorithms
from mmbert.runtime.signals import StopSignals
from mmbert.runtime.terminal import print_messages_of
from mmbert.training import run_folder
from mmbert.training.assembly import assemble, run_identity, validate_architecture, validate_heads, validation_identity
from mmbert.training.checkpoints import (
    RunCheckpoints,
    VerifiedCheckpointIO,
    default_monitor,
    is_complete,
    latest_complete_checkpoint,
    ran_out_of_time,
    step_of,
)
from mmbert.training.closed_form import check_refit
from mmbert.training.distillation import find_teacher, teacher_identity, use_teacher, without_teacher
from mmbert.training.encoder_caching import check_cache_options, fill_encoder_cache, is_cached
from mmbert.training.frozen import restore_frozen
from mmbert.training.model_card import write_model_card
from mmbert.training.module import TrainingModule, planned_steps
from mmbert.training.option_checks import validate_run_options, validate_sections, warn_without_effect
from mmbert.training.progress import progress_callbacks
from mmbert.training.result import RunResult
from mmbert.training.run_options import SECTIONS, RunOptions, dump_config
from mmbert.training.sharding import full_state_dict, load_full_state_dict
from mmbert.training.summary import log_run_summary, write_results
from mmbert.training.trace import MetricsTable, Trace, continue_metrics
from mmbert.training.trainer import (
    build_trainer,
    report_lightning_errors,
    resolve_precision,
    trainer_options,
    validate_trainer_options,
)

log = logging.getLogger("mmbert")

MAX_THREADS = 4096
"""Above what any machine has; torch takes numbers that end the process."""


class TrainingRun:
    """The parts of a run: model, data, trainer and folder, built from its options.

    Args:
        options: Made by `parse_run`.
        command: fit, validate or test.
        stop: Signals that are taken; None takes none.
        started: When the run began, in seconds since 1970; None: now.
        dry: Build the parts only: nothing is written or printed.
        cache_root: Folder in which data.cache=auto makes its folder; None: that of the runs.

    Raises:
        UsageError: Options that can't be meant, or contradict each other.
        DataError: Something is wrong with a file.
    """

    def __init__(
        self,
        options: RunOptions,
        *,
        command: str = "fit",
        stop: StopSignals | None = None,
        started: float | None = None,
        dry: bool = False,
        cache_root: Path | None = None,
    ):
        self.cache_root = cache_root
        self.options, self.command, self.stop = options, command, stop or StopSignals()
        self.started = time.time() if started is None else started
        config, sections = options.config, options.sections
        validate_sections(config, {**SECTIONS, "trainer": None})
        if config.seed_everything is None or not 0 <= config.seed_everything < 2**32:
            raise UsageError(f"--seed_everything {config.seed_everything}: a number from 0 to {2**32 - 1:,}.")
        if config.name is None:
            raise UsageError("name: expected the name of the run's folder. Got value: null")
        if (config.threads or 1) > MAX_THREADS:
            raise UsageError(f"--threads {config.threads}: at most {MAX_THREADS:,}.")
        sections.evaluation.check()
        sections.checkpoint.check()
        check_cache_options(sections.data, sections.optim.freeze_image)
        validate_run_options(command, config.ckpt_path, config.resume, sections.model.pretrained)
        validate_trainer_options(sections.trainer)
        # What was used is what config.yaml and the run's identity hold, not null.
        config.trainer.precision, self.precision_reason = resolve_precision(config.trainer.precision)
        config.trainer.use_distributed_sampler = False
        config.threads = config.threads or compute_threads(sections.data.num_workers)
        torch.set_num_threads(config.threads)
        self.seed = int(config.seed_everything)
        explicit = {key.split(".")[1] for key in options.explicit if key.startswith("model.")}
        self.requested = {key: getattr(sections.model, key) for key in KEYS if key in explicit}
        self.teacher = find_teacher(sections.model) if command == "fit" else None
        self.parts = assemble(sections.model, sections.data, sections.optim, seed=self.seed)
        self.started += self.parts.preparation_seconds  # run/wall_seconds is of the run, not of generating its data
        validate_architecture(self.requested, self.parts.model.config)
        if command != "fit" and config.ckpt_path is None:
            validate_heads(sections.model, self.parts.model.config)
            check_refit(self.parts.model)
        if command == "validate" and self.parts.data.val_samples is None:
            raise UsageError("validate: the data has no split 'val'.")
        if not isinstance(self.parts.model, MMBertForTask):
            sections.evaluation.validate_objectives(self.parts.model.objectives)
        else:
            warn_without_effect(sections.model.task, options.explicit)
        sections.checkpoint.monitor = config.checkpoint.monitor = self._monitor(sections.checkpoint.monitor)
        self.module = TrainingModule(
            self.parts.model,
            self.parts.data,
            optim=sections.optim,
            evaluation=sections.evaluation,
            seed=self.seed,
            identity=run_identity(config, self.parts.model.config, self.parts.data) | teacher_identity(self.teacher),
        )
        self.checkpoint_path: str | None = config.ckpt_path
        self.dry = dry or bool(sections.trainer["fast_dev_run"])
        self.folder = Path()
        self.metrics: dict[str, Any] = {}
        self.trainer = self._trainer()
        if not dry:
            self._log_summary()

    def fit(self) -> RunResult:
        """Train, save the model of the best checkpoint, test it once and write the results."""
        self._prepare_images()
        on_cpu = self.computation.device.type == "cpu"
        with report_lightning_errors(), deterministic_algorithms() if on_cpu else nullcontext():
            self.trainer.fit(self.module, datamodule=self.parts.data, ckpt_path=self.checkpoint_path)
        if not self.trainer.fast_dev_run:  # pyright: ignore
            self._warn_if_cut_short()
            self._log_time_saving()
            self._load_best()
            self._save_model()  # before the test, which a signal may end
            self._evaluate()
            self._write_results()
        return self._result()

    def validate(self) -> RunResult:
        """Validate the given weights and write the results."""
        self._prepare_images()
        self.trainer.validate(self.module, datamodule=self.parts.data, ckpt_path=self.checkpoint_path, verbose=False)
        self._write_results()
        return self._result()

    def test(self) -> RunResult:
        """Test the given weights and write the results."""
        self._prepare_images()
        self._test(self.checkpoint_path)
        self._write_results()
        return self._result()

    def _prepare_images(self) -> None:
        """Compute the outputs of the frozen image encoder and of a teacher once, and keep decoded images."""
        root = self.cache_root or Path(self.trainer.default_root_dir)
        if self.teacher is not None:
            use_teacher(
                self.teacher, self.parts.model.config, self.parts.data, root=root, computation=self.computation,
                dry=self.dry,
            )  # fmt: skip
        if not self.dry:
            fill_encoder_cache(
                self.parts.model.mmbert,
                self.parts.data,
                root=root,
                computation=self.computation,
            )
            data = self.parts.data
            keep_decoded_images(
                data.used_samples(),
                data.options,
                side=data.processor.image_settings.image_size,
                processes=max(1, self.trainer.num_devices),
            )

    @property
    def computation(self) -> Computation:
        """Precision and device of the trainer."""
        trainer = self.trainer
        return Computation(
            str(trainer.precision), trainer.strategy.root_device, trainer.precision_plugin.forward_context
        )

    def _monitor(self, requested: str | None) -> str | None:
        """The metric that chooses the best checkpoint; only validation has such metrics. None: there is none."""
        model = self.parts.model
        if isinstance(model, MMBertForTask):
            names = [f"{model.config.task}_{name}" for name in model.task.monitors]
        else:
            names = metric_names(model.objectives)
        known = [f"val/{name}" for name in names]
        if not known and requested is None:  # ngrams alone: the last weights are saved
            return None
        monitor = requested or default_monitor(known)
        if monitor not in known:
            raise UsageError(
                f"checkpoint.monitor='{monitor}' is no validation metric of these objectives; "
                f"allowed are {', '.join(known) or 'none'}.{did_you_mean(monitor, known)}"
            )
        return monitor

    def _trainer(self) -> L.Trainer:
        """The trainer with the run's callbacks and loggers; creates the run's folder."""
        config, sections = self.options.config, self.options.sections
        chosen = {**dict(sections.trainer), "precision": config.trainer.precision, **self.options.trainer_objects}
        options = trainer_options(chosen, explicit=self.options.explicit)
        self._check_finetuning(options["callbacks"])
        first = int(os.environ.get("LOCAL_RANK", 0)) == 0
        resumed, created = None, first and not self.dry and config.resume is None
        if not (self.dry and config.resume is None):
            self.folder, resumed = self._find_folder(options["default_root_dir"], create=first and not self.dry)
        self.trace = Trace(self.folder / "trace.csv")
        self.checkpoints = RunCheckpoints(
            self.folder / "checkpoints", sections.checkpoint, self.stop, validation_identity(config, self.parts.data)
        )
        callbacks, loggers = options["callbacks"], options["logger"]
        if not self.dry:
            step = 0 if resumed is None else step_of(resumed)
            if self.command == "fit":  # the trace is written before the checkpoint of the same step
                callbacks += [self.trace, self.checkpoints]
            for callback in callbacks:  # beside the run's own checkpoints, whose names could be equal
                if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                    callback.dirpath = str(self.folder / "model_checkpoints")
            table = MetricsTable(self.folder, name="", version="", flush_logs_every_n_steps=1)
            loggers += [table, TensorBoardLogger(self.folder, "", "", sub_dir="tensorboard", purge_step=step)]
            if first:
                continue_metrics(table, step)
                content = dump_config(self.options)
                self._save_hyperparameters(content)
                (self.folder / "config.yaml").write_text(self._resolved_config(content), encoding="utf-8")
        callbacks, options["enable_progress_bar"] = progress_callbacks(callbacks, options["enable_progress_bar"])
        options.update(callbacks=callbacks, plugins=[*(options["plugins"] or []), VerifiedCheckpointIO()])
        if options["profiler"] is not None:  # its table is a log message of level INFO, which the command line hides
            print_messages_of("lightning.pytorch.profilers")
        try:
            return build_trainer(options)
        except UsageError:
            if created:
                shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def _find_folder(self, root: str, *, create: bool) -> tuple[Path, Path | None]:
        """The run's folder, and the checkpoint that it resumes from."""
        resume, name = self.options.config.resume, self.options.config.name
        if resume is None:
            return run_folder.new_run_folder(root, name, create=create), None
        if resume == "auto":
            folder = Path(root) / name
            found = latest_complete_checkpoint(folder / "checkpoints")
        else:
            found = Path(resume)
            folder = found.parent.parent
            if not is_complete(found):
                raise UsageError(
                    f"--resume {resume}: no complete checkpoint there; allowed are auto or a checkpoint's path."
                )
        if found is None:
            log.warning("--resume auto: no checkpoint in %s, so the run starts at step 0", folder / "checkpoints")
            run_folder.make_folder(folder)
        else:
            log.info("resuming at step %d from %s", step_of(found), found)
            self.checkpoint_path = str(found)
        return folder, found

    def _check_finetuning(self, callbacks: list[Any]) -> None:
        """Raise on a callback that unfreezes an image encoder whose outputs are cached."""
        found = [type(c).__name__ for c in callbacks if isinstance(c, BaseFinetuning)]
        if found and is_cached(self.parts.model.mmbert, self.parts.data.options):
            raise UsageError(
                f"trainer.callbacks: {found[0]} could unfreeze the image encoder, whose outputs are cached "
                "(optim.freeze_image); set data.cache=null."
            )

    def _save_hyperparameters(self, content: dict[str, Any]) -> None:
        """Give the module the options of the run, which it hands to loggers."""
        shown = {key: content[key] for key in ("name", *SECTIONS, "trainer", "threads")}
        architecture = self.module.hparams["model"]
        self.module.save_hyperparameters({**shown, "model": {**content["model"], **architecture}})

    def _resolved_config(self, content: dict[str, Any]) -> str:
        """The configuration with every default, ready to be run again."""
        model, built = content["model"], self.parts.model.config
        for key in KEYS:  # pretrained weights and the tokenizer set some; null stays what follows from others
            if model["pretrained"] is not None and key not in (*self.requested, *STARTS_ANEW):
                del model[key]  # so that the same run can start from another model
            elif model[key] is not None:
                model[key] = getattr(built, key)
        for key in ("base", "config", "ckpt_path", "resume"):
            content.pop(key, None)
        return yaml.safe_dump(content, sort_keys=False)

    def _log_summary(self) -> None:
        log_run_summary(
            self.module,
            self.parts.data,
            self.trainer,
            precision_reason=self.precision_reason,
            monitor=self.checkpoints.options.monitor or "",
            output="dry run, nothing is written" if self.dry else f"output in {self.folder}",
        )
        if self.command == "fit" and self.parts.data.val_samples is None:
            log.info("no split 'val': no best checkpoint is chosen, and the last weights are tested")
        if self.command == "fit" and not self.dry:
            self._warn_of_first_stage_alone()

    def _warn_of_first_stage_alone(self) -> None:
        """Warn where the first stage leaves no step to the other objectives; no error, as presets are tried briefly."""
        optim, data = self.options.sections.optim, self.parts.data
        if optim.first_stage is None:
            return
        batches = len(data.train_samples) // (data.options.batch_size * self.trainer.world_size)
        steps = planned_steps(self.trainer, batches)
        others = [name for name in self.parts.model.config.objective_options() if name != optim.first_stage]
        if optim.first_stage_steps >= steps and others:
            log.warning(
                "optim.first_stage_steps=%d takes all %d steps of the run, and nothing trains %s: choose fewer, or "
                "more by trainer.max_epochs or max_steps",
                optim.first_stage_steps, steps, ", ".join(others),
            )  # fmt: skip

    def _warn_if_cut_short(self) -> None:
        """Warn where trainer.max_time ended the run before its learning-rate schedule could."""
        step, total = self.trainer.global_step, self.module.total_steps()
        if step == 0:
            log.warning("no optimizer step was taken: the initial weights are tested and saved")
        if step >= total or not ran_out_of_time(self.trainer):
            return
        warmup = self.options.sections.optim.warmup * total
        within = "within its warm-up" if step < warmup else "with its learning rate not yet decayed"
        log.warning(
            "trainer.max_time ended the run at step %d of %d, %s: set trainer.max_steps near %d",
            step,
            total,
            within,
            step,
        )

    def _log_time_saving(self) -> None:
        """Log the time that training waited for checkpoints, where it is more than `checkpoint.max_time_fraction`."""
        saving, training = self.checkpoints.seconds_saving, self.module.training_seconds
        if saving > self.options.sections.checkpoint.max_time_fraction * training:
            log.info("saving checkpoints took %.1f s of %.1f s of training", saving, training)

    def _load_best(self) -> None:
        """Load the weights that are tested and saved: the best checkpoint's, or averaged ones."""
        callbacks: list[Any] = self.trainer.callbacks  # pyright: ignore
        averaging = [c for c in callbacks if isinstance(c, WeightAveraging | StochasticWeightAveraging)]
        # They would swap weights in the validation below once more.
        self.trainer.callbacks = [c for c in callbacks if c not in averaging]  # pyright: ignore
        if any(isinstance(c, StochasticWeightAveraging) for c in averaging):
            log.info("StochasticWeightAveraging: its averaged weights are tested and saved, not the best checkpoint")
            self.module.solve_for_evaluation()
            return
        best, monitor = self.checkpoints.best_path, self.checkpoints.options.monitor
        if best:
            checkpoint = VerifiedCheckpointIO().load_checkpoint(best)
            restore_frozen(checkpoint, self.module)
            load_full_state_dict(self.module, checkpoint["state_dict"])
            score = self.checkpoints.best_score
            log.info("best checkpoint on validation: %s, %s = %.4g", best, monitor, score)
            return
        self.module.solve_for_evaluation()
        if monitor is None:
            log.info("these objectives have no validation metric: the last weights are tested and saved")
        elif self.parts.data.val_samples is not None:
            log.warning("validation never gave %s, so the last weights are tested instead of the best", monitor)

    def _evaluate(self) -> None:
        """Validate and test the loaded weights."""
        self.module.results.clear()  # those of the last validation may be of other weights
        if self.parts.data.val_samples is not None:
            self.trainer.validate(self.module, datamodule=self.parts.data, verbose=False)
        if self.parts.data.test_splits:
            self._test()

    def _test(self, checkpoint_path: str | None = None) -> None:
        """Test the weights of a checkpoint, or those that the module has."""
        if self.trainer.limit_test_batches == 0:
            log.warning("trainer.limit_test_batches=0: nothing is tested")
        self.trainer.test(self.module, datamodule=self.parts.data, ckpt_path=checkpoint_path, verbose=False)

    def _save_model(self) -> None:
        """Save `model/`: the folder that `from_pretrained` and `mmbert.load` read."""
        weights = full_state_dict(self.parts.model)
        without_teacher(self.parts.model.config)
        if self.trainer.is_global_zero:
            weights = merge_adapters(self.parts.model, weights)
            with quiet_transformers():
                self.parts.model.save_pretrained(self.folder / "model", state_dict=weights)
            self.parts.processor.save_pretrained(self.folder / "model")
            self._write_model_card()

    def _write_results(self) -> None:
        if not self.dry and self.trainer.is_global_zero:
            self.metrics = write_results(
                self.module,
                self.folder,
                counts=self.trace.counts,
                started=self.started,
                seconds_saving=self.checkpoints.seconds_saving,
            )
            if self.command == "fit":
                self._write_model_card()

    def _write_model_card(self) -> None:
        """Write the model card, before the test without metrics."""
        data = self.options.sections.data
        write_model_card(
            self.folder / "model",
            name=str(self.options.config.name),
            config=self.parts.model.config,
            options=self.options.sections.model,
            data={key: getattr(data, key) for key in ("format", "annotations", "prepare", "train_fraction")},
            seed=self.seed,
            metrics=self.metrics,
            outcomes=self.module.items,
        )

    def _result(self) -> RunResult:
        return RunResult(self.folder, self.metrics, self.module.items)
