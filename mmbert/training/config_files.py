"""YAML files that build on each other: `base: [other.yaml]` names what a file differs from."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mmbert.errors import DataError, UsageError
from mmbert.model.options import Architecture

OPTIONS = ("--config", "-c")
OBJECTIVES = re.compile(r"--model(\.objectives(?:\.([^.]+)(?:\.([^.]+))?)?)?")
MAX_VALUES = 100_000


def expand_bases(arguments: list[str]) -> list[str]:
    """Put the files before the other options, which win, and before each file what it builds on.

    Args:
        arguments: The command line; `--config FILE`, `-c FILE`, `--config=FILE` and `-cFILE.yaml` are looked at.

    Raises:
        UsageError: A file that is not there, files that build on each other in a circle, or `--base`.
        DataError: A file that is no YAML mapping, or names a key twice.
    """
    files, options = _files_and_options(arguments)
    return [*files, *options]


def _files_and_options(arguments: list[str]) -> tuple[list[str], list[str]]:
    files: list[str] = []
    options: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        option, equals, value = argument.partition("=")
        if option == "--base":
            raise UsageError(f"{argument}: base is a key of YAML files; on the command line give --config twice.")
        if argument.startswith("-c") and argument.endswith((".yaml", ".yml")) and option not in OPTIONS:
            option, equals, value = "-c", "=", argument.removeprefix("-c")
        file = None if option not in OPTIONS else value if equals else next(rest, None)
        if file is None:
            options.append(argument)
            continue
        for path in _chain(Path(file), ()):
            files += ["--config", str(path)]
    return files, options


def merge_objective_options(arguments: list[str]) -> list[str]:
    """Spells out `--model.objectives.itm.negatives=hard`, of which jsonargparse would drop itm's other options.

    Args:
        arguments: The command line as `expand_bases` leaves it.
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
        elif not found.group(1):  # --model={objectives: ...}
            objectives = _mapping(_mapping(_parsed(value), {}).get("objectives"), objectives)
            out.append(f"{option}={value}")
        else:
            _, name, key = found.groups()
            given = _parsed(value)
            if key:
                known = objectives.get(name, {})
                given = {**_mapping(known, {"weight": known}), key: given}
                option, value = f"--model.objectives.{name}", json.dumps(given, default=str)
            objectives = {**objectives, name: given} if name else _mapping(given, objectives)
            out.append(f"{option}={value}")
    return out


def explicit_options(arguments: list[str]) -> dict[str, Any]:
    """What the YAML files and options of a command line say, flat; later ones win, defaults are left out.

    Args:
        arguments: In the form --KEY=VALUE.
    """
    found: dict[str, Any] = {}
    rest = iter(merge_objective_options(expand_bases(arguments)))
    for argument in rest:
        if argument == "--config":
            new = _options(yaml.safe_load(Path(next(rest)).read_text(encoding="utf-8")) or {})
        else:
            key, _, value = argument.removeprefix("--").partition("=")
            parsed = _parsed(value)
            # A whole section is merged into what there is, option by option.
            new = _options({key: parsed}) if "." not in key else {key: parsed}
        kept = {k: v for k, v in found.items() if not f"{k}.".startswith(tuple(f"{name}." for name in new))}
        found = kept | flat(new)
    return {key: value for key, value in sorted(found.items()) if key != "base"}


def _options(content: Mapping[str, Any]) -> dict[str, Any]:
    """`section.option` -> value; one that is a mapping replaces that of an earlier file as a whole."""
    sections = {key: value for key, value in content.items() if isinstance(value, dict)}
    inner = {f"{section}.{name}": value for section, own in sections.items() for name, value in own.items()}
    return {**inner, **{key: value for key, value in content.items() if key not in sections}}


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`section.option.key` -> value, for a mapping of mappings."""
    out: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict) and value:
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + str(key)] = value
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


def _check_keys(node: yaml.Node | None, file: Path, *, top: bool = True) -> None:
    """Refuses a key that stands twice, of which YAML keeps the last, and dots in one at the top."""
    if isinstance(node, yaml.SequenceNode):
        for part in node.value:
            _check_keys(part, file, top=False)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if isinstance(key, yaml.ScalarNode) and name in seen:
            raise DataError(f"{file}:{line}", f"the key {name!r} again, as in line {seen[name]}", "each key once")
        if top and "." in name:
            section, rest = name.split(".", 1)
            raise DataError(f"{file}:{line}", f"the key {name!r}", f"{section}: {{{rest}: ...}}")
        seen[name] = line
        _check_keys(value, file, top=False)


def _chain(file: Path, above: tuple[Path, ...]) -> list[Path]:
    """The file preceded by everything it builds on."""
    if file.resolve() in above:
        raise UsageError(f"{file} builds on itself: {' -> '.join(str(p) for p in (*above, file))}.")
    if not file.is_file():
        asked = f", which {above[-1]} builds on" if above else ""
        raise UsageError(f"--config {file}: there is no such file{asked}.")
    try:
        text = file.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if _values(node, {}) > MAX_VALUES:
            raise DataError(
                str(file), f"more than {MAX_VALUES:,} values once its aliases are followed", "a configuration"
            )
        _check_keys(node, file)
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
