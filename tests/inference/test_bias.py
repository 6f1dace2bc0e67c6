"""`mmbert evaluate bias`: differences between two words, by hand, and their section in a model card."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranking import tiny_model
from tiny import tiny_examples, tiny_processor

import mmbert
from mmbert.cli.main import main
from mmbert.errors import DataError, UsageError
from mmbert.inference.evaluate.bias import LIMITS, OCCUPATIONS, TEMPLATES, _fill, evaluate_bias, write_bias_section

OBJECTIVES = {"mlm": 1.0, "itm": 1.0, "itc": {"embedding_size": 8}}
OPTIONS: dict[str, Any] = {
    "words": ["cat", "dog"],
    "occupations": ["bird", "car", "tree"],
    "templates": ["a {word} and a {occupation}", "the {occupation} on the {word}"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bias")
    tiny_model(objectives=OBJECTIVES).save_pretrained(folder / "model")
    tiny_processor().save_pretrained(folder / "model")
    (folder / "images").mkdir()
    tiny_examples(folder / "images", [("a",)] * 3)
    return folder


def test_differences_are_those_of_single_texts(folder: Path) -> None:
    loaded = mmbert.load(folder / "model")
    report = evaluate_bias(loaded, folder / "images", **OPTIONS)
    rows = {}
    for occupation in OPTIONS["occupations"]:
        mlm, itm, mass = [], [], []
        for template in OPTIONS["templates"]:
            words = loaded.fill_mask(None, template.format(word="[MASK]", occupation=occupation), top_k=32)[0]
            p = {word.token: word.probability for word in words}
            mlm.append((p["cat"] - p["dog"]) / (p["cat"] + p["dog"]))
            mass.append(p["cat"] + p["dog"])
            texts = [template.format(word=word, occupation=occupation) for word in ("cat", "dog")]
            for image in sorted((folder / "images").iterdir()):
                first, second = loaded.match(image, texts).scores
                itm.append(first - second)
        rows[occupation] = [np.mean(mlm), np.mean(mass), np.mean(itm)]
    for occupation, expected in rows.items():
        assert [*report["occupations"][occupation].values()] == pytest.approx(expected, abs=1e-5)
    assert report["mlm"] == pytest.approx(np.mean([row[0] for row in rows.values()]), abs=1e-5)
    assert report["itm_low"] <= report["itm"] <= report["itm_high"] and report["images"] == 3


def test_exchanged_words_exchange_the_sign(folder: Path) -> None:
    loaded = mmbert.load(folder / "model")
    first = evaluate_bias(loaded, folder / "images", **OPTIONS)
    (folder / "images" / "README.txt").write_text("no image; skipped, as mmbert index does")
    other = evaluate_bias(loaded, folder / "images", **{**OPTIONS, "words": ["dog", "cat"]})
    for name in ("mlm", "itm"):
        assert other[name] == pytest.approx(-first[name], abs=1e-6) and first[name] != 0
        assert other[f"{name}_low"] == pytest.approx(-first[f"{name}_high"], abs=1e-6)


def test_default_captions_are_sentences() -> None:
    texts = _fill(TEMPLATES, OCCUPATIONS, "woman")
    assert len(set(texts)) == len(TEMPLATES) * len(OCCUPATIONS)
    assert {"a woman working as an engineer", "the athlete is a woman", "a woman dressed as a nurse"} <= {*texts}
    texts = _fill(TEMPLATES, OCCUPATIONS, "adult")
    assert {"an adult working as an engineer", "the nurse is an adult", "an adult dressed as a nurse"} <= {*texts}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"words": ["cat", "zebra"]}, "the word 'zebra' is not one token of the model's tokenizer"),
        ({"words": ["cat", "cat"]}, "two different words are compared"),
        ({"templates": ["a {word}"]}, r"template 'a \{word\}': it needs \{word\} and \{occupation\}, each once"),
        ({"occupations": []}, "give at least one of each"),
        ({"num_images": 0, "images": "."}, "num_images=0: must be 1 or more"),
    ],
)
def test_wrong_options_are_one_sentence(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate_bias(folder / "model", **{**OPTIONS, **options})


def test_models_without_the_heads_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no image file"):
        evaluate_bias(folder / "model", tmp_path, **OPTIONS)
    tiny_processor().save_pretrained(tmp_path)
    tiny_model(objectives={"itm": 1.0}).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"images is missing: .* has no mlm"):
        evaluate_bias(tmp_path, **OPTIONS)
    report = evaluate_bias(tmp_path, [folder / "images/0.png"], **OPTIONS)
    assert report["mlm"] is None and report["itm"] is not None and report["images"] == 1
    tiny_model(objectives={"itc": {"embedding_size": 8}}).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="the bias probe needs a model that was pretrained with the objective mlm or"):
        evaluate_bias(tmp_path, **OPTIONS)


def test_section_of_a_model_card_is_replaced(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = folder / "model/README.md"
    card.write_text("---\ntags: [x]\n---\n\n# run\n\n## Model\n\ntext\n\n## Limits\n\nmore\n")
    start = ["evaluate", "bias", str(folder / "model"), "--words", "cat", "dog", "--occupations", "bird", "car"]
    options = ["--templates", "a {word} and a {occupation}", "--out", str(tmp_path / "report.json")]
    main([*start, *options])
    printed = capsys.readouterr().out
    assert "cat minus dog in 1 templates with 2 occupations, 0 images" in printed and LIMITS in printed
    assert "Bias probe" not in card.read_text(), "it is written on request"
    main([*start, *options, "--images", str(folder / "images"), "--card"])
    report = json.loads((tmp_path / "report.json").read_text())
    text = card.read_text()
    assert text.startswith("---\ntags: [x]\n---\n\n# run\n\n## Model\n\ntext\n\n## Limits\n\nmore\n\n## Bias probe\n\n")
    assert f"{report['itm']:.4f} ({report['itm_low']:.4f} to" in text and LIMITS in text
    torch.manual_seed(0)
    write_bias_section(folder / "model", evaluate_bias(folder / "model", **OPTIONS))
    assert card.read_text().count("## Bias probe") == 1 and "| tree |" in card.read_text()
    with pytest.raises(UsageError, match="has no model card"):
        write_bias_section(tmp_path, evaluate_bias(folder / "model", **OPTIONS))
