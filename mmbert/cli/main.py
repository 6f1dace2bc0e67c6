"""`mmbert COMMAND ...`: finds the command and imports only what it needs."""

import argparse
import importlib
import sys
from typing import NamedTuple, NoReturn

from mmbert.errors import UsageError, did_you_mean
from mmbert.runtime.terminal import escape_unprintable, report_user_errors, set_up_logging


class Command(NamedTuple):
    """One line of the help page."""

    group: str
    usage: str
    help: str


COMMANDS = {
    "fit": Command("Train", "--config FILE", "train a model on image-caption pairs or a task, and test it"),
    "validate": Command("Train", "--config FILE", "validate a checkpoint or a saved model of a run"),
    "test": Command("Train", "--config FILE", "test a checkpoint or a saved model of a run"),
    "compare": Command("Train", "--config FILE", "compare fusion strategies with equal budgets and several seeds"),
    "match": Command("Use a model", "MODEL IMAGE TEXT ...", "how well each text fits an image"),
    "ask": Command("Use a model", "MODEL IMAGE QUESTION", "answers of a model fine-tuned for VQA"),
    "explain": Command("Use a model", "MODEL IMAGE TEXT", "relevance of every token and image patch for a score"),
    "index": Command("Use a model", "MODEL FOLDER --out INDEX", "encode a folder of images for search"),
    "search": Command("Use a model", "INDEX TEXT|IMAGE", "find images of an index by text or by image"),
    "export": Command("Use a model", "onnx|program MODEL OUT", "write ONNX files or torch.export programs"),
    "demo": Command("Use a model", "MODEL [MODEL ...]", "try models on a local page"),
    "predict": Command("Use a model", "vqa MODEL", "write answers to a VQA split for the evaluation server"),
    "evaluate": Command("Evaluate", "retrieval|foils MODEL", "evaluate a saved model on retrieval or foils"),
    "score": Command("Evaluate", "vqa", "score a file of VQA predictions as the official script does"),
    "data": Command("Prepare", "check|prepare", "check annotation files and images, or generate a data set"),
    "import": Command("Prepare", "SOURCE OUT", "convert a published checkpoint (such as ViLT) to a model folder"),
    "configs": Command("Prepare", "[show NAME]", "list the presets, or print one"),
}
"""Name -> its line on the help page; each is a module of `mmbert.cli.commands` (validate and test in `fit`)."""

RUN_COMMANDS = ("fit", "validate", "test")


class Parser(argparse.ArgumentParser):
    """Parser whose errors are `UsageError`s that say what a misspelt option could have meant."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """Raise what is printed with exit code 2."""
        from mmbert.training.option_checks import explain_parser_error

        raise UsageError(explain_parser_error(message, *_names(self)))


def main(arguments: list[str] | None = None, *, default: list[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: Command line without the program; None takes that of the process.
        default: Command line to use where none is given; None prints the help page.

    Raises:
        SystemExit: 0 after help, 1 for what is wrong with files, 2 for wrong options, the code of a signal.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    arguments = arguments or default or ["--help"]
    name, *rest = arguments
    set_up_logging()
    escape_unprintable(sys.stdout)
    with report_user_errors():
        if name in ("-h", "--help", "help"):
            print(help_page())
            raise SystemExit(0)
        if name == "--version":
            import mmbert

            print(f"mmbert {mmbert.__version__}")
            return
        if name not in COMMANDS:
            raise UsageError(_unknown(name))
        if name in RUN_COMMANDS:
            module = importlib.import_module("mmbert.cli.commands.fit")
            module.run_training(name, rest)
        else:
            _run(name, rest)


def help_page() -> str:
    """All commands, one line each, grouped by use."""
    lines = [
        "usage: mmbert COMMAND ...",
        "",
        "A text-image BERT whose fusion strategy, early, late or hybrid, is one key.",
    ]
    width = max(len(f"{name} {command.usage}") for name, command in COMMANDS.items())
    for group in dict.fromkeys(command.group for command in COMMANDS.values()):
        lines += ["", f"{group}:"]
        lines += [
            f"  {f'{name} {command.usage}'.ljust(width)}  {command.help}"
            for name, command in COMMANDS.items()
            if command.group == group
        ]
    return "\n".join([*lines, "", "mmbert COMMAND --help lists its options; mmbert --version prints the version."])


def _unknown(name: str) -> str:
    if name.startswith("-"):
        return f"the command comes first, as in mmbert fit {name}; commands are {', '.join(COMMANDS)}."
    return f"there is no command '{name}'; allowed are {', '.join(COMMANDS)}.{did_you_mean(name, COMMANDS)}"


def _run(name: str, arguments: list[str]) -> None:
    from mmbert.runtime.signals import StopSignals

    module = importlib.import_module(f"mmbert.cli.commands.{name}")
    parser = Parser(prog=f"mmbert {name}")
    module.add_options(parser)
    with StopSignals():
        options = vars(parser.parse_args(arguments))
        code = options.pop("run")(**options)
    if code:
        raise SystemExit(code)


def _names(parser: argparse.ArgumentParser) -> tuple[list[str], list[str]]:
    """All options at and below a parser, and the subcommands right below it."""
    options, subcommands = [], []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            subcommands += action.choices
            for below in action.choices.values():
                options += _names(below)[0]
        else:
            options.append(action.dest)
    return options, subcommands
