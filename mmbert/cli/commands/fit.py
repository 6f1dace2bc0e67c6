"""`mmbert fit`, `validate` and `test`: the command line of a training run."""

import sys
from typing import NoReturn

from mmbert.errors import UsageError
from mmbert.training.run_options import RunParser, add_trainer_options, parse_run, run_parser

RUN_COMMANDS = {
    "fit": "Train a model, test its best checkpoint, and write the run's folder.",
    "validate": "Validate a checkpoint or a saved model on the split val.",
    "test": "Test a checkpoint or a saved model on the test splits.",
}
"""Commands of a run -> what they do."""


def run_training(command: str, arguments: list[str]) -> None:
    """Run fit, validate or test.

    Args:
        command: In `RUN_COMMANDS`.
        arguments: What follows it on the command line.

    Raises:
        SystemExit: After help, or with the code of a signal.
    """
    topics = [argument.partition("=")[2] for argument in arguments if argument.split("=")[0] in ("-h", "--help")]
    if topics:
        print_help(command, topics[0])
    options = parse_run(arguments, prog=f"mmbert {command}")
    # Heavy imports only now: an option error is reported without them.
    from mmbert.runtime.distributed import exit_together
    from mmbert.runtime.signals import StopSignals
    from mmbert.runtime.terminal import quiet_lightning
    from mmbert.training.run import TrainingRun
    from mmbert.training.run_folder import process_start

    quiet_lightning()
    with StopSignals() as stop:
        run = TrainingRun(options, command=command, stop=stop, started=process_start())
        getattr(run, command)()
        exit_together()


def print_help(command: str, topic: str) -> NoReturn:
    """Print the help of a run's command and exit.

    Args:
        command: In `RUN_COMMANDS`.
        topic: "" for mmbert's options, "trainer" for those of `lightning.Trainer`.

    Raises:
        UsageError: Another topic.
    """
    if topic == "":
        parser = run_parser(f"mmbert {command}", RUN_COMMANDS[command], lightning=False)
        parser.epilog = f"Options of lightning.Trainer, such as --trainer.max_epochs: mmbert {command} --help=trainer"
        parser.usage = f"mmbert {command} [--config FILE] [--SECTION.OPTION VALUE ...]"
    elif topic == "trainer":
        parser = RunParser(prog=f"mmbert {command}", description="Options of lightning.Trainer.")
        parser.usage = f"mmbert {command} [--trainer.OPTION VALUE ...]"
        add_trainer_options(parser)
    else:
        raise UsageError(f"--help={topic}: allowed are --help and --help=trainer.")
    parser.print_help()
    sys.exit(0)
