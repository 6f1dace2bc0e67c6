"""Configuration files: YAML files that build on others by `base:`, and command-line options on top of them."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mmbert.errors import DataError, UsageError
from mmbert.model.options import Architecture
from mmbert.training.presets import find_config

OPTIONS = ("--config", "-c")
OBJECTIVES = re.compile(r"--model(\.objectives(?:\.([^.]+)(?:\.([^.]+))?)?)?")
MAX_VALUES = 100_000
WITHOUT_EFFECT = ("base", "data.prepare")
"""Options that change nothing about a run that has its files and its data."""


def expand_bases(arguments: list[str]) -> list[str]:
    """Replace each `--config` by the files that it builds on and itself, and move all files before the options.

    Later files override earlier ones, and options override files.

    Args:
        arguments: Command line; a file or preset is given as `--config NAME`, `--config=NAME`, `-c NAME` or `-cNAME`.

    Raises:
        UsageError: A name that is neither a file nor a preset, files that build on each other in a circle, or `--base`.
        DataError: A file that is not a YAML mapping, or that has a key twice.
    """
    files, options = _split_arguments(arguments)
    return [*(part for file in files for part in ("--config", str(file))), *options]


def _split_arguments(arguments: list[str]) -> tuple[list[Path], list[str]]:
    """The configuration files with their bases, and the other arguments."""
    files: list[Path] = []
    options: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        option, equals, value = argument.partition("=")
        if option == "--base":
            raise UsageError(f"{argument}: base is a key of YAML files; on the command line give --config twice.")
        if argument.startswith("-c") and option != "-c":  # no other short option begins with c
            option, equals, value = "-c", "=", argument.removeprefix("-c")
        name = None if option not in OPTIONS else value if equals else next(remaining, None)
        if name is None:
            options.append(argument)
        else:
            files += with_bases(name)
    return files, options


def merge_objective_options(arguments: list[str]) -> list[str]:
    """Write out `--model.objectives.itm.negatives=hard` as all of itm's options, which jsonargparse would drop.

    Args:
        arguments: Command line in the form that `expand_bases` returns.
    """
    objectives: dict[str, Any] = dict(Architecture().objectives)
    merged: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        option, equals, value = argument.partition("=")
        match = OBJECTIVES.fullmatch(option)
        if not match and option != "--config":
            merged.append(argument)
            continue
        value = value if equals else next(remaining, None)
        if value is None:  # the parser reports the missing value
            merged.append(argument)
        elif not match:
            objectives = _mapping_or(_mapping_or(_read(value).get("model"), {}).get("objectives"), objectives)
            merged += [option, value]
        elif not match.group(1):  # --model={objectives: ...}
            objectives = _mapping_or(_mapping_or(_parse(value), {}).get("objectives"), objectives)
            merged.append(f"{option}={value}")
        else:
            _, name, key = match.groups()
            given = _parse(value)
            if key:
                current = objectives.get(name, {})
                given = {**_mapping_or(current, {"weight": current}), key: given}
                option, value = f"--model.objectives.{name}", json.dumps(given, default=str)
            objectives = {**objectives, name: given} if name else _mapping_or(given, objectives)
            merged.append(f"{option}={value}")
    return merged


def explicit_options(arguments: list[str]) -> dict[str, Any]:
    """Options that the YAML files and the command line set, as a flat mapping; defaults are left out.

    Args:
        arguments: Command line.
    """
    explicit: dict[str, Any] = {}
    remaining = iter(_joined(merge_objective_options(expand_bases(arguments))))
    for argument in remaining:
        if argument == "--config":
            new = _by_option(_read(next(remaining)))
        else:
            key, _, value = argument.removeprefix("--").partition("=")
            parsed = _parse(value)
            # A section given as one value is merged option by option.
            new = _by_option({key: parsed}) if "." not in key else {key: parsed}
        replaced = tuple(f"{name}." for name in new)
        kept = {key: value for key, value in explicit.items() if not f"{key}.".startswith(replaced)}
        explicit = kept | flat(new)
    return {key: value for key, value in sorted(explicit.items()) if key not in WITHOUT_EFFECT}


def _joined(arguments: list[str]) -> list[str]:
    """Write `--KEY VALUE` as `--KEY=VALUE`, except for `--config`."""
    joined: list[str] = []
    for argument in arguments:
        before = joined[-1] if joined else ""
        if before.startswith("--") and "=" not in before and before not in OPTIONS and not argument.startswith("--"):
            joined[-1] = f"{before}={argument}"
        else:
            joined.append(argument)
    return joined


def merge_files(files: list[Path]) -> dict[str, Any]:
    """Merge YAML files as a run does: a later option replaces an earlier one, also where its value is a mapping.

    Args:
        files: In the order that `with_bases` returns.
    """
    merged: dict[str, Any] = {}
    for file in files:
        for key, value in _read(file).items():
            before = merged.get(key)
            merged[key] = {**before, **value} if isinstance(before, dict) and isinstance(value, dict) else value
    merged.pop("base", None)
    return merged


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings: "section.option.key" -> value."""
    out: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict) and value:
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + str(key)] = value
    return out


def with_bases(name: str, folder: Path = Path(), above: tuple[Path, ...] = ()) -> list[Path]:
    """The file of a configuration, preceded by the files that it builds on.

    Args:
        name: Path or name of a preset.
        folder: Folder that a relative path starts from.
        above: Files that build on this one.

    Raises:
        UsageError: A name that is neither a file nor a preset, or files that build on each other in a circle.
        DataError: A file that is not a YAML mapping, or that has a key twice.
    """
    try:
        file = find_config(name, folder)
    except UsageError as error:
        raise UsageError(f"{above[-1]}: base: {error}" if above else str(error)) from None
    if file.resolve() in above:
        raise UsageError(f"{file} builds on itself: {' -> '.join(str(path) for path in (*above, file))}.")
    bases = _validated_content(file).get("base") or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UsageError(f"{file}: base: expected a file or a list of files. Got value: {bases!r}")
    return [*(path for base in bases for path in with_bases(base, file.parent, (*above, file.resolve()))), file]


def _validated_content(file: Path) -> dict[str, Any]:
    """The options in a YAML file.

    Raises:
        DataError: No YAML mapping in UTF-8, a key that is there twice or has a dot, or too many values.
    """
    try:
        text = file.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if _count_values(node, {}) > MAX_VALUES:
            found = f"more than {MAX_VALUES:,} values once its aliases are followed"
            raise DataError(str(file), found, "a configuration")
        _validate_keys(node, file)
        content = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{file}:{mark.line + 1}" if mark is not None else str(file)
        raise DataError(place, getattr(error, "problem", None) or "no text in UTF-8", "YAML") from error
    if content is not None and not isinstance(content, dict):
        raise DataError(str(file), f"a {type(content).__name__}", "a YAML mapping of options")
    return content or {}


def _count_values(node: yaml.Node | None, known: dict[int, int]) -> int:
    """Number of values in a YAML document with every alias written out: a few lines can stand for billions."""
    if node is None or id(node) in known:
        return 0 if node is None else known[id(node)]
    known[id(node)] = MAX_VALUES  # for an alias within itself
    inner = node.value if isinstance(node, yaml.SequenceNode | yaml.MappingNode) else []
    inner = [part for pair in inner for part in pair] if isinstance(node, yaml.MappingNode) else inner
    known[id(node)] = 1 + sum(_count_values(part, known) for part in inner)
    return known[id(node)]


def _validate_keys(node: yaml.Node | None, file: Path, *, top: bool = True) -> None:
    """Raise on a key that is there twice, of which YAML keeps the last, and on a dot in a key at the top."""
    if isinstance(node, yaml.SequenceNode):
        for part in node.value:
            _validate_keys(part, file, top=False)
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
        _validate_keys(value, file, top=False)


def _read(file: str | Path) -> dict[str, Any]:
    """The options in a YAML file that `with_bases` has validated."""
    return yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}


def _by_option(content: Mapping[str, Any]) -> dict[str, Any]:
    """Flat mapping "section.option" -> value, where a mapping replaces that of an earlier file."""
    sections = {key: value for key, value in content.items() if isinstance(value, dict)}
    options = {f"{section}.{name}": value for section, own in sections.items() for name, value in own.items()}
    return {**options, **{key: value for key, value in content.items() if key not in sections}}


def _mapping_or(value: Any, default: dict[str, Any]) -> dict[str, Any]:
    return value if isinstance(value, dict) else default


def _parse(value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value
