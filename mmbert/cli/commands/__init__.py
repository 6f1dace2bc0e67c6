"""The small commands beside training, one file each: their options, and what they print."""

import argparse
from typing import NoReturn

from mmbert.cli.command_line import explain, one_sentence_for_mistakes, set_up_logging
from mmbert.cli.commands import ask, compare, data, evaluate, match, predict, score
from mmbert.errors import UsageError
from mmbert.runtime.signals import StopSignals

COMMANDS = {
    "ask": "ask MODEL IMAGE QUESTION, which prints a fine-tuned model's answers",
    "compare": "compare -c FILE, which compares fusion strategies with equal budgets and several seeds, and reports",
    "data": "data check FILE, which lists every problem of an annotation file and its pictures",
    "evaluate": "evaluate retrieval MODEL and evaluate foils MODEL, which judge a saved model on files one names",
    "match": "match MODEL IMAGE TEXT ..., which tells how well each text fits a picture",
    "predict": "predict vqa MODEL, which writes the file of answers that VQA's evaluation server takes",
    "score": "score vqa, which scores a file of predictions as the official script does",
}
"""First word -> what it is for; `mmbert --help` lists them under LightningCLI's own."""


class Parser(argparse.ArgumentParser):
    """Says in one sentence what is wrong, with a suggestion where a name is misspelt."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """Raise what is printed with exit code 2."""
        raise UsageError(explain(message, *_names(self)))


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


def run_command(arguments: list[str]) -> None:
    """Run one of `COMMANDS`.

    Args:
        arguments: command line without the program; the first is in `COMMANDS`.

    Raises:
        SystemExit: 1 for what is wrong with the files, 2 for wrong options, 0 after help.
    """
    set_up_logging()
    with one_sentence_for_mistakes(), StopSignals():
        options = vars(_parser().parse_args(arguments))
        code = options.pop("run")(**options)
    if code:
        raise SystemExit(code)


def _parser() -> Parser:
    parser = Parser(prog="mmbert")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (ask, compare, data, evaluate, match, predict, score):
        name = module.__name__.rsplit(".", 1)[-1]
        module.add_options(commands.add_parser(name, help=COMMANDS[name]))
    return parser
