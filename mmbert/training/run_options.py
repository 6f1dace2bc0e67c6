"""The options of a training run: one parser for the command line, YAML files and Python."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Optional

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from jsonargparse.typing import PositiveInt

from mmbert.data.options import DataOptions
from mmbert.errors import UsageError
from mmbert.evaluation.options import EvaluationOptions
from mmbert.model.options import ModelOptions
from mmbert.runtime.import_policy import restrict_imports
from mmbert.training.config_files import expand_bases, explicit_options, merge_objective_options
from mmbert.training.option_checks import explain_constructor_error, explain_parser_error
from mmbert.training.options import CheckpointOptions, OptimOptions

SECTIONS: dict[str, type] = {
    "model": ModelOptions,
    "data": DataOptions,
    "optim": OptimOptions,
    "evaluation": EvaluationOptions,
    "checkpoint": CheckpointOptions,
}
"""Name of a section of the configuration -> its options, whose attribute docstrings are the help texts."""

TRAINER_DEFAULTS = {
    "default_root_dir": "runs",
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
}
"""Options of `lightning.Trainer` whose default differs from Lightning's."""


class RunParser(ArgumentParser):
    """Parser whose errors are `UsageError`s that say what a misspelt option could have meant."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, allow_abbrev=False, **kwargs)  # a shortened option is a misspelt one

    def parse_path(self, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Namespace:  # pyright: ignore
        """Parse a YAML file as UTF-8 in any locale; jsonargparse takes the locale's encoding."""
        text = Path(path).read_text(encoding="utf-8")
        text = "{}" if yaml.safe_load(text) is None else text  # empty, or comments alone
        return self.parse_string(text, os.path.basename(path), *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what the command line prints as one sentence."""
        raise UsageError(explain_parser_error(message, [action.dest for action in self._actions])) from ex


def run_parser(prog: str = "mmbert fit", description: str | None = None, *, lightning: bool = True) -> RunParser:
    """The parser of fit, validate and test.

    Args:
        prog: The command, for the help.
        description: What it does, for the help.
        lightning: Check the options of `lightning.Trainer` by its signature, which takes seconds to import. Without it
            `trainer` is any mapping.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = RunParser(prog=prog, description=description)
    parser.add_argument("-c", "--config", action="config", help="YAML file of options, or the name of a preset.")
    parser.add_argument("--name", type=str, default="run", help="The run's folder below trainer.default_root_dir.")
    parser.add_argument("--seed_everything", type=int, default=0, help="Seed of everything random in the run.")
    parser.add_argument("--base", type=str | list[str] | None, help="YAML files that a YAML file builds on.")
    parser.add_argument(
        "--threads",
        type=Optional[PositiveInt],  # noqa: UP045 - PositiveInt is no class, so it takes no "|"
        help="CPU threads that compute. None: the cores that the loader leaves.",
    )
    parser.add_argument(
        "--resume",
        type=str | None,
        help="Resume a run: 'auto' takes the latest complete checkpoint of --name, or the path of a checkpoint.",
    )
    parser.add_argument(
        "--ckpt_path", type=str | None, help="Checkpoint whose weights are validated or tested, RUN/checkpoints/*.ckpt."
    )
    for name, options in SECTIONS.items():
        parser.add_class_arguments(options, name)
    if lightning:
        add_trainer_options(parser)
    else:
        parser.add_argument("--trainer", type=dict[str, Any] | None, help="Options of lightning.Trainer.")
    return parser


def add_trainer_options(parser: ArgumentParser) -> None:
    """Add the options of `lightning.Trainer`, with mmbert's defaults."""
    import lightning as L  # seconds: help pages and option errors do without it

    parser.add_class_arguments(L.Trainer, "trainer", fail_untyped=False, instantiate=False, sub_configs=True)
    parser.set_defaults({f"trainer.{key}": value for key, value in TRAINER_DEFAULTS.items()})


class RunOptions(NamedTuple):
    """The options of one run."""

    parser: RunParser
    config: Namespace
    """As parsed, from which `config.yaml` is written."""
    sections: Namespace
    """The same, each section an object of its class in `SECTIONS`; callbacks and loggers are built."""
    explicit: dict[str, Any]
    """Flat options that a file, the command line or the caller names; defaults are left out."""
    trainer_objects: Mapping[str, Any] = {}
    """Options of `lightning.Trainer` that Python gives as objects, such as callbacks."""


def parse_run(
    arguments: list[str], *, prog: str = "mmbert fit", trainer_objects: Mapping[str, Any] | None = None
) -> RunOptions:
    """Parse the options of a run.

    Args:
        arguments: As on the command line after `mmbert fit`: files first build on their bases, later options win.
        prog: The command, for messages.
        trainer_objects: See `RunOptions`.

    Raises:
        UsageError: An unknown option, or a value of the wrong type.
        DataError: A file that is no YAML mapping.
    """
    arguments = restrict_imports(arguments, lightning=False)
    expanded = merge_objective_options(expand_bases(arguments))
    explicit = explicit_options(arguments)
    for name in (*SECTIONS, "trainer"):
        if explicit.get(name, {}) != {}:
            raise UsageError(f"{name}: expected a mapping of options. Got value: {explicit[name]!r}")
    if not any(argument.startswith("--print_config") for argument in expanded):
        run_parser(lightning=False).parse_args(expanded)  # an error in one of our sections need not wait for Lightning
    restrict_imports([])
    parser = run_parser(prog)
    config = parser.parse_args(expanded)
    try:
        sections = parser.instantiate_classes(config)
    except Exception as error:  # callbacks and loggers raise what they like, such as for a package that is missing
        raise UsageError(explain_constructor_error(error)) from error
    assert isinstance(sections, Namespace)
    return RunOptions(parser, config, sections, explicit, trainer_objects or {})


def to_arguments(config: str | os.PathLike[str] | None, options: Mapping[str, Any]) -> list[str]:
    """The command line that stands for a configuration and options from Python.

    Args:
        config: A YAML file or the name of a preset; None: defaults.
        options: Dotted option -> value, {"model.fusion": "late"}.
    """
    files = [] if config is None else ["--config", os.fspath(config)]
    return [*files, *(f"--{key}={_to_text(value)}" for key, value in options.items())]


def flatten_sections(sections: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sections as Python gives them, as flat options and the trainer's objects.

    Args:
        sections: Name -> mapping of options, or dataclass of which the fields count that differ from their default, or
            None.

    Returns:
        Dotted option -> plain value, and option of the trainer -> object that no file could name.
    """
    flat: dict[str, Any] = {}
    objects: dict[str, Any] = {}
    for name, options in sections.items():
        if options is None:
            continue
        if is_dataclass(options) and not isinstance(options, type):
            default = asdict(type(options)())
            options = {key: value for key, value in asdict(options).items() if value != default[key]}
        if not isinstance(options, Mapping):
            raise UsageError(f"{name}={options!r}: expected a mapping of options, {{option: value}}.")
        for key, value in options.items():
            if name == "trainer" and _is_object(value):
                objects[key] = value
            else:
                flat[f"{name}.{key}"] = value
    return flat, objects


def _is_object(value: Any) -> bool:
    """Whether a value can't be written to a YAML file."""
    if isinstance(value, list | tuple):
        return any(map(_is_object, value))
    if isinstance(value, Mapping):
        return any(map(_is_object, value.values()))
    return not isinstance(value, str | int | float | bool | os.PathLike | None)


def _to_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return os.fspath(value) if isinstance(value, os.PathLike) else json.dumps(value, default=str)


def dump_config(options: RunOptions) -> dict[str, Any]:
    """Every option with its default, as plain values."""
    return yaml.safe_load(options.parser.dump(_without_enums(options.config), skip_none=False))


def _without_enums(value: Any) -> Any:
    """Replace the enums among the defaults of callbacks by their values, because jsonargparse can't dump them."""
    if isinstance(value, Namespace):
        return Namespace({key: _without_enums(inner) for key, inner in vars(value).items()})
    if isinstance(value, list):
        return [_without_enums(inner) for inner in value]
    return value.value if isinstance(value, Enum) else value
