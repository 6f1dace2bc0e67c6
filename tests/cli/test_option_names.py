"""Every option that a message or docstring of mmbert names exists."""

import argparse
import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import lightning as L
import pytest

import mmbert
from mmbert.cli.main import COMMANDS, RUN_COMMANDS, Parser
from mmbert.data.options import DataOptions
from mmbert.evaluation.options import EvaluationOptions
from mmbert.model.options import ModelOptions
from mmbert.training.options import CheckpointOptions, OptimOptions

PACKAGE = Path(mmbert.__file__).parent
SECTIONS = {
    "data": DataOptions,
    "model": ModelOptions,
    "optim": OptimOptions,
    "evaluation": EvaluationOptions,
    "checkpoint": CheckpointOptions,
}
RUN_OPTIONS = {
    "config",
    "base",
    "name",
    "runs",
    "resume",
    "ckpt_path",
    "seed_everything",
    "threads",
    "print_config",
    "help",
    "version",
}
"""Options of fit, validate and test outside the sections, and those of every command."""
NOT_OPTIONS = {"limit_", "estimated_stepping_batches"}
"""Keys after a section's name that are a beginning of several options, or an attribute of the Trainer."""
FILES = {"py", "safetensors", "json", "css", "md"}
"""What follows "data." or "model." in names of files."""


def strings() -> Iterator[tuple[str, str]]:
    """Place and text of every string of the package, parts of f-strings included."""
    report = PACKAGE / "compare/report"  # its style sheets have "--ink" and the like
    for file in sorted({*PACKAGE.rglob("*.py")} - {*report.rglob("*.py"), PACKAGE / "__init__.py"}):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield f"{file.relative_to(PACKAGE)}:{node.lineno}", node.value


def named_keys(text: str) -> Iterator[tuple[str, str]]:
    """Section and key of each "data.images" of a text; "mmbert.data.images" is a module, "data.{" a variable."""
    for match in re.finditer(r"(?<![\w./])(data|model|optim|evaluation|checkpoint|trainer)\.([a-z_0-9]+)(?!\w)", text):
        if match[2] not in FILES | NOT_OPTIONS and not text[match.end() :].startswith(("{", "*", "_*", ".py")):
            yield match[1], match[2]


def command_line_options() -> set[str]:
    """Options of all commands that have their own parser."""
    found: set[str] = set()

    def collect(parser: argparse.ArgumentParser) -> None:
        for action in parser._actions:
            found.update(option.lstrip("-") for option in action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                for below in action.choices.values():
                    collect(below)

    for name in COMMANDS:
        if name not in RUN_COMMANDS:
            parser = Parser(prog=name)
            importlib.import_module(f"mmbert.cli.commands.{name}").add_options(parser)
            collect(parser)
    return found


def test_keys_of_sections_exist() -> None:
    known = {name: {field.name for field in fields(section)} for name, section in SECTIONS.items()}
    known["trainer"] = {*inspect.signature(L.Trainer).parameters}
    named = [(place, *key) for place, text in strings() for key in named_keys(text)]
    assert len(named) > 100
    assert not [entry for entry in named if entry[2] not in known[entry[1]]]


def test_options_of_the_command_line_exist() -> None:
    known = command_line_options() | RUN_OPTIONS | {*SECTIONS, "trainer"}
    named = [
        (place, option)
        for place, text in strings()
        for option in re.findall(r"(?<![\w-])--([a-z][\w-]*)(?![\w.-]*[.{=]?\{)", text)
        if not re.search(rf"--{option}\.", text)
    ]
    assert len(named) > 50
    assert not [entry for entry in named if entry[1] not in known]


@pytest.mark.parametrize("text", ["set data.imagse", "data.images, data.imags.", "--data.imags=x"])
def test_misspelt_key_would_be_found(text: str) -> None:
    keys = {field.name for field in fields(DataOptions)}
    assert [key for _, key in named_keys(text) if key not in keys]
