"""The command line: `python train.py fit --config ...`, and `mmbert` as the same."""

import logging
import os
import sys
from pathlib import Path
from typing import Any, Optional

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # texts are tokenised in the loader's own processes

import lightning as L
import torch
import yaml
from jsonargparse import set_parsing_settings
from jsonargparse.typing import PositiveInt
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from mmbert.cli.command_line import (
    explain,
    one_sentence_for_mistakes,
    refuse_contradictions,
    refuse_empty,
    set_up_logging,
)
from mmbert.cli.commands import COMMANDS, run_command
from mmbert.data.options import DataOptions
from mmbert.errors import UsageError, did_you_mean
from mmbert.evaluation.pairs import EvaluationOptions, metric_names
from mmbert.model.configuration import KEYS
from mmbert.model.initialization import STARTS_ANEW, ModelOptions, quiet_transformers
from mmbert.model.modeling import MMBertForTask
from mmbert.runtime.distributed import leave_together
from mmbert.runtime.hardware import best_precision, compute_threads
from mmbert.runtime.import_policy import close_imports
from mmbert.runtime.signals import StopSignals
from mmbert.training import run_folder
from mmbert.training.assembly import assemble, refuse_fresh_heads, refuse_unmet, run_identity
from mmbert.training.checkpoints import (
    CheckpointOptions,
    RunCheckpoints,
    WholeCheckpointIO,
    best_watched,
    is_whole,
    newest_whole,
    step_of,
)
from mmbert.training.config_files import with_bases, with_whole_objectives, written_options
from mmbert.training.module import TrainingModule
from mmbert.training.optim import OptimOptions
from mmbert.training.sharding import fsdp_strategy, load_whole, whole_weights
from mmbert.training.summary import announce, leave_results
from mmbert.training.trace import Trace, continue_metrics

log = logging.getLogger("mmbert")

MOST_THREADS = 4096
"""Above what any machine has; torch takes numbers that end the process."""

SECTIONS: dict[str, type] = {
    "model": ModelOptions,
    "data": DataOptions,
    "optim": OptimOptions,
    "evaluation": EvaluationOptions,
    "checkpoint": CheckpointOptions,
}
"""Name of a section of the configuration -> its options, whose attribute docstrings are the help texts."""


class Parser(LightningArgumentParser):
    """Says what a misspelt option could have meant."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, allow_abbrev=False, **kwargs)  # a shortened option is a misspelt one

    def error(self, message: str, ex: Exception | None = None) -> None:  # pyright: ignore
        """Prints one sentence and exits with 2."""
        known = [action.dest for action in self._actions]
        subcommands: dict[str, Parser] = next((a.choices for a in self._actions if isinstance(a.choices, dict)), {})
        for parser in subcommands.values():
            known += [action.dest for action in parser._actions]
        raise UsageError(explain(message, known, [*subcommands, *COMMANDS] if subcommands else [])) from ex


class MMBertCLI(LightningCLI):
    """LightningCLI whose sections are our option classes: model, data, optim, evaluation, trainer."""

    def __init__(self, arguments: list[str], *, stop: StopSignals, preparation_seconds: float = 0.0):
        self.stop, self.preparation_seconds, self.arguments = stop, preparation_seconds, arguments
        self.folder = Path()
        super().__init__(
            parser_kwargs={"epilog": "Also: " + "; ".join(f"mmbert {command}" for command in COMMANDS.values())},
            save_config_callback=None,
            seed_everything_default=0,
            parser_class=Parser,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=arguments,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """What can be done with a run; `mmbert predict` and `evaluate` take the model that a run leaves."""
        skipped = {
            "model",
            "train_dataloaders",
            "val_dataloaders",
            "dataloaders",
            "datamodule",
            "weights_only",
        }
        return {"fit": skipped, "validate": skipped, "test": skipped}

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The sections."""
        parser.add_argument("--name", type=str, default="run", help="The run's folder below trainer.default_root_dir.")
        parser.add_argument("--base", type=str | list[str] | None, help="YAML files that a YAML file builds on.")
        parser.add_argument(
            "--threads",
            type=Optional[PositiveInt],  # noqa: UP045 - PositiveInt is no class, so it takes no "|"
            help="CPU threads that compute. None: the cores that the loader leaves.",
        )
        parser.add_argument(
            "--resume",
            type=str | None,
            help="Go on with a run: 'auto' takes the newest whole checkpoint of --name, or the path of a checkpoint.",
        )
        for name, options in SECTIONS.items():
            parser.add_class_arguments(options, name)
        parser.add_lightning_class_args(L.Trainer, "trainer")
        parser.set_defaults(
            {
                "trainer.default_root_dir": "runs",
                "trainer.log_every_n_steps": 10,
                "trainer.num_sanity_val_steps": 0,
                "trainer.enable_model_summary": False,
            }
        )

    def _parse_ckpt_path(self) -> None:
        """Takes no options from a checkpoint: a stranger's could name anything."""

    def instantiate_classes(self) -> None:
        """Builds the parts of the run and says in one line what they are."""
        config = self._section(self.config)
        refuse_empty(config, {**SECTIONS, "trainer": None})
        self.config_init = self.parser.instantiate_classes(self.config)
        chosen = self._section(self.config_init)
        if (config.threads or 1) > MOST_THREADS:
            raise UsageError(f"--threads {config.threads}: at most {MOST_THREADS:,}.")
        torch.set_num_threads(config.threads or compute_threads(chosen.data.num_workers))
        chosen.evaluation.check()
        chosen.checkpoint.check()
        checkpoint, resume = config.get("ckpt_path"), config.get("resume")
        refuse_contradictions(str(self.subcommand), checkpoint, resume, chosen.model.pretrained, chosen.trainer)
        seed = int(config.seed_everything)
        written = {key.split(".")[1] for key in written_options(self.arguments) if key.startswith("model.")}
        self.asked = {key: getattr(chosen.model, key) for key in KEYS if key in written}
        self.parts = assemble(chosen.model, chosen.data, chosen.optim, seed=seed)
        refuse_unmet(self.asked, self.parts.model.config)
        if self.subcommand != "fit" and checkpoint is None:
            refuse_fresh_heads(chosen.model, self.parts.model.config)
        self.datamodule = self.parts.data
        if self.subcommand == "validate" and self.datamodule.val_pairs is None:
            raise UsageError("validate: the data has no split 'val'.")
        if not isinstance(self.parts.model, MMBertForTask):
            chosen.evaluation.refuse_lacking(self.parts.model.objectives)
        known = [f"val/{name}" for name in self._watched()]
        chosen.checkpoint.monitor = chosen.checkpoint.monitor or best_watched(known)
        if chosen.checkpoint.monitor not in known:
            raise UsageError(
                f"checkpoint.monitor='{chosen.checkpoint.monitor}' is no validation result of these objectives; "
                f"allowed are {', '.join(known)}.{did_you_mean(chosen.checkpoint.monitor, known)}"
            )
        self.model = TrainingModule(
            self.parts.model,
            self.parts.data,
            optim=chosen.optim,
            evaluation=chosen.evaluation,
            seed=seed,
            identity=run_identity(config, self.parts.model.config, self.parts.data),
        )
        self.trainer = self._trainer(config, chosen)
        self._announce()

    def _watched(self) -> list[str]:
        """Results that can choose the best checkpoint; only validation has them."""
        model = self.parts.model
        if isinstance(model, MMBertForTask):
            return [f"{model.config.task}_{name}" for name in model.task.watched]
        return metric_names(model.objectives)

    def _section(self, config: Any) -> Any:
        """The options of the subcommand that runs."""
        return config[self.subcommand]

    def _trainer(self, config: Any, chosen: Any) -> L.Trainer:
        options = dict(chosen.trainer)
        self.precision_reason = "as asked"
        if options["precision"] is None:
            options["precision"], self.precision_reason = best_precision()
        if options["strategy"] == "model_parallel":
            options["strategy"] = fsdp_strategy(options["devices"], options["num_nodes"])
        first = int(os.environ.get("LOCAL_RANK", 0)) == 0
        self.dry = bool(options["fast_dev_run"])
        self.folder, self.resumed = self._folder(config, options["default_root_dir"], create=first and not self.dry)
        self.trace = Trace(self.folder / "trace.csv")
        self.checkpoints = RunCheckpoints(self.folder / "checkpoints", chosen.checkpoint, self.stop)
        callbacks = list(options.pop("callbacks") or [])
        asked = options.pop("logger")
        loggers: list[Any] = asked if isinstance(asked, list) else [] if isinstance(asked, bool | None) else [asked]
        if not self.dry:
            step = 0 if self.resumed is None else step_of(self.resumed)
            if self.subcommand == "fit":  # the trace is written before the checkpoint of the same step
                callbacks += [self.trace, self.checkpoints]
            table = CSVLogger(self.folder, name="", version="", flush_logs_every_n_steps=1)
            loggers += [table, TensorBoardLogger(self.folder, "", "", sub_dir="tensorboard", purge_step=step)]
            if first:
                continue_metrics(table, step)
                (self.folder / "config.yaml").write_text(self._resolved(config))
        options.update(
            callbacks=callbacks,
            logger=loggers,
            use_distributed_sampler=False,
            enable_checkpointing=False,  # Lightning's own; ours is a callback of the same rank
            plugins=[*(options["plugins"] or []), WholeCheckpointIO()],
        )
        return L.Trainer(**options)

    def _folder(self, config: Any, root: str, *, create: bool) -> tuple[Path, Path | None]:
        """The run's folder, and the checkpoint that it goes on from."""
        resume = config.get("resume")
        if resume is None:
            return run_folder.new_run_folder(root, config.name, create=create), None
        if resume == "auto":
            folder = Path(root) / config.name
            found = newest_whole(folder / "checkpoints")
        else:
            found = Path(resume)
            folder = found.parent.parent
            if not is_whole(found):
                raise UsageError(
                    f"--resume {resume}: no whole checkpoint there; allowed are auto or a checkpoint's path."
                )
        if found is None:
            log.warning("--resume auto: no checkpoint in %s, so the run starts at step 0", folder / "checkpoints")
            folder.mkdir(parents=True, exist_ok=True)
        else:
            log.info("resuming at step %d from %s", step_of(found), found)
            self._section(self.config_init)["ckpt_path"] = str(found)
        return folder, found

    def _resolved(self, config: Any) -> str:
        """The configuration with every default, ready to be run again."""
        text = self._parser(self.subcommand).dump(config, skip_none=False)
        content = yaml.safe_load(text)
        model, built = content["model"], self.parts.model.config
        for key in KEYS:  # pretrained weights and the tokenizer tell some; null stays what follows from others
            if model["pretrained"] is not None and key not in (*self.asked, *STARTS_ANEW):
                del model[key]  # so that the same run can start from another model
            elif model[key] is not None:
                model[key] = getattr(built, key)
        for key in ("base", "config", "ckpt_path", "resume"):
            content.pop(key, None)
        return yaml.safe_dump(content, sort_keys=False)

    def _announce(self) -> None:
        announce(
            self.model,
            self.datamodule,
            self.trainer,
            precision_reason=self.precision_reason,
            monitor=self.checkpoints.options.monitor or "",
            output="dry run, nothing is written" if self.dry else f"output in {self.folder}",
        )
        if self.subcommand == "fit" and self.datamodule.val_pairs is None:
            log.info("no split 'val': no best checkpoint is chosen, and the last weights are tested")

    def after_fit(self) -> None:
        """Tests the best checkpoint once and leaves results, curves and the model to share."""
        trainer = self.trainer
        if trainer.fast_dev_run:  # pyright: ignore
            return
        best = self.checkpoints.best_path
        if best:
            load_whole(self.model, WholeCheckpointIO().load_checkpoint(best)["state_dict"])
            monitor, score = self.checkpoints.options.monitor, self.checkpoints.best_score
            log.info("best checkpoint on validation: %s, %s = %.4g", best, monitor, score)
        elif self.datamodule.val_pairs is not None:
            name = self.checkpoints.options.monitor
            log.warning("validation never gave %s, so the last weights are tested instead of the best", name)
        self.model.results.clear()  # those of the last validation may be of other weights
        if self.datamodule.val_pairs is not None:
            trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
        if self.datamodule.test_splits:
            trainer.test(self.model, datamodule=self.datamodule, verbose=False)
        weights = whole_weights(self.parts.model)
        if trainer.is_global_zero:
            with quiet_transformers():
                self.parts.model.save_pretrained(self.folder / "model", state_dict=weights)
            self.parts.processor.save_pretrained(self.folder / "model")
            self._report()

    def after_validate(self) -> None:
        """Writes and prints the results."""
        self._report()

    def after_test(self) -> None:
        """Writes and prints the results."""
        self._report()

    def _report(self) -> None:
        if not self.dry and self.trainer.is_global_zero:
            leave_results(
                self.model,
                self.folder,
                account=self.trace.account,
                preparation_seconds=self.preparation_seconds,
            )


class PreparedRun(MMBertCLI):
    """The parts of the run that a command line of `fit` asks for: built, not started, nothing written."""

    def __init__(self, arguments: list[str]):
        set_parsing_settings(docstring_parse_attribute_docstrings=True)
        dry = "--trainer.fast_dev_run=1"
        super().__init__(_spelled_out([*arguments, dry]), stop=StopSignals())

    @property
    def options(self) -> Any:
        """The sections, each an object of its class in `SECTIONS`."""
        return self._section(self.config_init)

    def _announce(self) -> None:
        """Says nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Does nothing."""


def _spelled_out(arguments: list[str]) -> list[str]:
    """The command line as jsonargparse has to see it."""
    return with_whole_objectives(with_bases(close_imports(arguments)))


def main(
    arguments: list[str] | None = None, *, default: list[str] | None = None, preparation_seconds: float = 0.0
) -> None:
    """Runs the command line.

    Args:
        arguments: Command line; None takes that of the process.
        default: Command line to use where none is given; None prints help.
        preparation_seconds: Time spent on data before, left out of `run/wall_seconds`.
    """
    set_up_logging()
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments:
        arguments = default or ["--help"]
    if arguments[0] in COMMANDS:  # for callers that do not come through mmbert.__main__
        run_command(arguments)
        return
    with one_sentence_for_mistakes(), StopSignals() as stop:
        MMBertCLI(_spelled_out(arguments), stop=stop, preparation_seconds=preparation_seconds)
        leave_together()
