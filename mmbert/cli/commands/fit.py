"""`mmbert fit`, `validate` and `test`: the command line of a training run."""

import sys
from typing import NoReturn

from jsonargparse import ArgumentParser, set_parsing_settings

from mmbert.runtime.distributed import exit_together
from mmbert.runtime.signals import StopSignals
from mmbert.training.fit import TrainingRun
from mmbert.training.run_folder import process_start
from mmbert.training.run_options import add_trainer_options, parse_run, run_parser

RUN_COMMANDS = {
    "fit": "Train a model, test its best checkpoint, and write the run's folder.",
    "validate": "Validate a checkpoint or a saved model on the split val.",
    "test": "Test a checkpoint or a saved model on the test splits.",
}
"""Commands of a run -> what they do."""


def run_training(command: str, arguments: list[str], *, preparation_seconds: float = 0.0) -> None:
    """Run fit, validate or test.

    Args:
        command: In `RUN_COMMANDS`.
        arguments: What follows it on the command line.
        preparation_seconds: Time spent on data before, left out of `run/wall_seconds`.

    Raises:
        SystemExit: After help, or with the code of a signal.
    """
    if any(argument in ("-h", "--help", "--help=trainer") for argument in arguments):
        print_help(command, trainer="--help=trainer" in arguments)
    started = process_start() + preparation_seconds
    parser = run_parser(f"mmbert {command}", RUN_COMMANDS[command])
    with StopSignals() as stop:
        run = TrainingRun(parse_run(arguments, parser), command=command, stop=stop, started=started)
        getattr(run, command)()
        exit_together()


def print_help(command: str, *, trainer: bool) -> NoReturn:
    """Print the help of a run's command: mmbert's options, or those of `lightning.Trainer`."""
    if trainer:
        set_parsing_settings(docstring_parse_attribute_docstrings=True)
        parser = ArgumentParser(prog=f"mmbert {command}", description="Options of lightning.Trainer.")
        add_trainer_options(parser)
    else:
        parser = run_parser(f"mmbert {command}", RUN_COMMANDS[command], trainer=False)
        parser.epilog = f"Options of lightning.Trainer, such as --trainer.max_epochs: mmbert {command} --help=trainer"
    parser.print_help()
    sys.exit(0)
