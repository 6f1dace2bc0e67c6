"""`mmbert evaluate shares`: mean shares of text and image over a split."""

import json
from pathlib import Path

import pytest
from ranking import tiny_model
from tiny import randomize, tiny_config, tiny_examples, tiny_processor

import mmbert
from mmbert.cli.main import main
from mmbert.errors import DataError, UsageError
from mmbert.inference.evaluate.shares import choose_pairs
from mmbert.model.modeling import MMBertForTask

CAPTIONS = [("a red dog", "the green street"), ("two birds",), ("a small cat runs",), ("the dog", "a cat", "a bird")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained and a task model, four images with captions and with labels."""
    folder = tmp_path_factory.mktemp("shares")
    task = MMBertForTask(tiny_config(task="decision", labels=["no", "yes"], objectives={}))
    for name, model in (("model", tiny_model("hybrid", objectives={"mlm": 1.0, "itm": 1.0})), ("task", task)):
        randomize(model)
        model.save_pretrained(folder / name)
        tiny_processor().save_pretrained(folder / name)
    tiny_examples(folder, CAPTIONS, side=20)
    captions = [{"image": f"{i}.png", "caption": text} for i, texts in enumerate(CAPTIONS) for text in texts]
    labelled = [{"image": f"{i}.png", "text": texts[0], "label": "yes"} for i, texts in enumerate(CAPTIONS)]
    for name, rows in (("captions", captions), ("labelled", labelled)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def test_means_are_those_of_single_pairs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = mmbert.load(folder / "model", device="cpu")
    found = mmbert.evaluate_shares(model, folder / "captions.jsonl", folder, format="jsonl", samples=4, seed=1)
    pairs = choose_pairs([((folder / f"{i}.png"), texts) for i, texts in enumerate(CAPTIONS)], 100, 1)
    assert [pair.image.name for pair in pairs] == [f"{i}.png" for i in range(4)], "each image once"
    assert all(pair.text in CAPTIONS[i] for i, pair in enumerate(pairs))
    single = [model.modality_shares(image, text, samples=4, seed=1) for image, text in pairs]
    assert found["text"] == pytest.approx(sum(shares.text for shares in single) / 4, abs=1e-9)
    assert found["image"] == pytest.approx(1 - found["text"])
    assert found["image_low"] < found["image"] < found["image_high"] == pytest.approx(1 - found["text_low"])
    expected = (sum(shares.standard_error**2 for shares in single) / 4) ** 0.5
    assert found["sampling_error"] == pytest.approx(expected) and found["target"] == "itm" and found["pairs"] == 4

    command = ["evaluate", "shares", str(folder / "model"), "--format", "jsonl", "--images", str(folder), "--samples"]
    command += ["4", "--seed", "1", "--annotations", str(folder / "captions.jsonl"), "--device", "cpu"]
    capsys.readouterr()
    main(command)
    assert f"text   {found['text']:.4f}" in capsys.readouterr().out
    main([*command, "--json"])
    assert json.loads(capsys.readouterr().out) == dict(found)


def test_pairs_are_a_seeded_choice_of_images() -> None:
    texts = [(Path(f"{i}.png"), [f"{i} {j}" for j in range(5)]) for i in range(50)]
    chosen = choose_pairs(texts, 20, 0)
    assert chosen == choose_pairs(texts, 20, 0) != choose_pairs(texts, 20, 1)
    assert len({pair.image for pair in chosen}) == 20, "an image is chosen once, so that pairs are independent"
    assert len({pair.text.split()[1] for pair in chosen}) > 1, "not always the first caption"
    assert len(choose_pairs([*texts, *texts], 60, 0)) == 50


def test_task_models_are_judged_by_their_answers(folder: Path) -> None:
    model = mmbert.load(folder / "task", device="cpu")
    found = mmbert.evaluate_shares(model, folder / "labelled.jsonl", folder, format="jsonl", pairs=2, samples=4)
    assert found["target"] == "answer" and found["pairs"] == 2 and 0 < found["text"] < 1
    with pytest.raises(UsageError, match="fine-tuned, and is explained by its answers"):
        mmbert.evaluate_shares(model, folder / "labelled.jsonl", folder, format="jsonl", target="itm")


def test_bad_input_is_one_sentence(folder: Path) -> None:
    model, file = mmbert.load(folder / "model", device="cpu"), folder / "captions.jsonl"
    with pytest.raises(UsageError, match="objective itc"):
        mmbert.evaluate_shares(model, file, folder, format="jsonl", target="itc")
    with pytest.raises(UsageError, match="target='mlm'; allowed are itm, itc"):
        mmbert.evaluate_shares(model, file, folder, format="jsonl", target="mlm")
    with pytest.raises(UsageError, match="pairs=0"):
        mmbert.evaluate_shares(model, file, folder, format="jsonl", pairs=0)
    with pytest.raises(UsageError, match="images is missing"):
        mmbert.evaluate_shares(model, file, format="jsonl")
    with pytest.raises(DataError, match="no image in the split 'val'"):
        (folder / "splits.jsonl").write_text('{"image": "0.png", "caption": "a cat", "split": "test"}\n')
        mmbert.evaluate_shares(model, folder / "splits.jsonl", folder, format="jsonl", split="val", split_key="split")
