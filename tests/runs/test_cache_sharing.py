"""Encoder cache in every kind of run: processes, arms of a comparison, fine-tuning, unreadable images, kills."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from interrupted import HARD, fit, results, trace, weights
from PIL import Image
from processes import CONFIG, EXACT, ROOT, fit_in_two
from tiers import FULL, tier

from mmbert.cli.main import main
from mmbert.compare.arm import run_arm
from mmbert.compare.plan import PRETRAIN, list_arms, load_comparison
from mmbert.compare.specs import Settings, arm_spec
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
    options = [*tiny, f"--data.images={copies}", *FROZEN, "--trainer.max_epochs=1"]
    skip = ["--data.on_bad_sample=skip", "--data.max_bad_fraction=0.07"]
    fit(options, tmp_path, "--name=run", *skip, "--data.cache=null")
    for name in ("filling", "filled")[: tier(1, 2)]:
        fit(options, tmp_path, f"--name={name}", *skip)
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
    for row, plain in zip(found, expected, strict=FULL):
        assert row["results"] == plain["results"] and {"foils/overall", "retrieval/rsum"} <= row["results"].keys()
        assert row["config"] == plain["config"]
        folders = [tmp_path / name / f"arms/{row['arm']}" for name in ("cached", "plain")]
        assert trace(folders[0], PRETRAIN) == trace(folders[1], PRETRAIN)


@pytest.mark.skipif(not FULL, reason="20 kills of real processes: the full tier only")
def test_real_kills_while_filling_and_training_lose_nothing(tiny: list[str], shapes: Path, tmp_path: Path) -> None:
    """SIGKILL to `mmbert fit` at random moments, half of them before the first step; then the run is resumed."""
    rng = np.random.default_rng(0)
    images = tmp_path / "images"  # large, so that filling takes seconds
    shutil.copytree(shapes / "images", images)
    for file in images.rglob("*.png"):
        Image.open(file).resize((2000, 2000), Image.Resampling.NEAREST).save(file)
    options = [*tiny, f"--data.images={images}", *HARD, *FROZEN, "--data.batch_size=4", "--trainer.max_epochs=6"]
    config = str(ROOT / "configs/pretrain/shapes_plain.yaml")
    program = (  # with the default of 32 MB a write this store is written at once
        "import sys, mmbert.data.encoder_cache as c; c.BYTES_PER_WRITE = 1; "
        "from mmbert.cli.main import main; main(sys.argv[1:])"
    )

    def start(root: Path, *more: str) -> subprocess.Popen[str]:
        place = [f"--trainer.default_root_dir={root}", "--name=run", "--resume=auto"]
        command = [sys.executable, "-c", program, "fit", "--config", config, *options, *place, *more]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)

    def finish(root: Path, *more: str) -> None:
        run = start(root, *more)
        errors = run.communicate(timeout=240)[1]
        assert run.returncode == 0, errors

    whole, kills, repetition = tmp_path / "whole", 0, 0
    finish(whole, "--data.cache=null")
    while kills < 20:
        root, repetition = tmp_path / f"killed-{repetition}", repetition + 1
        for stage, state in 5 * [("filling", stored_rows)] + 5 * [("training", steps_of)]:
            run, before, rows = start(root), state(root), stored_rows(root)
            while run.poll() is None and state(root) == before:
                time.sleep(0.005)
            time.sleep(float(rng.uniform(0, 0.3)))
            run.kill()
            run.communicate()
            assert run.returncode == -signal.SIGKILL, "the run ended before it was killed"
            kills += 1
            print(f"kill {kills} while {stage}: {stored_rows(root)} rows, {steps_of(root)} steps")
            assert stored_rows(root) >= rows and (stage == "filling" or steps_of(root) > before)
        assert stored_rows(root) == 64 + 16 + 32
        finish(root)
        assert trace(root) == trace(whole) and results(root) == results(whole)
        for name, value in weights(whole).items():
            assert value.equal(weights(root)[name]), name


def stored_rows(root: Path) -> int:
    """Number of images in all caches below a folder."""
    return sum((file.parent / "index.bin").stat().st_size // 24 for file in root.rglob(META) if file.is_file())


def steps_of(root: Path) -> int:
    """Number of optimizer steps in the trace of a run."""
    return len(trace(root)) - 1 if (root / "run/trace.csv").is_file() else 0
