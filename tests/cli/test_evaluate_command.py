"""`mmbert evaluate` on a saved model, from files to the printed table and the report."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ranking import CAPTIONS, tiny_model
from tiny import tiny_examples, tiny_processor

from mmbert.cli.commands.evaluate import _retrieval_table
from mmbert.cli.main import main
from mmbert.evaluation.retrieval import SCORERS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model, 7 images, and their captions as Karpathy's JSON and as JSON lines."""
    folder = tmp_path_factory.mktemp("evaluate")
    tiny_model().save_pretrained(folder / "model")
    tiny_processor().save_pretrained(folder / "model")
    (folder / "images").mkdir()
    examples = tiny_examples(folder / "images", CAPTIONS)
    images: list[dict[str, Any]] = [
        {"split": "test", "filename": e.image.name, "sentences": [{"raw": caption} for caption in e.captions]}
        for e in examples
    ]
    # A training image that was never downloaded.
    images.append({"split": "train", "filename": "absent.png", "sentences": [{"raw": "a cat"}]})
    (folder / "karpathy.json").write_text(json.dumps({"images": images}))
    lines = [json.dumps({"file": e.image.name, "text": caption}) for e in examples for caption in e.captions]
    (folder / "captions.jsonl").write_text("\n".join(lines))
    foils = {"1": {"filename": "0.png", "caption": "a red cat", "negative_caption": "a blue cat"}}
    (folder / "swap.json").write_text(json.dumps(foils))
    return folder


def arguments(folder: Path, *more: str, file: str = "karpathy.json", format: str = "karpathy") -> list[str]:
    start = ["evaluate", "retrieval", str(folder / "model"), "--annotations", str(folder / file)]
    return [*start, "--format", format, "--images", str(folder / "images"), *more]


def fails(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    said = capsys.readouterr().err
    assert stopped.value.code == code and "Traceback" not in said, said
    return said


def metrics(file: Path) -> list[dict[str, Any]]:
    reports = json.loads(file.read_text())
    return [{k: v for k, v in report.items() if not k.endswith("seconds") and k != "peak_memory"} for report in reports]


def test_three_scorers_side_by_side(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "report.json")
    main(arguments(folder, "--scorer", *SCORERS, "--k", "7", "--folds", "1", "2", "--out", out))
    printed = capsys.readouterr().out.splitlines()
    reports = json.loads(Path(out).read_text())
    assert printed == _retrieval_table(reports)
    assert printed[0] == "7 images, 13 texts of test; ties rank last; equal texts are wrong"
    assert printed[1].split() == ["scorer", *SCORERS, *SCORERS]
    assert [(r["scorer"], r["folds"]) for r in reports] == [(name, folds) for folds in (1, 2) for name in SCORERS]
    _, exhaustive, two_stage = reports[:3]
    assert (exhaustive["fusion_passes"], two_stage["k"]) == (77, 7)
    assert all(exhaustive[name] == two_stage[name] for name in exhaustive if "R@" in name or "rank" in name)


def test_json_lines_give_the_same(folder: Path, tmp_path: Path) -> None:
    main(arguments(folder, "--out", str(tmp_path / "a.json"), "--k", "2", "--equal_texts"))
    keys = ["--image_key", "file", "--caption_key", "text", "--k", "2", "--equal_texts", "--batch_size", "3"]
    jsonl = arguments(folder, *keys, file="captions.jsonl", format="jsonl")
    main([*jsonl, "--out", str(tmp_path / "b.json")])
    assert metrics(tmp_path / "a.json") == metrics(tmp_path / "b.json")


def test_torchrun_with_two_processes_gives_the_same_and_prints_once(folder: Path, tmp_path: Path) -> None:
    def run(*start: str, out: Path) -> str:
        command = [*start, "-m", "mmbert", *arguments(folder, "--scorer", *SCORERS, "--k", "2", "--batch_size", "2")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, "--out", str(out)], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(sys.executable, out=tmp_path / "one.json")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    assert run(*torchrun, out=tmp_path / "two.json").count("rsum") == 1
    assert metrics(tmp_path / "one.json") == metrics(tmp_path / "two.json")


def test_foils_are_printed_by_category(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "foils.json"
    options = ["--images", str(folder / "images"), "--foils", str(folder / "swap.json"), "--out", str(out)]
    main(["evaluate", "foils", str(folder / "model"), *options])
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert printed[0] == ["category", "count", "accuracy", "blank", "shuffled"]
    assert [row[0] for row in printed[1:]] == ["swap", "overall"] and printed[1][4] == "-", "there is one image"
    assert json.loads(out.read_text())["swap"]["count"] == 1


def test_mistakes_are_one_sentence(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(code: int, *more: str, model: Path | None = None, **options: str) -> str:
        command = arguments(folder, *more, **options)
        command[2] = str(model or folder / "model")
        return fails(command, code, capsys)

    assert "no readable config.json. A run has it below itself: RUN/model." in said(2, model=folder)
    assert "no mmbert model folder" in said(2, model=tmp_path / "absent")
    assert "no image in the split 'val'; expected one of the splits it has: test, train" in said(1, "--split", "val")
    assert "split 'tset'; a karpathy file has train, val, test. Did you mean 'test'?" in said(2, "--split", "tset")
    assert "there is no option --scorers. Did you mean 'scorer'?" in said(2, "--scorers", "itc")
    assert "invalid choice: 'itx'" in said(2, "--scorer", "itx")
    assert "--batch_size 0: must be 1 or more" in said(2, "--batch_size", "0")
    assert "folds=8: from 1 to the 7 images" in said(2, "--folds", "8")
    assert "absent.png" in said(1, "--split", "train")
    assert "no key 'image'" in said(1, file="captions.jsonl", format="jsonl")
    told = said(2, "--split", "val", file="captions.jsonl", format="jsonl")
    assert "--split val: the whole file is ranked" in told and "--split_key names the field" in told

    other = tmp_path / "other"
    tiny_model().mmbert.save_pretrained(other)
    tiny_processor().save_pretrained(other)
    assert "holds a MMBertModel, which has no head to rank with" in said(2, model=other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "architectures": ["MMBertForPreTraining"]}))
    assert "missing keys" in said(1, model=other)
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "weights that can't be loaded" in said(1, model=other)
    (other / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    assert "holds a BertModel; expected MMBertForPreTraining" in said(2, model=other)


def test_broken_image_is_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    (tmp_path / "a.jsonl").write_text('{"image": "a.png", "caption": "a cat"}')
    options = ["--annotations", str(tmp_path / "a.jsonl"), "--images", str(tmp_path), "--format", "jsonl"]
    command = ["evaluate", "retrieval", str(folder / "model"), *options]
    assert f"mmbert: error: {tmp_path / 'a.png'}" in fails(command, 1, capsys)
