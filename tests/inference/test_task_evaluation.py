"""`mmbert evaluate task`: the metrics of a saved task model on a new file."""

import json
from pathlib import Path

import pytest
from tiny import randomize, tiny_config, tiny_examples, tiny_processor

import mmbert
from mmbert.cli.main import main
from mmbert.errors import DataError, UsageError
from mmbert.inference.evaluate.task import evaluate_task
from mmbert.model.modeling import MMBertForTask, MMBertModel

TEXTS = ["a cat", "the small red dog", "two birds", "a", "a green street"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the labels no and yes, and five labelled rows."""
    folder = tmp_path_factory.mktemp("task")
    model = MMBertForTask(tiny_config(task="decision", labels=["no", "yes"], objectives={}))
    randomize(model)
    model.save_pretrained(folder / "model")
    tiny_processor().save_pretrained(folder / "model")
    tiny_examples(folder, [("x",)] * 5, side=20)
    rows = [{"image": f"{i}.png", "text": text, "label": "yes" if i % 2 else "no"} for i, text in enumerate(TEXTS)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def test_accuracy_is_that_of_the_answers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = mmbert.load(folder / "model", device="cpu")
    answers = [model.answer(folder / f"{i}.png", text)[0].answer for i, text in enumerate(TEXTS)]
    expected = sum(answer == ("yes" if i % 2 else "no") for i, answer in enumerate(answers)) / 5
    found = evaluate_task(model, folder / "rows.jsonl", folder, format="jsonl", batch_size=2)
    assert found["decision_accuracy"] == expected and found["decision_ceiling"] == 1
    assert {"decision_accuracy_blank", "decision_accuracy_shuffled", "decision_accuracy_no_text"} <= found.keys()
    assert not any("prior" in name for name in found), "the training data is not there"

    command = ["evaluate", "task", str(folder / "model"), "--format", "jsonl", "--images", str(folder)]
    command += ["--annotations", str(folder / "rows.jsonl"), "--device", "cpu"]
    capsys.readouterr()
    main([*command, "--json", "--out", str(folder / "report.json")])
    printed = json.loads(capsys.readouterr().out)
    assert printed == pytest.approx(dict(found), abs=1e-5)
    assert json.loads((folder / "report.json").read_text()) == printed
    main(command)
    assert f"decision_accuracy           {expected:.4f}" in capsys.readouterr().out


def test_bad_files_and_models_are_one_sentence(folder: Path, tmp_path: Path) -> None:
    for evaluate in (evaluate_task, mmbert.evaluate_shares):
        with pytest.raises(UsageError, match="split='val': a file of format jsonl is one split; leave split out"):
            evaluate(folder / "model", folder / "rows.jsonl", folder, format="jsonl", split="val", device="cpu")
    rows = tmp_path / "rows.jsonl"
    for row, message in (
        ({"label": "maybe"}, "the label 'maybe'; expected one of the model's: 'no', 'yes'"),
        ({}, "label"),
    ):
        rows.write_text(json.dumps({"image": "0.png", "text": "a cat", **row}) + "\n")
        with pytest.raises(DataError, match=message):
            evaluate_task(folder / "model", rows, folder, format="jsonl", device="cpu")
    bare = MMBertModel(tiny_config())
    bare.save_pretrained(tmp_path / "bare")
    tiny_processor().save_pretrained(tmp_path / "bare")
    with pytest.raises(UsageError, match="has no task's head"):
        evaluate_task(tmp_path / "bare", folder / "rows.jsonl", folder, format="jsonl", device="cpu")
    with pytest.raises(UsageError, match="format jsonl has no such option"):
        evaluate_task(folder / "model", folder / "rows.jsonl", folder, format="jsonl", device="cpu", colour="red")
