"""Images that can't be read: the run stops with the first, or skips them, counted and always in the same way."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from interrupted import fit, killed, results, trace
from PIL import Image
from processes import CONFIG, EXACT, finish, start
from tiers import tier

from mmbert.cli.main import main

BAD = {"train": (3, 17), "val": (5,), "test": (0, 9)}
SKIP = ["--data.on_bad_sample=skip", "--data.max_bad_fraction=0.07"]


@pytest.fixture(scope="module")
def damaged(shapes: Path, tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The options of `tiny` on a copy of the data in which some images are cut, and one is a web page."""
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


def test_by_default_the_first_bad_image_stops_the_run(
    damaged: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        fit(damaged, tmp_path, "--name=run")
    assert stopped.value.code == 1
    assert "truncated or damaged" in capsys.readouterr().err


def test_skipped_images_are_counted_by_split_and_reason(whole: Path) -> None:
    found = {k.removeprefix("run/samples_"): v for k, v in metrics(whole).items() if k.startswith("run/samples_")}
    del found["per_second"]
    assert found == {
        "seen": 192, "repeated": 0, "lost": 0,
        "skipped": 7, "skipped/train": 2, "skipped/val": 1, "skipped/test": 2,
        "skipped/test_seen": 1, "skipped/test_unseen": 1,  # the same images as in test
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


def test_too_many_bad_images_stop_the_run_and_are_listed(
    damaged: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        fit(damaged, tmp_path, "--name=run", "--data.on_bad_sample=skip", "--data.max_bad_fraction=0.02")
    assert stopped.value.code == 1
    errors = capsys.readouterr().err
    assert "train: 2 of 64 images can't be read" in errors
    assert errors.count("truncated or damaged") >= 2, "each with its record"
    assert "captions_train.json:" in errors


def test_one_file_in_a_hundred_is_counted_exactly(tiny: list[str], tmp_path: Path) -> None:
    """10,000 files in the full tier. Exactly 1 % is still let through; every pair is asked for once in the epoch."""
    count = tier(400, 10_000)
    rng = np.random.default_rng(0)
    bad = rng.permutation(count)[: count // 100].tolist()
    records = []
    (tmp_path / "images").mkdir()
    for i in range(count):
        file = tmp_path / f"images/{i}.png"
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file)
        if i in bad:
            kind = bad.index(i) % 4
            file.write_bytes((b"", b"<!DOCTYPE html>", file.read_bytes()[:60], file.read_bytes()[:-40])[kind])
        records.append(json.dumps({"image": file.name, "caption": f"image {i}"}))
    (tmp_path / "train.jsonl").write_text("\n".join(records))
    data = ["--data.format=jsonl", f"--data.annotations={{train: {tmp_path}/train.jsonl}}"]
    data += [f"--data.images={tmp_path}/images", "--data.batch_size=100", "--data.on_bad_sample=skip"]
    fit(tiny, tmp_path, "--name=run", *data, "--trainer.max_epochs=1", "--checkpoint.every_n_steps=50")
    found = metrics(tmp_path)
    assert found["run/samples_seen"] == count and found["run/samples_lost"] == 0
    assert found["run/samples_skipped"] == found["run/samples_skipped/train"] == len(bad)
    assert found["run/samples_skipped/not an image"] == len(bad) / 2  # empty or a web page
    assert found["run/samples_skipped/truncated or damaged PNG"] == len(bad) / 2  # cut early or late


@pytest.fixture(scope="module")
def uneven(damaged: list[str], shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of data that splits badly in two: the second process has 7 validation pairs and no whole image."""
    before = next(option for option in damaged if option.startswith("--data.images=")).split("=")[1]
    folder = tmp_path_factory.mktemp("uneven") / "shapes"
    shutil.copytree(Path(before).parent, folder)
    file = folder / "annotations/captions_val.json"
    content = json.loads(file.read_text())
    left_out = content["images"].pop()["id"]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != left_out]
    file.write_text(json.dumps(content))
    first = {}
    for annotation in content["annotations"]:
        first.setdefault(annotation["image_id"], len(annotation["caption"]))
    by_length = np.argsort([first[image["id"]] for image in content["images"]], kind="stable")
    assert len(by_length) == 15
    for image in content["images"]:  # nothing of what `damaged` broke
        name = image["file_name"]
        shutil.copy(shapes / "images" / name, folder / "images" / name)
    for i in [by_length[0], *by_length[1::2]]:
        (folder / "images" / content["images"][i]["file_name"]).write_bytes(b"")
    return [option.replace(str(Path(before).parent), str(folder)) for option in damaged]


def test_two_processes_that_skip_unevenly_train_and_evaluate_as_one(uneven: list[str], tmp_path: Path) -> None:
    """In batches of 7 the first process has two for validation, the second a single one without any image."""
    more = ["--name=run", "--data.on_bad_sample=skip", "--data.max_bad_fraction=0.6", "--data.eval_batch_size=7"]
    main([*CONFIG, *uneven, *EXACT, *more, f"--trainer.default_root_dir={tmp_path / 'one'}"])
    errors = finish(start(uneven, tmp_path / "two", *more))
    assert errors.count("skipped in val: ") == 8, "each once, by one process"
    one, two = ([line.split(",") for line in trace(tmp_path / name)[1:]] for name in ("one", "two"))
    assert [line[:3] for line in one] == [line[:3] for line in two], "the same samples in every step"
    for a, b in zip(one, two, strict=True):
        assert float.fromhex(b[3]) == pytest.approx(float.fromhex(a[3]), rel=1e-5)
    expected, found = results(tmp_path / "one"), results(tmp_path / "two")
    assert expected.keys() == found.keys() and expected["val/retrieval_images"] == 7
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4), name
    counts = [
        {k: v for k, v in metrics(tmp_path / name).items() if k.startswith("run/samples_") and "second" not in k}
        for name in ("one", "two")
    ]
    assert counts[0] == counts[1]
    assert counts[0]["run/samples_skipped/val"] == 8 and counts[0]["run/samples_skipped/train"] == 2


def test_two_processes_stop_at_what_both_skipped_together(uneven: list[str], tmp_path: Path) -> None:
    """1 and 7 of 15: neither alone is above half."""
    run = start(uneven, tmp_path, "--data.on_bad_sample=skip", "--data.max_bad_fraction=0.5")
    errors = run.communicate(timeout=120)[1]
    assert run.returncode == 1
    assert "val: 8 of 15 images can't be read" in errors
