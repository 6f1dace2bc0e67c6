"""Presets: the YAML files of `configs/`, which are installed with mmbert and found by name."""

from pathlib import Path

import mmbert
from mmbert.errors import UsageError, did_you_mean

SUFFIXES = (".yaml", ".yml")
PREFIX = "presets/"


def presets_folder() -> Path:
    """Folder of the presets: `mmbert/presets` of an installed wheel, `configs/` of the repository."""
    package = Path(mmbert.__file__).parent
    installed = package / "presets"
    return installed if installed.is_dir() else package.parent / "configs"


def list_presets() -> dict[str, Path]:
    """Name of each preset -> its file, sorted by folder; a name has no suffix, such as "pretrain/ucm"."""
    folder = presets_folder()
    files = {file.relative_to(folder).with_suffix("").as_posix(): file for file in folder.rglob("*.yaml")}
    return dict(sorted(files.items(), key=lambda item: (item[0].count("/"), item[0])))


def find_config(name: str, folder: Path = Path()) -> Path:
    """Find a YAML file: an existing file of that path, otherwise the preset of that name.

    Args:
        name: Path of a file, or the name of a preset: "quickstart", "presets/quickstart".
        folder: Folder that a relative path starts from.

    Raises:
        UsageError: Neither exists; the message names the closest presets.
    """
    file = folder / name
    if file.is_file():
        return file
    presets = list_presets()
    preset = presets.get(name.removeprefix(PREFIX))
    if preset is None:
        raise UsageError(
            f"'{name}' is neither a file nor the name of a preset.{_closest(name, presets)} "
            "mmbert configs lists the presets."
        )
    return preset


def _closest(name: str, presets: dict[str, Path]) -> str:
    """The presets that a path or a misspelt name could mean: those with its last part, else the most similar one."""
    stem = name.removeprefix(PREFIX).removeprefix("configs/")
    for suffix in SUFFIXES:
        stem = stem.removesuffix(suffix)
    same_last_part = [preset for preset in presets if preset.rsplit("/", 1)[-1] == stem.rsplit("/", 1)[-1]]
    if same_last_part and stem not in presets:
        return f" Did you mean {' or '.join(map(repr, same_last_part))}?"
    return did_you_mean(stem, presets)
