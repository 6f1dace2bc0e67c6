"""Encoder cache in every kind of run: processes, arms of a comparison, fine-tuning, unreadable images, kills."""

import json
import multiprocessing
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from interrupted import fit, results, trace, weights
from PIL import Image
from processes import CONFIG, EXACT, ROOT, fit_in_two
from tiers import FULL, tier

from mmbert.cli.main import main
from mmbert.compare.arm import run_arm
from mmbert.compare.plan import PRETRAIN, list_arms, load_comparison
from mmbert.compare.specs import Settings, arm_spec
from mmbert.data import encoder_cache
from mmbert.data.row_store import META
from mmbert.model.encoders import ImageEncoder

# With 64 px an image has 17 tokens; of 5, torch computes attention with bits that depend on the place in the batch.
FROZEN = ["--data.crop=1", "--data.flip=false", "--model.image_size=64", "--optim.freeze_image=all"]
LOSS = 3
"""Column of trace.csv."""


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], int]:
    """Returns the number of images that the encoder has encoded since the last call, in this process and its forks."""
    file = tmp_path / "encoded"
    original = ImageEncoder.forward

    def counting(self: ImageEncoder, pixel_values: Any, **options: Any) -> Any:
        with file.open("a") as log:
            log.write(f"{len(pixel_values)}\n")
        return original(self, pixel_values, **options)

    def take() -> int:
        count = sum(map(int, file.read_text().split())) if file.is_file() else 0
        file.unlink(missing_ok=True)
        return count

    monkeypatch.setattr(ImageEncoder, "forward", counting)
    return take


def stores(root: Path) -> list[Path]:
    return sorted(file.parent for file in root.rglob(META))


def test_two_processes_fill_one_cache_and_train_as_one_process_without(
    tiny: list[str], tmp_path: Path, encoded: Callable[[], int]
) -> None:
    more = ["--name=run", *FROZEN, "--data.val_size=8", "--evaluation.test_images=4", "--trainer.max_epochs=1"]
    one = [f"--trainer.default_root_dir={tmp_path / 'one'}", "--data.cache=null"]
    main([*CONFIG, *tiny, *EXACT, *more, *one])
    encoded()
    fit_in_two(tiny, tmp_path / "two", *more)
    images, batch = 64 + 8 + 32, 8
    assert encoded() == -(-images // batch) * batch + 2, "each image once, and one in each process for the shape"
    assert len(stores(tmp_path / "two")) == 1
    expected, found = ([line.split(",") for line in trace(tmp_path / name)[1:]] for name in ("one", "two"))
    assert [line[:LOSS] for line in found] == [line[:LOSS] for line in expected], "the same samples in every step"
    losses = [[float.fromhex(line[LOSS]) for line in lines] for lines in (expected, found)]
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert results(tmp_path / "two") == pytest.approx(results(tmp_path / "one"), rel=1e-4)


def test_unreadable_images_are_skipped_and_counted_as_without_the_cache(tiny: list[str], tmp_path: Path) -> None:
    copies = tmp_path / "images"
    folder = Path(next(o for o in tiny if o.startswith("--data.images=")).partition("=")[2])
    shutil.copytree(folder, copies)
    for split, numbers in (("train", (3, 17)), ("test", (0, 9))):
        names = json.loads((folder.parent / f"annotations/captions_{split}.json").read_text())["images"]
        for number in numbers:
            (copies / names[number]["file_name"]).write_bytes(b"<html>not found</html>")
    options = [f"--data.images={copies}", *FROZEN, "--trainer.max_epochs=1", "--data.on_bad_sample=skip"]
    options += ["--data.max_bad_fraction=0.07"]
    fit(tiny, tmp_path, "--name=run", *options, "--data.cache=null")
    for name in ("filling", "filled")[: tier(1, 2)]:
        fit(tiny, tmp_path, f"--name={name}", *options)
        assert len(stores(tmp_path)) == 1
        assert trace(tmp_path, name) == trace(tmp_path)
        assert results(tmp_path, name) == results(tmp_path)
        counts = [json.loads((tmp_path / n / "metrics.json").read_text()) for n in ("run", name)]
        plain, cached = ({k: v for k, v in c.items() if k.startswith("run/samples_s")} for c in counts)
        assert cached == plain and cached["run/samples_skipped/train"] == 2


@pytest.mark.parametrize("task", ["vqa", "decision"] if FULL else ["vqa"])
def test_task_reads_the_cache_of_its_frozen_image_encoder(
    task: str, tiny_tasks: dict[str, list[str]], tmp_path: Path, encoded: Callable[[], int]
) -> None:
    config = {"vqa": "vqa_shapes", "decision": "snli_ve"}[task]
    options = ["fit", "--config", str(ROOT / f"configs/finetune/{config}.yaml"), *tiny_tasks[task], *FROZEN]
    options += ["--trainer.max_epochs=1", "--trainer.precision=32-true", "--threads=1"]
    options += [f"--trainer.default_root_dir={tmp_path}"]
    main([*options, "--name=run", "--data.cache=null"])
    without = encoded()
    main([*options, "--name=cached"])
    batches, blank = 112, 3  # of 64 + 16 + 32 images; a blank image in each of three evaluations
    assert encoded() == batches + 1 + blank < without
    assert trace(tmp_path, "cached") == trace(tmp_path)
    assert results(tmp_path, "cached") == results(tmp_path)


def arm_rows(tiny: list[str], shapes: Path, out: Path, count: int, *more: str) -> list[dict[str, Any]]:
    """Rows of the first arms of a comparison with 4 steps each, trained in this process."""
    options = dict(option.removeprefix("--").split("=", 1) for option in [*tiny, *FROZEN, *more])
    options |= {"trainer.precision": "32-true"}
    content = {
        "strategies": ["late", "early"],
        "seeds": [0],
        "match": "steps",
        "pretrain": {
            "run": str(ROOT / "configs/pretrain/shapes_plain.yaml"),
            "steps": 4,
            "options": {key: yaml.safe_load(value) for key, value in options.items()},
        },
        "retrieval": {"images": 6},
        "foils": {"files": [str(shapes / "annotations/foils_test.json")], "images": str(shapes / "images")},
        "primary": ["foils/overall"],
    }
    comparison = load_comparison(content)
    settings = Settings(out, jobs=1, exploratory=True, allow_import=[], command="")
    found = []
    for arm in list_arms(comparison)[:count]:
        budget = {"options": {}, "stages": {PRETRAIN: 4}, "budget": {}}
        spec = arm_spec(comparison, arm, budget, settings)
        Path(spec["folder"]).mkdir(parents=True)
        run_arm(spec, lambda: 0.0)
        found.append(json.loads((Path(spec["folder"]) / "row.json").read_text()))
    return found


def test_arms_of_a_comparison_share_one_cache_and_score_as_without(
    tiny: list[str], shapes: Path, tmp_path: Path, encoded: Callable[[], int]
) -> None:
    splits = [f"{s}: {shapes}/annotations/captions_{s}.json" for s in ("train", "val", "test")]
    less = ["--data.annotations={" + ", ".join(splits) + "}", "--evaluation.test_images=4", "--data.val_size=8"]
    expected = arm_rows(tiny, shapes, tmp_path / "plain", tier(1, 2), *less, "--data.cache=null")
    encoded()
    found = arm_rows(tiny, shapes, tmp_path / "cached", 2, *less)
    assert len(stores(tmp_path / "cached")) == 1
    # 64 + 8 + 32 images in batches of 16, once for both. Each arm: an image for the shape in training, retrieval and
    # foils, the blank image of foils, and 11 batches that are timed.
    assert encoded() == 7 * 16 + 2 * (3 + 1 + 11 * 16)
    for row, plain in zip(found, expected, strict=FULL):
        assert row["results"] == plain["results"] and {"foils/overall", "retrieval/rsum"} <= row["results"].keys()
        assert row["config"] == plain["config"]
        folders = [tmp_path / name / f"arms/{row['arm']}" for name in ("cached", "plain")]
        assert trace(folders[0], PRETRAIN) == trace(folders[1], PRETRAIN)


@pytest.fixture(scope="module")
def trained(tiny: list[str], tiny_tasks: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a pretraining run and a VQA run, in bf16 and with a frozen image encoder, and of their cache."""
    root = tmp_path_factory.mktemp("trained")
    options = [*FROZEN, "--trainer.precision=bf16-mixed", "--trainer.max_epochs=1", "--threads=1"]
    options += [f"--trainer.default_root_dir={root}", f"--data.cache={root}/cache"]
    main([*CONFIG, *tiny, *options, "--name=pairs", "--evaluation.test_images=32"])
    config = str(ROOT / "configs/finetune/vqa_shapes.yaml")
    main(["fit", "--config", config, *tiny_tasks["vqa"], *options, "--name=vqa", "--data.cache_dtype=fp16"])
    return root


@pytest.mark.parametrize("name", ["retrieval", "foils", "task"])
def test_evaluate_command_reads_the_cache_of_the_run_in_its_precision(
    name: str, trained: Path, shapes: Path, tmp_path: Path, encoded: Callable[[], int]
) -> None:
    data, kept = shapes / "annotations", trained / "cache"
    command = {
        "retrieval": ["pairs/model", "--format=coco", f"--annotations={data}/captions_test.json",
                      "--scorer", "itc", "itm"],
        "foils": ["pairs/model", f"--foils={data}/foils_test.json"],
        "task": ["vqa/model", "--format=vqav2", f"--annotations={data}/answers_test.json",
                 f"--questions={data}/questions_test.json", f"--image_names={data}/captions_test.json"],
    }[name]  # fmt: skip
    command = ["evaluate", name, str(trained / command[0]), *command[1:], "--images", str(shapes / "images")]

    def report(*more: str) -> Any:
        encoded()
        main([*command, "--out", str(tmp_path / "report.json"), *more])
        found = json.loads((tmp_path / "report.json").read_text())
        for metrics in found if name == "retrieval" else ():
            for key in ("encoding_seconds", "scoring_seconds", "peak_memory"):
                del metrics[key]
        return found

    cached = report("--cache", str(kept))
    assert encoded() == {"retrieval": 1, "foils": 2, "task": 2}[name], "one for the shape, and the blank image"
    assert len(stores(kept)) == 2
    assert report("--precision=bf16-mixed", "--cache", str(tmp_path / "other")) == (found := report())
    assert encoded() >= 32 and (cached == found or name == "task")  # the cache of the task is in fp16
    if name == "task":
        run = results(trained, "vqa")
        assert cached == pytest.approx({key: run[f"test/{key}"] for key in cached}, abs=1e-4)  # in other batches
    if name == "retrieval":
        assert [metrics["precision"] for metrics in cached] == ["bf16-mixed"] * 2
        assert report("--precision=32-true")[0]["precision"] == "32-true"


def test_evaluate_command_names_the_precisions(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "foils", str(trained / "pairs/model"), "--foils=x", "--images=.", "--precision=bf16"])
    assert "precision='bf16'; allowed are 32-true, 16-mixed, bf16-mixed" in capsys.readouterr().err


@pytest.mark.skipif(not FULL, reason="20 kills of processes: the full tier only")
def test_real_kills_while_filling_and_training_lose_nothing(
    tiny: list[str], shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL at random moments, half of them before the first step; then the run is resumed."""
    monkeypatch.setattr(encoder_cache, "BYTES_PER_WRITE", 1)  # with the default this store is written at once
    rng, images = np.random.default_rng(0), tmp_path / "images"
    shutil.copytree(shapes / "images", images)
    for file in images.rglob("*.png"):  # large, so that filling takes seconds
        Image.open(file).resize((1200, 1200), Image.Resampling.NEAREST).save(file)
    splits = [f"{s}: {shapes}/annotations/captions_{s}.json" for s in ("train", "val", "test")]
    options = [f"--data.images={images}", "--data.annotations={" + ", ".join(splits) + "}", *FROZEN]
    options += ["--data.batch_size=4", "--trainer.max_epochs=2", "--name=run", "--resume=auto"]

    def start(root: Path) -> Any:
        def target() -> None:
            torch.set_num_threads(1)
            fit(tiny, root, *options)

        process = multiprocessing.get_context("fork").Process(target=target)
        process.start()
        return process

    def finish(root: Path) -> None:
        run = start(root)
        run.join()
        assert run.exitcode == 0

    whole, kills, repetition = tmp_path / "whole", 0, 0
    finish(whole)
    while kills < 20:
        root, repetition = tmp_path / f"killed-{repetition}", repetition + 1
        for stage, state in 5 * [("filling", stored_rows)] + 5 * [("training", steps_of)]:
            run, before, rows = start(root), state(root), stored_rows(root)
            while run.is_alive() and state(root) <= before:
                time.sleep(0.005)
            time.sleep(float(rng.uniform(0, 0.3)))
            run.kill()
            run.join()
            assert run.exitcode == -signal.SIGKILL, "the run ended before it was killed"
            kills += 1
            print(f"kill {kills} while {stage}: {stored_rows(root)} rows, {steps_of(root)} steps", flush=True)
            assert stored_rows(root) >= rows and (stage == "filling" or steps_of(root) > before)
        assert stored_rows(root) == 64 + 16 + 32
        finish(root)
        assert trace(root) == trace(whole) and results(root) == results(whole)
        for name, value in weights(whole).items():
            assert value.equal(weights(root)[name]), name
        print(f"resumed after {kills} kills: trace, metrics and weights are equal", flush=True)


def stored_rows(root: Path) -> int:
    """Number of images in all caches below a folder."""
    return sum((file.parent / "index.bin").stat().st_size // 24 for file in root.rglob(META) if file.is_file())


def steps_of(root: Path) -> int:
    """Number of optimizer steps in the trace of a run."""
    return len(trace(root)) - 1 if (root / "run/trace.csv").is_file() else 0
