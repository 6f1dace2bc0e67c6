"""Arguments that several commands share."""

import argparse
import json
import os
import sys
from typing import Any

from mmbert.errors import UsageError
from mmbert.runtime.import_policy import OPTION, allow_import_from_cwd


class _AllowImport(argparse.Action):
    def __call__(self, parser: object, namespace: object, values: Any, option_string: str | None = None) -> None:
        allow_import_from_cwd(values)


def add_model(command: argparse.ArgumentParser, description: str = "A saved model's folder: RUN/model.") -> None:
    """Add the argument MODEL to a command, and the option `--allow-import`, which a model may need."""
    command.add_argument("model", metavar="MODEL", help=description)
    add_allow_import(command)


def add_allow_import(command: argparse.ArgumentParser) -> None:
    """Add the option that lets files name classes of a module; see `mmbert.runtime.allowed_imports`."""
    command.add_argument(OPTION, metavar="MODULE", action=_AllowImport, default=argparse.SUPPRESS,
                         help="A module of yours that a fusion comes from, such as my_fusion.")  # fmt: skip


def add_device(command: argparse.ArgumentParser) -> None:
    """Add the options `--device` and `--dtype` of `mmbert.load`."""
    command.add_argument("--device", help="cpu, cuda, cuda:1 ...; default: the GPU if there is one.")
    command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
                         help="Of the weights (default float32); the others take half the memory.")  # fmt: skip


def read_list(arguments: list[str], name: str) -> list[str]:
    """Replace an argument "-" by the lines of standard input, without empty ones.

    Args:
        arguments: Texts or files of the command line.
        name: What the help page calls them, for the message.

    Raises:
        UsageError: An argument is empty.
    """
    found = []
    for argument in arguments:
        if not argument.strip():
            raise UsageError(f"{name} {argument!r} is empty: give one, or - for the lines of standard input.")
        lines = sys.stdin.buffer.read().decode("utf-8", "replace").splitlines() if argument == "-" else [argument]
        found += [line for line in lines if line.strip()]
    return found


def add_json(command: argparse.ArgumentParser) -> None:
    """Add the option `--json`."""
    command.add_argument("--json", action="store_true", help="Print JSON in place of text.")


def print_json(content: object) -> None:
    """Print a value as JSON in ASCII, so that any terminal takes it."""
    print(json.dumps(content, indent=2))


def utf8_text(argument: str) -> str:
    """Decode a text or name on the command line as UTF-8 in any locale; Python takes the locale's encoding."""
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeError:
        return argument
