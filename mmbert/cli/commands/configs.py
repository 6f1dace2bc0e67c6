"""`mmbert configs`: list the presets, or print one."""

import argparse
from dataclasses import asdict
from pathlib import Path

import yaml

from mmbert.cli.command_line import add_json, print_json
from mmbert.training.config_files import merge_files, with_bases
from mmbert.training.presets import list_presets


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `mmbert configs`."""
    command.description = (
        "Lists the presets, the YAML files that come with mmbert. Use one by its name, as in mmbert fit --config "
        "quickstart, or build on it in a YAML file of your own: base: presets/quickstart."
    )
    command.set_defaults(run=_list)
    add_json(command)
    show = command.add_subparsers(metavar="show").add_parser(
        "show",
        help="print one preset",
        description="Prints a preset as it stands in its file; redirect it to a file to change it.",
    )
    show.set_defaults(run=_show)
    add_json(show)
    show.add_argument("name", metavar="NAME", help="Name of a preset, or a YAML file.")
    show.add_argument(
        "--resolved", action="store_true",
        help="Merge it with the files that it builds on; a comparison is printed with its defaults.",
    )  # fmt: skip


def _list(*, json: bool) -> int:
    presets = list_presets()
    if json:
        print_json({name: first_comment(file) for name, file in presets.items()})
        return 0
    width = max(map(len, presets))
    for name, file in presets.items():
        print(f"{name.ljust(width)}  {first_comment(file)}")
    return 0


def _show(*, name: str, resolved: bool, json: bool) -> int:
    files = with_bases(name)
    if not resolved and not json:
        print(files[-1].read_text(encoding="utf-8"), end="")
        return 0
    content = merge_files(files) if resolved else yaml.safe_load(files[-1].read_text(encoding="utf-8"))
    if resolved and "strategies" in content:  # a comparison merges deeper than a run
        from mmbert.compare.plan import load_comparison

        content = asdict(load_comparison(str(files[-1])))
    if json:
        print_json(content)
        return 0
    print(yaml.safe_dump(content, sort_keys=False), end="")
    return 0


def first_comment(file: Path) -> str:
    """The comment in the first line of a YAML file; empty without one."""
    first, *_ = [*file.read_text(encoding="utf-8").splitlines(), ""]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
