"""Generate the data sets that come with mmbert as scripts: `mmbert data prepare`, and `data.prepare` of a run."""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import FileLock

import mmbert
from mmbert.data.options import DataOptions
from mmbert.errors import DataError, UsageError, did_you_mean

log = logging.getLogger("mmbert")

GENERATORS = {
    "shapes": "images of colored shapes with captions, questions and foils; 110 MB, about 20 s on two cores",
    "easy_vqa": "a tokenizer for easy-VQA, whose images and questions are in the package easy-vqa",
}
"""Name of a data set -> what is generated."""

DATA_FOLDER = Path("data")
"""Parent of the generated data sets, relative to the working directory."""

MANY_FILES = 16
"""A folder with more files is listed in one line."""


def generator_script(name: str) -> Path:
    """Script that generates a data set: in `mmbert/generators` of an installed wheel, `data/` of the repository."""
    package = Path(mmbert.__file__).parent
    installed = package / "generators"
    return (installed if installed.is_dir() else package.parent / "data") / name / "prepare.py"


def generate(name: str, folder: Path, options: Sequence[str] = (), *, quiet: bool = False) -> None:
    """Generate a data set; one that is complete already is kept.

    Args:
        name: In `GENERATORS`.
        folder: Where to write it.
        options: Further arguments of the script, such as "--seed=1".
        quiet: Show nothing of the script's output.

    Raises:
        DataError: The script failed.
    """
    command = [sys.executable, str(generator_script(name)), "--out", str(folder), *options]
    output = subprocess.DEVNULL if quiet else None
    with subprocess.Popen(command, stdout=output, stderr=subprocess.PIPE, text=True) as process:  # noqa: S603
        try:
            errors = process.communicate()[1].strip()
        except BaseException:
            process.terminate()  # it ends its own processes then, which it could not do if it was killed
            raise
    if process.returncode:
        reason = errors.splitlines()[-1] if errors else f"exit code {process.returncode}"
        raise DataError(str(folder), f"data set {name} was not generated: {reason}")


def prepare_missing(options: DataOptions) -> float:
    """Generate the data set that `data.prepare` names if options name files of it that don't exist.

    Of several processes one generates and the others wait.

    Returns:
        Seconds that it took.

    Raises:
        UsageError: `data.prepare` is no name in `GENERATORS`.
        DataError: Files of a generated data set are missing and `data.prepare` doesn't name it, or its script failed.
    """
    if options.prepare is not None and options.prepare not in GENERATORS:
        raise UsageError(
            f"data.prepare='{options.prepare}'; allowed are {', '.join(GENERATORS)}, or null."
            f"{did_you_mean(options.prepare, GENERATORS)}"
        )
    started = time.perf_counter()
    for name in GENERATORS:
        folder = DATA_FOLDER / name
        missing = missing_files(options, folder)
        if missing and options.prepare != name:
            raise DataError(
                missing[0], "no such file or folder", f"the data set {name}: run mmbert data prepare {name}"
            )
        if missing:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / ".lock"):
                if missing_files(options, folder):  # no other process has generated them meanwhile
                    log.info("%s is missing: generating %s (data.prepare=%s)", missing[0], folder, name)
                    generate(name, folder, quiet=True)
    return time.perf_counter() - started


def missing_files(options: DataOptions, folder: Path) -> list[str]:
    """Paths in the options that are in the folder and don't exist."""
    return [
        path
        for path in _paths(options)
        if Path(os.path.abspath(path)).is_relative_to(folder.absolute()) and not os.path.exists(path)
    ]


def _paths(options: DataOptions) -> Iterator[str]:
    """All values of options that can be the path of a file or folder."""
    for name in ("tokenizer", "annotations", "images", "questions", "image_names", "boxes"):
        value = getattr(options, name)
        values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        yield from (path for path in values if isinstance(path, str) and path)


def list_files(folder: Path) -> list[str]:
    """One line for each file below a folder, or for each folder of many files, with its size."""
    lines = []
    for current, folders, names in os.walk(folder):
        folders.sort()
        files = [Path(current, name) for name in sorted(names) if not name.startswith(".")]
        sizes = [file.stat().st_size for file in files]
        if len(files) > MANY_FILES:
            lines.append(f"{current}/  {len(files):,} files, {_format_size(sum(sizes))}")
        else:
            lines += [f"{file}  {_format_size(size)}" for file, size in zip(files, sizes, strict=True)]
    return lines


def _format_size(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"
