"""Pictures that can't be read: the run stops with the first, or skips them, counted and always in the same way."""

import json
import shutil
from pathlib import Path

import pytest
from interrupted import fit, killed, trace

BAD = {"train": (3, 17), "val": (5,), "test": (0, 9)}
SKIP = ["--data.on_bad_sample=skip", "--data.max_bad_fraction=0.07"]


@pytest.fixture(scope="module")
def damaged(shapes: Path, tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The options of `tiny` on a copy of the data in which some pictures are cut, and one is a web page."""
    folder = tmp_path_factory.mktemp("damaged") / "shapes"
    shutil.copytree(shapes, folder)
    for split, numbers in BAD.items():
        records = json.loads((folder / f"annotations/captions_{split}.json").read_text())["images"]
        for number in numbers:
            file = folder / "images" / records[number]["file_name"]
            file.write_bytes(file.read_bytes()[:100] if number else b"<!DOCTYPE html><html>not found</html>")
    return [option.replace(str(shapes), str(folder)) for option in tiny]


def metrics(root: Path) -> dict[str, float]:
    return json.loads((root / "run/metrics.json").read_text())


@pytest.fixture(scope="module")
def whole(damaged: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    fit(damaged, root, "--name=run", *SKIP)
    return root


def test_by_default_the_first_bad_picture_stops_the_run(
    damaged: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        fit(damaged, tmp_path, "--name=run")
    assert stopped.value.code == 1
    assert "truncated or damaged" in capsys.readouterr().err


def test_skipped_pictures_are_counted_by_split_and_reason(whole: Path) -> None:
    found = {k.removeprefix("run/samples_"): v for k, v in metrics(whole).items() if k.startswith("run/samples_")}
    del found["per_second"]
    assert found == {
        "seen": 192, "repeated": 0, "lost": 0,
        "skipped": 7, "skipped/train": 2, "skipped/val": 1, "skipped/test": 2,
        "skipped/test_seen": 1, "skipped/test_unseen": 1,  # the same pictures as in test
        "skipped/truncated or damaged PNG": 5, "skipped/not an image": 2,
    }  # fmt: skip


def test_bad_pairs_of_an_evaluation_are_left_out(whole: Path) -> None:
    assert metrics(whole)["val/retrieval_images"] == 15
    assert metrics(whole)["test/retrieval_images"] == 30


def test_what_is_skipped_does_not_depend_on_workers(whole: Path, damaged: list[str], tmp_path: Path) -> None:
    fit(damaged, tmp_path, "--name=run", *SKIP, "--data.num_workers=2")
    assert trace(tmp_path) == trace(whole)
    assert {k: v for k, v in metrics(tmp_path).items() if "skipped" in k} == {
        k: v for k, v in metrics(whole).items() if "skipped" in k
    }


def test_resumed_run_that_skips_is_bit_identical(whole: Path, damaged: list[str], tmp_path: Path) -> None:
    killed(lambda: fit(damaged, tmp_path, "--name=run", *SKIP), after_batch=6)
    fit(damaged, tmp_path, "--name=run", *SKIP, "--resume=auto")
    assert trace(tmp_path) == trace(whole)
    assert metrics(tmp_path)["run/samples_skipped/train"] == 2
    assert metrics(tmp_path)["run/samples_seen"] == 192


def test_too_many_bad_pictures_stop_the_run_and_are_listed(
    damaged: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        fit(damaged, tmp_path, "--name=run", "--data.on_bad_sample=skip", "--data.max_bad_fraction=0.02")
    assert stopped.value.code == 1
    errors = capsys.readouterr().err
    assert "train: 2 of 64 pictures can't be read" in errors
    assert errors.count("truncated or damaged") >= 2, "each with its record"
    assert "captions_train.json:" in errors
