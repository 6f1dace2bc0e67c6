"""A run's folder and what lies in it at the end: metrics.json, curves.png, the table, the model to share."""

import csv
import json
import logging
import math
import os
import platform
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import timm
import torch
import transformers
from rich.console import Console
from rich.table import Table

import mmbert
from mmbert.errors import UsageError
from mmbert.runtime.memory import peak_rss

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger("mmbert")
_IMPORTED = time.time()


def new_run_folder(root: str | Path, name: str, *, create: bool = True) -> Path:
    """`root/name`, or `root/name-2`, `root/name-3` ... where that is taken.

    Args:
        root: Folder of all runs.
        name: Name of the run.
        create: Create the folder; only the first process does.

    Raises:
        UsageError: The folder can't be created, or would not lie below `root`.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts or not Path(name).parts or "\0" in name:
        raise UsageError(f"name={name!r}: the name of a folder below trainer.default_root_dir, such as run.")
    folder, number = Path(root) / name, 1
    if not create:
        return folder
    make_folder(folder.parent)
    while True:
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1
            folder = Path(root) / f"{name}-{number}"
        except OSError as error:
            raise UsageError(_no_folder(folder, error.strerror or str(error))) from error


def make_folder(folder: Path) -> None:
    """Create a folder and those above it, unless they exist.

    Raises:
        UsageError: A file or a dangling link has its name, or permission is missing.
    """
    for part in (*reversed(folder.parents), folder):
        if part.is_symlink() and not part.exists():
            raise UsageError(_no_folder(folder, f"{part} is a link to {os.readlink(part)}, which does not exist"))
        if part.exists() and not part.is_dir():
            raise UsageError(_no_folder(folder, f"{part} is a file"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(_no_folder(folder, error.strerror or str(error))) from error


def _no_folder(folder: Path, reason: str) -> str:
    return f"the folder {folder} can't be created: {reason}; choose another one with --trainer.default_root_dir."


def process_start() -> float:
    """Start time of this process, in seconds since 1970; on systems without /proc that of importing mmbert."""
    try:
        ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[19])
        boot = next(
            int(line.split()[1]) for line in Path("/proc/stat").open(encoding="utf-8") if line.startswith("btime")
        )
        return boot + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, StopIteration):
        return _IMPORTED


def peak_memory_bytes() -> int:
    """Peak memory so far: of the GPU where there is one, else of this process and its finished workers."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_rss(children=True)


def versions() -> dict[str, str]:
    """Versions of what produced a result, under `run/version/...`."""
    modules = {
        "mmbert": mmbert,
        "torch": torch,
        "transformers": transformers,
        "timm": timm,
        "lightning": lightning,
    }
    found = {f"run/version/{name}": str(module.__version__) for name, module in modules.items()}
    return {"run/version/python": platform.python_version(), **found}


def machine() -> str:
    """CPU, how many of its cores this process may use, and GPU: what times depend on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = names[0] if names else platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{cpu} ({cores} cores){gpu}"


def write_metrics(folder: Path, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Write the flat `metrics.json` and return its content; a value that is not finite becomes null."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in sorted(metrics.items())}
    (folder / "metrics.json").write_text(json.dumps(clean, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return clean


def write_predictions(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write predictions of a split, one row an example, in the format of VQA's evaluation server."""
    numbers = [row["question_id"] for row in rows]
    assert len(set(numbers)) == len(numbers), "an example was predicted twice"
    file.write_text(json.dumps(rows, indent=0) + "\n", encoding="utf-8")


def read_curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(optimizer step, value) of everything in the run's metrics.csv."""
    curves: dict[str, list[tuple[int, float]]] = {}
    file = folder / "metrics.csv"
    if not file.is_file():
        return curves
    with file.open(newline="", encoding="utf-8") as rows:
        for row in csv.DictReader(rows):
            step = int(float(row["step"]))
            for name, value in row.items():
                if name not in ("step", "epoch") and value:
                    curves.setdefault(name, []).append((step, float(value)))
    return curves


def curves_figure(folder: Path) -> "Figure | None":
    """Losses and validation metrics of a run over its steps; None if nothing was logged."""
    from matplotlib.figure import Figure  # no pyplot: it is one state for the whole process, and for one thread

    curves = read_curves(folder)
    panels = {
        "training loss": [n for n in curves if n.startswith("train/") and n.endswith("loss")],
        "validation loss": [n for n in curves if n.startswith("val/") and n.endswith("loss")],
        "matching (chance 0.5)": [n for n in curves if n in ("val/itm_accuracy", "val/itm_auroc")],
        "masked words": [n for n in curves if n.startswith("val/mlm_") and "loss" not in n],
        "task": [n for n in curves if re.fullmatch(r"val/(?!mlm|itm)\w+_accuracy(_blank|_shuffled)?", n)],
        "retrieval": [n for n in curves if n.startswith("val/") and n.rsplit("/", 1)[-1] in ("R@1", "R@5", "R@10")],
    }
    panels = {title: names for title, names in panels.items() if names}
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, names) in zip(axes.flat, panels.items(), strict=False):
        for name in sorted(names, key=_natural_order):
            steps, values = zip(*curves[name], strict=True)
            label = name.split("/", 1)[1].replace("image_to_text/", "I→T ").replace("text_to_image/", "T→I ")
            axis.plot(steps, values, label=label, marker="." if len(steps) < 40 else None, linewidth=1.4)
        axis.set(title=title, xlabel="optimizer steps")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, frameon=False)
    return figure


def plot_curves(folder: Path) -> Path | None:
    """Draw `curves_figure` to curves.png; None if nothing was logged."""
    figure = curves_figure(folder)
    if figure is None:
        return None
    file = folder / "curves.png"
    figure.savefig(file, dpi=120)
    return file


def _natural_order(name: str) -> list[Any]:
    """Sort key in which R@5 stands before R@10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


WANTED_FIRST = (
    re.compile(r"(?!mlm|itm|itc)\w+_(accuracy|auroc|consistency)$"),  # of a task
    re.compile(r"(text_to_image|image_to_text)/R@\d+$"),
    re.compile(r"rsum$"),
    re.compile(r"itm_(accuracy|auroc)$"),
    re.compile(r"mlm_(accuracy|image_gain)$"),
)
"""Metrics in the order in which people look for them; the others follow by name."""


def metric_rows(metrics: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The table of metrics: the splits, and one row of texts a metric, the most wanted first."""
    splits = sorted({name.split("/")[0] for name in metrics} - {"run", "train"}, key=lambda s: (s != "val", s))
    names = dict.fromkeys(name.split("/", 1)[1] for name in metrics if name.split("/")[0] in splits)

    def order(name: str) -> tuple[int, list[Any]]:
        place = next((i for i, pattern in enumerate(WANTED_FIRST) if pattern.match(name)), len(WANTED_FIRST))
        return place, _natural_order(name)

    rows = []
    for name in sorted(names, key=order):
        values = [metrics.get(f"{split}/{name}") for split in splits]
        rows.append([name, *[v if isinstance(v, str) else "" if v is None else f"{v:.4g}" for v in values]])
    return splits, rows


def print_results(metrics: Mapping[str, Any], *, folder: Path) -> None:
    """Print the table of metrics: one row a metric, one column a split."""
    splits, rows = metric_rows(metrics)
    if not rows:
        print(f"results in {folder}")
        return
    table = Table(title=f"results in {folder}", title_justify="left", caption_justify="left")
    if any(name.endswith("/R@1") for name in metrics):
        table.caption = "R@K: 1 caption per image"
    table.add_column("metric")
    for split in splits:
        table.add_column(split, justify="right")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 110).print(table)
