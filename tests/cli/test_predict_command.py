"""`mmbert predict`, from a saved model and files of questions or statements to the file of predictions."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from inference.test_loaded import LABELS, QUESTIONS, saved, task_model, tiny_model
from tiny import tiny_examples

import mmbert
from mmbert.cli.main import main
from mmbert.data.readers.base import ImageFolder
from mmbert.data.readers.vqa import read_questions, read_results, read_vqav2
from mmbert.inference.prediction import predict_vqa


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A fine-tuned model, 3 images, and 10 questions whose ids are in no order."""
    saved(tmp_path / "model", task_model())
    (tmp_path / "images").mkdir()
    tiny_examples(tmp_path / "images", [("x",)] * 3)
    asked = [
        {"question_id": 100 - 7 * i, "image_id": i % 3, "question": QUESTIONS[i % len(QUESTIONS)]} for i in range(10)
    ]
    (tmp_path / "q.json").write_text(json.dumps({"questions": asked}))
    return tmp_path


def predict(folder: Path, *more: str, model: str = "model", names: str = "{}.png", out: str = "r.json") -> Path:
    options = {"--questions": folder / "q.json", "--images": folder / "images", "--out": folder / out}
    given = [str(word) for pair in options.items() for word in pair]
    main(["predict", "vqa", str(folder / model), *given, "--image_names", names, *more])
    return folder / out


def test_every_question_is_answered_as_a_single_call_does(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = predict(folder, "--batch_size", "4")
    captured = capsys.readouterr()
    assert captured.out == f"{out}: answers to the 10 questions of {folder / 'q.json'}\n"
    assert captured.err == "", "no progress bar where there is no terminal"

    asked = json.loads((folder / "q.json").read_text())["questions"]
    model = mmbert.load(folder / "model")
    answers = [model.answer(folder / "images" / f"{q['image_id']}.png", q["question"])[0].answer for q in asked]
    assert len(set(answers)) > 1, "or this would not test the order"
    rows = [{"question_id": q["question_id"], "answer": a} for q, a in zip(asked, answers, strict=True)]
    assert json.loads(out.read_text()) == rows
    assert read_results(out, read_questions(folder / "q.json")) == {r["question_id"]: r["answer"] for r in rows}
    assert sorted(p.name for p in folder.iterdir()) == ["images", "model", "q.json", "r.json"], "nothing else is left"


def test_options_of_the_loader_change_nothing(folder: Path) -> None:
    first = predict(folder, "--num_workers", "0", out="a.json").read_text()
    assert predict(folder, "--num_workers", "2", "--batch_size", "1", out="b.json").read_text() == first
    names = [{"id": i, "file_name": f"{i}.png"} for i in range(3)]
    (folder / "names.json").write_text(json.dumps({"images": names}))
    assert predict(folder, names=str(folder / "names.json"), out="a.json").read_text() == first, "written over"


def test_predictions_can_be_scored(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = predict(folder)
    said = json.loads(out.read_text())
    truth = [
        {
            "question_id": row["question_id"],
            "question_type": "what",
            "answer_type": "other",
            "answers": [{"answer": row["answer"] if i < 6 else "nothing", "answer_id": n} for n in range(10)],
        }
        for i, row in enumerate(said)
    ]
    (folder / "a.json").write_text(json.dumps({"annotations": truth}))
    capsys.readouterr()
    files = {"--questions": folder / "q.json", "--annotations": folder / "a.json", "--results": out}
    main(["score", "vqa", *(str(word) for pair in files.items() for word in pair)])
    assert json.loads(capsys.readouterr().out)["overall"] == 60.0


def test_progress_is_shown_on_a_terminal(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmbert.inference.prediction.sys.stderr.isatty", lambda: True)
    predict(folder)
    captured = capsys.readouterr()
    assert "10/10" in captured.err and "10/10" not in captured.out


def fails(folder: Path, code: int, capsys: pytest.CaptureFixture[str], *more: str, **options: str) -> str:
    """The first line that is said; what was in the file before is there still, and nothing beside it."""
    (folder / "r.json").write_text("before")
    files = set(folder.iterdir())
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        predict(folder, *more, **options)
    said = capsys.readouterr().err
    assert stopped.value.code == code and "Traceback" not in said, said
    assert (folder / "r.json").read_text() == "before" and set(folder.iterdir()) == files
    return said.splitlines()[0]


def no_field(name: str) -> Callable[[list[Any]], object]:
    return lambda rows: rows[1].pop(name)


BAD_FILES: dict[str, tuple[Callable[[list[Any]], object], str]] = {
    "empty split": (lambda rows: rows.clear(), "q.json:questions: an empty list"),
    "id twice": (lambda rows: rows[3].update(question_id=100), "q.json:questions[3]: question_id 100 again"),
    "id as text": (lambda rows: rows[3].update(question_id="7"), "q.json:questions[3]: question_id is the string"),
    "no id": (no_field("question_id"), "q.json:questions[1]: no key 'question_id'"),
    "no image id": (no_field("image_id"), "q.json:questions[1]: no key 'image_id'"),
    "no question": (no_field("question"), "q.json:questions[1]: no key 'question'"),
    "blank question": (lambda rows: rows[2].update(question=" "), "q.json:questions[2]: an empty text"),
    "question is a number": (lambda rows: rows[2].update(question=3), "q.json:questions[2]: question is the number 3"),
    "half a surrogate": (lambda rows: rows[2].update(question="a \ud800"), "q.json:questions[2]: half a surrogate"),
    "no such image": (lambda rows: rows[4].update(image_id=77), "q.json:questions[4]: no image file '77.png'"),
    "record is a list": (lambda rows: rows.insert(0, []), "q.json:questions[0]: the record is a list"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_wrong_question_file_is_one_error_with_file_and_record(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, expected = BAD_FILES[name]
    content = json.loads((folder / "q.json").read_text())
    change(content["questions"])
    (folder / "q.json").write_text(json.dumps(content))
    said = fails(folder, 1, capsys)
    assert f"{folder}/{expected}" in said, said


@pytest.mark.parametrize("num_workers", ["0", "1"])
def test_broken_image_is_named_with_its_record(
    num_workers: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = folder / "images/1.png"
    broken.write_bytes(broken.read_bytes()[:100])
    said = fails(folder, 1, capsys, "--num_workers", num_workers)
    assert said.startswith(f"mmbert: error: {folder / 'q.json'}:questions[1]: the image {broken}: truncated"), said
    assert said.endswith("; expected one that can be read")


def test_wrong_options_are_one_sentence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(folder / "pretrained", tiny_model())
    saved(folder / "decision", task_model("decision"))
    said = fails(folder, 2, capsys, model="pretrained")
    assert "was pretrained with itm, itc; answering needs a model that was fine-tuned with model.task=vqa and" in said
    assert "model.task=decision and one image per text; answering needs" in fails(folder, 2, capsys, model="decision")
    assert "--out" in fails(folder, 2, capsys, out="nowhere/r.json") and not (folder / "nowhere").exists()
    assert "is a folder; give a file" in fails(folder, 2, capsys, out="images")
    assert "--batch_size 0: must be 1 or more" in fails(folder, 2, capsys, "--batch_size", "0")
    assert "--num_workers -1: must be 0 or more" in fails(folder, 2, capsys, "--num_workers", "-1")
    assert "there is no option --batchsize. Did you mean" in fails(folder, 2, capsys, "--batchsize", "2")
    assert "device='gpu'" in fails(folder, 2, capsys, "--device", "gpu")
    assert "data.image_names='{:x}{}.png': expected a template" in fails(folder, 2, capsys, names="{:x}{}.png")
    (folder / "q.json").write_text('{"questions": [')
    assert f"{folder / 'q.json'}:1:" in fails(folder, 1, capsys)


def test_incomplete_file_never_replaces_the_old_one(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmbert.inference.prediction.os.fsync", lambda number: os.truncate(number, 100))
    assert "broken JSON" in fails(folder, 1, capsys)
    monkeypatch.undo()
    dumps = json.dumps
    monkeypatch.setattr("mmbert.inference.prediction.json.dumps", lambda row: dumps({**row, "question_id": 100}))
    assert "[1]: question_id 100 again" in fails(folder, 1, capsys)
    examples = read_vqav2(
        folder / "q.json", None, ImageFolder(folder / "images"), split="questions", image_names="{}.png"
    )
    monkeypatch.undo()
    predict_vqa(mmbert.load(folder / "model"), examples[:3], folder / "three.json")
    assert len(json.loads((folder / "three.json").read_text())) == 3 and set(LABELS) >= {
        row["answer"] for row in json.loads((folder / "three.json").read_text())
    }


@pytest.fixture
def decisions(tmp_path: Path) -> Path:
    """A model for decisions, 3 images, and 5 unlabelled rows as Hateful Memes publishes them."""
    saved(tmp_path / "model", task_model("decision"))
    (tmp_path / "images").mkdir()
    tiny_examples(tmp_path / "images", [("x",)] * 3)
    rows = [{"id": 50 - i, "img": f"{i % 3}.png", "text": QUESTIONS[i % len(QUESTIONS)]} for i in range(5)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def predict_labels(folder: Path, *more: str, out: str = "r.json") -> Any:
    files = {"--annotations": folder / "test.jsonl", "--images": folder / "images", "--out": folder / out}
    options = [str(word) for pair in files.items() for word in pair]
    main(["predict", "decision", str(folder / "model"), *options, "--num_workers", "0", *more])
    return (folder / out).read_text(encoding="utf-8")


def test_unlabelled_rows_get_labels_and_probabilities(decisions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(predict_labels(decisions, "--id_key", "id", "--batch_size", "2"))
    assert f"labels of the 5 rows of {decisions / 'test.jsonl'}" in capsys.readouterr().out
    model = mmbert.load(decisions / "model")
    rows = [json.loads(line) for line in (decisions / "test.jsonl").read_text().splitlines()]
    for row, prediction in zip(rows, found, strict=True):
        ranked = model.answer(decisions / "images" / row["img"], row["text"], top_k=9)
        assert prediction["id"] == row["id"] and prediction["label"] == ranked[0].answer
        assert list(prediction["probabilities"]) == LABELS
        assert prediction["probabilities"] == pytest.approx({a.answer: a.score for a in ranked}, abs=1e-5)
    lines = predict_labels(decisions, out="r.jsonl").splitlines()
    assert [json.loads(line)["id"] for line in lines] == [0, 1, 2, 3, 4], "without --id_key the number of the row"
    assert [json.loads(line)["label"] for line in lines] == [row["label"] for row in found]
    given = ("--image_key", "img", "--text_key", "text", "--image_names", "{}", "--batch_size", "1")
    assert json.loads(predict_labels(decisions, *given))[0]["label"] == found[0]["label"]


def test_mistakes_of_predict_decision_are_one_sentence(decisions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (["--text_key", "txt"], "test.jsonl:1: no key 'txt'"),
        (["--image_key", "id"], "no image file '50'"),
        (["--out", str(decisions / "none/r.json")], "its folder does not exist"),
        (["--image_names", "x.png"], "data.image_names='x.png': expected a template with one {}"),
    ):
        with pytest.raises(SystemExit):
            predict_labels(decisions, *options)
        error = capsys.readouterr().err
        assert message in error and error.startswith("mmbert: error: ") and "Traceback" not in error, error
    assert not (decisions / "r.json").exists()
    saved(decisions / "model", task_model("vqa"))
    with pytest.raises(SystemExit):
        predict_labels(decisions)
    assert "model.task=vqa and one image per text; answering needs" in capsys.readouterr().err
