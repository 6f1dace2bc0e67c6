"""YAML files that build on each other: `base: [other.yaml]` names what a file differs from."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from mmbert.configuration import Architecture
from mmbert.errors import DataError, UsageError

OPTIONS = ("--config", "-c")
OBJECTIVES = re.compile(r"--model\.objectives(?:\.([^.]+)(?:\.([^.]+))?)?")
MAX_VALUES = 100_000


def with_bases(arguments: list[str]) -> list[str]:
    """Puts the files that a configuration builds on before it on the command line.

    Args:
        arguments: The command line; `--config FILE`, `-c FILE` and `--config=FILE` are looked at.

    Raises:
        UsageError: A file that is not there, or files that build on each other in a circle.
        DataError: A file that is no YAML mapping.
    """
    out: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        option, equals, value = argument.partition("=")
        if option not in OPTIONS:
            out.append(argument)
            continue
        file = value if equals else next(rest, None)
        if file is None:
            out.append(argument)
            continue
        for path in _chain(Path(file), ()):
            out += ["--config", str(path)]
    return out


def with_whole_objectives(arguments: list[str]) -> list[str]:
    """Spells out `--model.objectives.itm.negatives=hard`, of which jsonargparse would drop itm's other options.

    Args:
        arguments: The command line as `with_bases` leaves it.
    """
    objectives: dict[str, Any] = dict(Architecture().objectives)
    out: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        option, equals, value = argument.partition("=")
        found = OBJECTIVES.fullmatch(option)
        if not found and option != "--config":
            out.append(argument)
            continue
        value = value if equals else next(rest, None)
        if value is None:  # nothing follows, of which the parser tells
            out.append(argument)
        elif not found:
            content = yaml.safe_load(Path(value).read_text(encoding="utf-8")) or {}
            objectives = _mapping(_mapping(content.get("model"), {}).get("objectives"), objectives)
            out += [option, value]
        else:
            name, key = found.groups()
            given = _parsed(value)
            if key:
                known = objectives.get(name, {})
                given = {**_mapping(known, {"weight": known}), key: given}
                option, value = f"--model.objectives.{name}", json.dumps(given, default=str)
            objectives = {**objectives, name: given} if name else _mapping(given, objectives)
            out.append(f"{option}={value}")
    return out


def _mapping(value: Any, otherwise: dict[str, Any]) -> dict[str, Any]:
    return value if isinstance(value, dict) else otherwise


def _parsed(value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def _values(node: yaml.Node | None, known: dict[int, int]) -> int:
    """Values that a YAML document stands for when every alias is written out: a few lines can stand for billions."""
    if node is None or id(node) in known:
        return 0 if node is None else known[id(node)]
    known[id(node)] = MAX_VALUES  # for an alias within itself
    inner = node.value if isinstance(node, yaml.SequenceNode | yaml.MappingNode) else []
    inner = [part for pair in inner for part in pair] if isinstance(node, yaml.MappingNode) else inner
    known[id(node)] = 1 + sum(_values(part, known) for part in inner)
    return known[id(node)]


def _chain(file: Path, above: tuple[Path, ...]) -> list[Path]:
    """The file preceded by everything it builds on."""
    if file.resolve() in above:
        raise UsageError(f"{file} builds on itself: {' -> '.join(str(p) for p in (*above, file))}.")
    if not file.is_file():
        asked = f", which {above[-1]} builds on" if above else ""
        raise UsageError(f"--config {file}: there is no such file{asked}.")
    try:
        text = file.read_text(encoding="utf-8")
        if _values(yaml.compose(text, Loader=yaml.SafeLoader), {}) > MAX_VALUES:
            raise DataError(
                str(file), f"more than {MAX_VALUES:,} values once its aliases are followed", "a configuration"
            )
        content = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{file}:{mark.line + 1}" if mark is not None else str(file)
        raise DataError(place, getattr(error, "problem", None) or "no text in UTF-8", "YAML") from error
    if content is not None and not isinstance(content, dict):
        raise DataError(str(file), f"a {type(content).__name__}", "a YAML mapping of options")
    bases = (content or {}).get("base") or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UsageError(f"{file}: base: expected a file or a list of files. Got value: {bases!r}")
    before = [path for base in bases for path in _chain(file.parent / base, (*above, file.resolve()))]
    return [*before, file]
