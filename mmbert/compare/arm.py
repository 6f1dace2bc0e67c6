"""Train and evaluate one arm in a separate process: `python -m mmbert.compare.arm ARM.json PARENT_PID`.

Each stage is a run of `fit` that resumes after a kill; a stage with metrics.json is finished.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from filelock import FileLock
from lightning.fabric.utilities import move_data_to_device

from mmbert.compare.cost import milliseconds_per_pair
from mmbert.compare.plan import PRETRAIN, TEXT_SHARE, TOWERS, Shares
from mmbert.compare.rows import QUERIES, Row, json_safe
from mmbert.compare.towers import weights_sha256
from mmbert.data.examples import Example
from mmbert.data.processor import MMBertProcessor
from mmbert.data.readers.base import ImageFolder
from mmbert.data.readers.foils import read_foils
from mmbert.errors import UsageError
from mmbert.evaluation.encoding import LoadImage, encode
from mmbert.evaluation.foils import OVERALL, foil_hits
from mmbert.evaluation.model_cache import reading_cache
from mmbert.evaluation.retrieval import REQUIRED_OBJECTIVES, Candidates, choose_scorer, rank_candidates
from mmbert.inference.cached_images import image_loader
from mmbert.inference.evaluate.shares import choose_pairs, compute_pair_shares
from mmbert.inference.loaded import LoadedModel
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
from mmbert.training.encoder_caching import open_run_cache
from mmbert.training.run import TrainingRun
from mmbert.training.run_options import parse_run, to_arguments

CURVE_METRICS = ("itm_accuracy", "mlm_accuracy", "itm_loss", "mlm_loss", "to_image/R@1", "to_text/R@1", *(
    f"{task}_{name}" for task in TASKS for name in ("accuracy", "auroc", "loss")))  # fmt: skip
"""Ends of the names of validation metrics whose learning curves a row stores."""
SPLIT_FACTS = ("images_without_text", "left_out", "retrieval_images", "ceiling")
"""Ends of the names of metrics that describe the test split, not the model."""
ABLATIONS = ("blank", "shuffled", "no_text")
"""Ends of the names of metrics with an ablated input."""


class Evaluation(NamedTuple):
    """Results of an evaluation, their per-item outcomes, and its cost."""

    results: dict[str, float]
    items: dict[str, ItemOutcomes]
    cost: dict[str, float]


def run_arm(spec: Mapping[str, Any], seconds: Callable[[], float]) -> None:
    """Train all stages, evaluate the pretrained model, and write row.json and the file of per-item outcomes.

    Args:
        spec: Content of arm.json, see `mmbert.compare.specs.arm_spec`.
        seconds: Returns the time that the arm has taken.
    """
    folder = Path(spec["folder"])
    for module in spec["allow_import"]:
        allow_import_from_cwd(module)
    for name, stage in spec["stages"].items():
        if not (folder / name / "metrics.json").is_file():
            place = {"name": name, "trainer.default_root_dir": str(folder), "resume": "auto"}
            options = {**stage["options"], "threads": spec["threads"], **place}
            with StopSignals() as stop:
                parsed = parse_run(to_arguments(stage["config"], options))
                TrainingRun(parsed, stop=stop, cache_root=_shared(folder)).fit()
    torch.set_num_threads(spec["threads"])
    evaluations = [read_stage_results(folder / name, name) for name in spec["stages"]]
    model, processor = load_folder(folder / PRETRAIN / "model")
    assert isinstance(model, MMBertForPreTraining)
    data = ArmData(spec)
    model.to(data.device)  # pyright: ignore[reportArgumentType]
    with data.run.computation.context():  # as in validation
        if spec["retrieval"]["images"]:
            evaluations.append(evaluate_retrieval(model, processor, data, spec["retrieval"], folder / QUERIES))
        if spec["foils"]["files"]:
            evaluations.append(evaluate_foils(model, processor, data, spec["foils"]))
        if spec.get("shares", {}).get("pairs"):
            evaluations.append(evaluate_shares(LoadedModel(model, processor), data, spec["shares"]))
    results = {name: value for found in evaluations for name, value in found.results.items()}
    items = {name: outcomes for found in evaluations for name, outcomes in found.items.items()}
    cost = {name: value for found in evaluations for name, value in found.cost.items()}
    cost["ms_per_pair"] = milliseconds_per_pair(model, data.batch())
    metrics = {
        name: json.loads((folder / name / "metrics.json").read_text(encoding="utf-8")) for name in spec["stages"]
    }
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
        "curves": {k: v for name in spec["stages"] for k, v in read_curves(folder / name, name).items()},
        "options": {name: read_options(folder / name, from_towers=TOWERS in spec) for name in spec["stages"]},
        "scorers": {n: m["run/test_scorer"] for n, m in metrics.items() if "run/test_scorer" in m},
        "versions": {k.removeprefix("run/version/"): v for k, v in run_folder.versions().items()},
        "precision": metrics[PRETRAIN]["run/precision"],
    }
    if spec["strategy"] == TOWERS:
        row["cost"]["samples"] = metrics[PRETRAIN]["run/samples_seen"]
    if TOWERS in spec:
        row[TOWERS] = {"arm": spec[TOWERS], "sha256": weights_sha256(folder.parent / spec[TOWERS])}
    target = Path(spec["items"])
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(f".{os.getpid()}.tmp")
    write_outcomes(temporary, items)
    os.replace(temporary, target)
    atomic_write_text(folder / "row.json", json.dumps(json_safe(row), sort_keys=True, allow_nan=False))


def _shared(folder: Path) -> Path:
    """Return the folder of the comparison that an arm's folder is in: all arms have their encoder cache there."""
    return folder.parents[1]


def read_curves(folder: Path, stage: str) -> dict[str, list[tuple[int, float]]]:
    """Read the learning curves of a stage: validation metric -> (step, value); a task's are prefixed by its stage."""
    curves = run_folder.read_curves(folder)
    found = {k: v for k, v in curves.items() if k.startswith("val/") and k.endswith(CURVE_METRICS)}
    return found if stage == PRETRAIN else {f"{stage}/{name}": curve for name, curve in found.items()}


def read_options(folder: Path, *, from_towers: bool = False) -> dict[str, Any]:
    """Read every option of a stage's run, flat, without its folders.

    Args:
        folder: The run's folder.
        from_towers: The pretraining starts from a model of the comparison too.
    """
    options = flat(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
    folders = ["name", "trainer.default_root_dir"]
    if options["model.task"] is not None or from_towers:
        folders.append("model.pretrained")
    return {key: value for key, value in options.items() if key not in folders}


def read_stage_results(folder: Path, stage: str) -> Evaluation:
    """Read the results of a stage's run on its test splits.

    They are named STAGE/RESULT for the split "test" and STAGE/PART/RESULT for a split "test_PART".
    """
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    results: dict[str, float] = {}
    items: dict[str, ItemOutcomes] = {}
    for key, value in metrics.items():
        split, _, name = key.partition("/")
        if split.startswith("test") and isinstance(value, int | float) and not name.endswith(SPLIT_FACTS):
            results[_result_name(stage, split, name)] = float(value)
    for file in sorted(folder.glob("items_test*.npz")):
        split = file.stem.removeprefix("items_")
        items |= {_result_name(stage, split, name): found for name, found in read_outcomes(file).items()}
    return Evaluation(results, items, {})


def _result_name(stage: str, split: str, name: str) -> str:
    """Name of a result: pretrain/itm_accuracy, pretrain/unseen/itm_accuracy, vqa/accuracy, vqa/accuracy/blank, ..."""
    task, _, rest = name.partition("_")
    name = rest if task in TASKS else name
    for ablation in ABLATIONS:
        name = name.replace(f"_{ablation}", f"/{ablation}")
    name = name.replace("yes/no", "yes-no").replace("retrieval_chance", "chance")
    part = split.removeprefix("test").strip("_")
    return "/".join(filter(None, (stage, part, name)))


class ArmData:
    """Pretraining data of an arm, read with the options of its run."""

    def __init__(self, spec: Mapping[str, Any]):
        stage = spec["stages"][PRETRAIN]
        options = parse_run(to_arguments(stage["config"], {**stage["options"], "threads": spec["threads"]}))
        self.run = TrainingRun(options, dry=True)
        self.parts, self.device = self.run.parts, self.run.trainer.strategy.root_device
        self.cache_root = _shared(Path(spec["folder"]))

    def candidates(self, split: str, images: int, captions: int) -> Candidates:
        """Images of a split, from its start, with their first captions."""
        examples = self.examples(split, "retrieval.split")
        return Candidates.from_examples([replace(e, captions=e.captions[:captions]) for e in examples[:images]])

    def examples(self, split: str, option: str) -> Sequence[Example]:
        """Examples of a split that `option` names."""
        examples = self.parts.data.examples.get(split)
        if not examples:
            raise UsageError(f"{option}='{split}'; the data has {', '.join(self.parts.data.examples)}.")
        return examples

    @contextmanager
    def loader(self, model: MMBertForPreTraining, images: Iterable[Any]) -> Iterator[LoadImage]:
        """Make a function that loads images for a trained model, from the arms' encoder cache if they have one."""
        options, encoder = self.run.options.sections.optim, model.mmbert.image_encoder
        with reading_cache(encoder, options.freeze_image):
            requests = [(Path(file), None) for file in dict.fromkeys(images)]
            cache = open_run_cache(
                model.mmbert, self.parts.data, requests, root=self.cache_root, computation=self.run.computation
            )
            yield image_loader(cache, self.parts.processor)

    def batch(self) -> dict[str, Any]:
        """First batch of the first test split, or of the training pairs."""
        loaders = self.parts.data.test_dataloader() or [self.parts.data.train_dataloader()]
        return self.parts.data.on_after_batch_transfer(move_data_to_device(next(iter(loaders[0])), self.device), 0)


def evaluate_retrieval(
    model: MMBertForPreTraining, processor: MMBertProcessor, data: ArmData, options: Mapping[str, Any], queries: Path
) -> Evaluation:
    """Evaluate retrieval on a split, and write image and caption of each query to the file `queries`."""
    candidates = data.candidates(options["split"], options["images"], options["captions"])
    images = [str(candidates.images[i]) for i in candidates.image_of_text]
    atomic_write_text(queries, json.dumps([*zip(images, candidates.texts, strict=True)]) + "\n")
    scorer = choose_scorer(model, options["scorer"])
    started = time.perf_counter()
    keep = "itm" in REQUIRED_OBJECTIVES[scorer]
    with data.loader(model, candidates.images) as load:
        encoded = encode(model, processor, candidates.images, candidates.texts, keep_tokens=keep, load=load)
    report, items = rank_candidates(
        model,
        encoded,
        candidates,
        scorer,
        k=options["k"],
        equal_texts=options["equal_texts"],
        itc_weight=options.get("itc_weight", 0.0),
    )
    cost = {
        "search_seconds": time.perf_counter() - started,
        "search_images": float(report["num_images"]),
        "search_texts": float(report["num_texts"]),
        "search_fusion_passes": float(report["fusion_passes"]),
    }
    directions = ("image_to_text", "text_to_image")
    results = {f"retrieval/{name}": report[name] for name in report if name.startswith(directions) or name == "rsum"}
    return Evaluation(results, {f"retrieval/{name}": found for name, found in items.items()}, cost)


def evaluate_foils(
    model: MMBertForPreTraining, processor: MMBertProcessor, data: ArmData, options: Mapping[str, Any]
) -> Evaluation:
    """Evaluate true captions against foils, overall and by category, with image ablations."""
    foils = read_foils([Path(file) for file in options["files"]], ImageFolder(options["images"]))
    with data.loader(model, (foil.image for foil in foils)) as load:
        hits = foil_hits(model, processor, foils, load=load)
    number = {image: i for i, image in enumerate(dict.fromkeys(foil.image for foil in foils))}
    items: dict[str, ItemOutcomes] = {}

    def add_outcomes(name: str, kind: str, chosen: list[int]) -> None:
        rows = [row for row in chosen if hits[kind][row] is not None]
        if rows:
            items[name] = ItemOutcomes(
                [float(bool(hits[kind][r])) for r in rows], [number[foils[r].image] for r in rows]
            )

    all_rows = [*range(len(foils))]
    add_outcomes(f"foils/{OVERALL}", "accuracy", all_rows)
    for kind in ("blank", "shuffled"):
        add_outcomes(f"foils/{OVERALL}/{kind}", kind, all_rows)
    for category in dict.fromkeys(foil.category for foil in foils):
        own = [row for row in all_rows if foils[row].category == category]
        add_outcomes(f"foils/{category}", "accuracy", own)
        add_outcomes(f"foils/{category}/blank", "blank", own)
    return Evaluation({name: sum(i.values) / len(i.values) for name, i in items.items()}, items, {})


def evaluate_shares(model: LoadedModel, data: ArmData, options: Mapping[str, Any]) -> Evaluation:
    """Compute the share of the text in each of the chosen pairs; that of the image is 1 minus it."""
    chosen = Shares(**options)
    examples = data.examples(chosen.split, "shares.split")
    pairs = choose_pairs([(example.image, example.captions) for example in examples], chosen.pairs, seed=0)
    found = compute_pair_shares(model, pairs, target=chosen.target, samples=chosen.samples)
    items = ItemOutcomes([shares.text for shares in found], [*range(len(pairs))])
    return Evaluation({TEXT_SHARE: sum(items.values) / len(items.values)}, {TEXT_SHARE: items}, {})


class ArmTimer:
    """Total time of an arm over all of its processes, stored in a file."""

    def __init__(self, file: Path):
        self._file, self._started = file, time.monotonic()
        self._before = float(file.read_text(encoding="utf-8")) if file.is_file() else 0.0
        threading.Thread(target=self._save_repeatedly, daemon=True).start()

    def seconds(self) -> float:
        """Seconds of all processes so far; up to half a second of a killed one is lost."""
        return self._before + time.monotonic() - self._started

    def _save_repeatedly(self) -> None:
        while True:
            time.sleep(0.5)
            atomic_write_text(self._file, str(self.seconds()))


def exit_with_parent(parent: int) -> None:
    """Start a thread that sends SIGTERM to this process once its parent process has ended.

    Args:
        parent: Process id of the parent, which may have ended already.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)  # a run saves a checkpoint first

    threading.Thread(target=watch, daemon=True).start()


def main(file: str, parent: int) -> None:
    """Run an arm; a second process for the same arm waits for the first.

    Args:
        file: arm.json.
        parent: Process id of the comparison; the arm stops if that process ends.
    """
    exit_with_parent(parent)
    spec = json.loads(Path(file).read_text(encoding="utf-8"))
    folder = Path(spec["folder"])
    set_up_logging()
    with report_user_errors(), FileLock(folder / "lock"):
        timer = ArmTimer(folder / "seconds.txt")
        if not (folder / "row.json").is_file():
            with StopSignals():
                run_arm(spec, timer.seconds)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
