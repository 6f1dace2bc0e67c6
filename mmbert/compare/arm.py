"""One arm from start to row, in a process of its own: `python -m mmbert.compare.arm ARM.json`.

Every stage is an ordinary `fit` that goes on where it was killed. A stage that has its metrics.json is done.
"""

import fcntl
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric.utilities import move_data_to_device

from mmbert.compare.cost import milliseconds_per_pair
from mmbert.compare.plan import PRETRAIN
from mmbert.compare.rows import QUERIES, Row, finite
from mmbert.data.processor import MMBertProcessor
from mmbert.data.readers.base import ImageFolder
from mmbert.data.readers.foils import Foil, read_foils
from mmbert.errors import UsageError
from mmbert.evaluation.encoding import encode
from mmbert.evaluation.foils import OVERALL, foil_hits
from mmbert.evaluation.retrieval import REQUIRED_OBJECTIVES, Candidates, choose_scorer, rank_candidates
from mmbert.inference.loading import load_folder
from mmbert.metrics.outcomes import ItemOutcomes, read_outcomes, write_outcomes
from mmbert.model.modeling import MMBertForPreTraining
from mmbert.model.tasks import TASKS
from mmbert.runtime.files import atomic_write_text
from mmbert.runtime.import_policy import allow_import_from_cwd
from mmbert.runtime.signals import StopSignals
from mmbert.runtime.terminal import report_user_errors, set_up_logging
from mmbert.training import run_folder
from mmbert.training.config_files import flat
from mmbert.training.fit import TrainingRun
from mmbert.training.run_options import parse_run, to_arguments

Results = dict[str, float]
Found = tuple[Results, dict[str, ItemOutcomes], dict[str, float]]
"""Results, their items, and costs."""


def run_arm(spec: Mapping[str, Any], seconds: Callable[[], float]) -> None:
    """Trains and judges what `spec` says, and writes row.json and the items.

    Args:
        spec: arm, strategy, seed, fraction; folder, items; stages (name -> config, options); retrieval, foils;
            budget; threads; config (what makes the arm).
        seconds: Tells how long the arm has taken.
    """
    folder = Path(spec["folder"])
    for module in spec["allow_import"]:
        allow_import_from_cwd(module)
    for name, stage in spec["stages"].items():
        if not (folder / name / "metrics.json").is_file():
            place = {"name": name, "trainer.default_root_dir": str(folder), "resume": "auto"}
            options = {**stage["options"], "threads": spec["threads"], **place}
            with StopSignals() as stop:
                TrainingRun(parse_run(to_arguments(stage["config"], options)), stop=stop).fit()
    torch.set_num_threads(spec["threads"])
    results: Results = {}
    items: dict[str, ItemOutcomes] = {}
    cost: dict[str, float] = {}
    for name in spec["stages"]:
        found, own = of_run(folder / name, name)
        results |= found
        items |= own
    model, processor = load_folder(folder / PRETRAIN / "model")
    assert isinstance(model, MMBertForPreTraining)
    data = _Data(spec)
    model.to(data.device)  # pyright: ignore[reportArgumentType]
    steps: list[Callable[[], Found]] = []
    if spec["retrieval"]["images"]:
        steps.append(lambda: ranked(model, processor, data, spec["retrieval"], folder / QUERIES))
    if spec["foils"]["files"]:
        steps.append(lambda: evaluate_foils(model, processor, spec["foils"]))
    for step in steps:
        more, own, spent = step()
        results |= more
        items |= own
        cost |= spent
    cost["ms_per_pair"] = milliseconds_per_pair(model, data.batch())
    metrics = {name: json.loads((folder / name / "metrics.json").read_text()) for name in spec["stages"]}
    row: Row = {
        **{key: spec[key] for key in ("arm", "strategy", "seed", "fraction", "exploratory", "budget", "config")},
        "status": "done",
        "results": dict(sorted(results.items())),
        "cost": {
            **cost,
            "wall_seconds": seconds(),
            "train_seconds": sum(m["run/training_seconds"] for m in metrics.values()),
            "samples_per_second": metrics[PRETRAIN].get("run/samples_per_second"),
            "peak_memory_bytes": max(m["run/peak_memory_bytes"] for m in metrics.values()),
            "threads": spec["threads"],
            "machine": run_folder.machine(),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
        },
        "curves": {k: v for name in spec["stages"] for k, v in curves_of(folder / name, name).items()},
        "options": {name: options_of(folder / name) for name in spec["stages"]},
        "scorers": {n: m["run/test_scorer"] for n, m in metrics.items() if "run/test_scorer" in m},
        "versions": {k.removeprefix("run/version/"): v for k, v in run_folder.versions().items()},
        "precision": metrics[PRETRAIN]["run/precision"],
    }
    target = Path(spec["items"])
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(f".{os.getpid()}.tmp")
    write_outcomes(temporary, items)
    os.replace(temporary, target)
    atomic_write_text(folder / "row.json", json.dumps(finite(row), sort_keys=True, allow_nan=False))


SHOWN = ("itm_accuracy", "mlm_accuracy", "itm_loss", "mlm_loss", "to_image/R@1", "to_text/R@1", *(
    f"{task}_{name}" for task in TASKS for name in ("accuracy", "auroc", "loss")))  # fmt: skip
"""Ends of the names of validation results whose learning curves a row keeps."""


def curves_of(folder: Path, stage: str) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of what validation gave in a stage; a task's are named by its stage."""
    found = {k: v for k, v in run_folder.read_curves(folder).items() if k.startswith("val/") and k.endswith(SHOWN)}
    return found if stage == PRETRAIN else {f"{stage}/{name}": curve for name, curve in found.items()}


def options_of(folder: Path) -> dict[str, Any]:
    """Every option of a stage's run by its dotted name, without those that say where it ran."""
    options = flat(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
    places = ["name", "trainer.default_root_dir"]
    if options["model.task"] is not None:
        places.append("model.pretrained")
    return {key: value for key, value in options.items() if key not in places}


COUNTS = ("images_without_text", "left_out", "retrieval_images", "ceiling")
"""Results that tell of the test split, not of a model."""
KINDS = ("blank", "shuffled", "no_text")


def of_run(folder: Path, stage: str) -> tuple[Results, dict[str, ItemOutcomes]]:
    """What a stage's run measured on its test splits, named `STAGE/result`, `STAGE/SPLIT/result` beyond "test"."""
    metrics = json.loads((folder / "metrics.json").read_text())
    results: Results = {}
    items: dict[str, ItemOutcomes] = {}
    for key, value in metrics.items():
        split, _, name = key.partition("/")
        if split.startswith("test") and isinstance(value, int | float) and not name.endswith(COUNTS):
            results[_named(stage, split, name)] = float(value)
    for file in sorted(folder.glob("items_test*.npz")):
        split = file.stem.removeprefix("items_")
        items |= {_named(stage, split, name): found for name, found in read_outcomes(file).items()}
    return results, items


def _named(stage: str, split: str, name: str) -> str:
    """pretrain/itm_accuracy, pretrain/unseen/itm_accuracy, vqa/accuracy, vqa/accuracy/blank, ..."""
    task, _, rest = name.partition("_")
    name = rest if task in TASKS else name
    for kind in KINDS:
        name = name.replace(f"_{kind}", f"/{kind}")
    name = name.replace("yes/no", "yes-no").replace("retrieval_chance", "chance")
    part = split.removeprefix("test").strip("_")
    return "/".join(filter(None, (stage, part, name)))


class _Data:
    """The pretraining data of an arm, read again as its run read it."""

    def __init__(self, spec: Mapping[str, Any]):
        stage = spec["stages"][PRETRAIN]
        options = parse_run(to_arguments(stage["config"], {**stage["options"], "threads": spec["threads"]}))
        run = TrainingRun(options, dry=True)
        self.parts, self.device = run.parts, run.trainer.strategy.root_device

    def candidates(self, split: str, images: int, captions: int) -> Candidates:
        examples = self.parts.data.examples.get(split)
        if not examples:
            raise UsageError(f"retrieval.split='{split}'; the data has {', '.join(self.parts.data.examples)}.")
        return Candidates.from_examples([replace(e, captions=e.captions[:captions]) for e in examples[:images]])

    def batch(self) -> dict[str, Any]:
        """One batch of the first test split, or of the training pairs."""
        loaders = self.parts.data.test_dataloader() or [self.parts.data.train_dataloader()]
        return self.parts.data.on_after_batch_transfer(move_data_to_device(next(iter(loaders[0])), self.device), 0)


def ranked(
    model: MMBertForPreTraining, processor: MMBertProcessor, data: _Data, options: Mapping[str, Any], queries: Path
) -> Found:
    """Ranks images and captions of a split, and writes image and caption of each item to the file `queries`."""
    candidates = data.candidates(options["split"], options["images"], options["captions"])
    images = [str(candidates.images[i]) for i in candidates.image_of_text]
    atomic_write_text(queries, json.dumps([*zip(images, candidates.texts, strict=True)]) + "\n")
    scorer = choose_scorer(model, options["scorer"])
    started = time.perf_counter()
    keep = "itm" in REQUIRED_OBJECTIVES[scorer]
    encoded = encode(model, processor, candidates.images, candidates.texts, keep_tokens=keep)
    report, items = rank_candidates(
        model, encoded, candidates, scorer, k=options["k"], equal_texts=options["equal_texts"]
    )
    cost = {
        "search_seconds": time.perf_counter() - started,
        "search_images": float(report["num_images"]),
        "search_texts": float(report["num_texts"]),
        "search_fusion_passes": float(report["fusion_passes"]),
    }
    ways = ("image_to_text", "text_to_image")
    results = {f"retrieval/{name}": report[name] for name in report if name.startswith(ways) or name == "rsum"}
    return results, {f"retrieval/{name}": found for name, found in items.items()}, cost


def evaluate_foils(model: MMBertForPreTraining, processor: MMBertProcessor, options: Mapping[str, Any]) -> Found:
    """True captions against foils: overall and by category; with a blank image and another one, overall."""
    foils = foils_of(options)
    hits = foil_hits(model, processor, foils)
    number = {image: i for i, image in enumerate(dict.fromkeys(foil.image for foil in foils))}
    items: dict[str, ItemOutcomes] = {}

    def add(name: str, kind: str, chosen: list[int]) -> None:
        rows = [row for row in chosen if hits[kind][row] is not None]
        if rows:
            items[name] = ItemOutcomes(
                [float(bool(hits[kind][r])) for r in rows], [number[foils[r].image] for r in rows]
            )

    everything = [*range(len(foils))]
    add(f"foils/{OVERALL}", "accuracy", everything)
    for kind in ("blank", "shuffled"):
        add(f"foils/{OVERALL}/{kind}", kind, everything)
    for category in dict.fromkeys(foil.category for foil in foils):
        own = [row for row in everything if foils[row].category == category]
        add(f"foils/{category}", "accuracy", own)
        add(f"foils/{category}/blank", "blank", own)
    return {name: sum(i.values) / len(i.values) for name, i in items.items()}, items, {}


def foils_of(options: Mapping[str, Any]) -> list[Foil]:
    """The foils of a comparison, in the order of their items."""
    return read_foils([Path(file) for file in options["files"]], ImageFolder(options["images"]))


class Watch:
    """Adds up the seconds of an arm over its processes."""

    def __init__(self, file: Path):
        self._file, self._started = file, time.monotonic()
        self._before = float(file.read_text()) if file.is_file() else 0.0
        threading.Thread(target=self._run, daemon=True).start()

    def seconds(self) -> float:
        """Of all processes so far; of one that was killed up to half a second is lost."""
        return self._before + time.monotonic() - self._started

    def _run(self) -> None:
        while True:
            time.sleep(0.5)
            atomic_write_text(self._file, str(self.seconds()))


def end_with(parent: int) -> None:
    """Ends this process when the one that started it is gone, be it before this call."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)  # a run saves a checkpoint first

    threading.Thread(target=watch, daemon=True).start()


def start(file: str, parent: int) -> None:
    """Runs the arm that a file describes; a second process for the same arm waits for the first.

    Args:
        file: What `mmbert.compare.specs.arm_spec` says of the arm.
        parent: Number of the process that wants it done.
    """
    end_with(parent)
    spec = json.loads(Path(file).read_text())
    folder = Path(spec["folder"])
    set_up_logging()
    with (folder / "lock").open("w") as lock, report_user_errors():
        fcntl.flock(lock, fcntl.LOCK_EX)
        watch = Watch(folder / "seconds.txt")
        if not (folder / "row.json").is_file():
            with StopSignals():
                run_arm(spec, watch.seconds)


if __name__ == "__main__":
    start(sys.argv[1], int(sys.argv[2]))
