"""Imported ViLT against transformers, for every head, with padded texts and square images."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.import_parity import LIMIT, difference, images, import_model, texts
from PIL import Image
from tiny import tiny_tokenizer
from transformers import (
    ViltConfig,
    ViltForImageAndTextRetrieval,
    ViltForImagesAndTextClassification,
    ViltForMaskedLM,
    ViltForQuestionAnswering,
    ViltForTokenClassification,
    ViltModel,
)

import mmbert
from mmbert.cli.main import main
from mmbert.errors import UsageError

WORDS = texts()
ANSWERS = {0: "yes", 1: "no", 2: "2", 3: "red"}


def theirs(kind: Any, **options: Any) -> Any:
    sizes = {
        "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
        "max_position_embeddings": 16, "image_size": 16, "patch_size": 8,
    }  # fmt: skip
    return kind(ViltConfig(**sizes, **options))


def both(own: Any, other: Any) -> tuple[Any, Any]:
    with torch.no_grad():
        return own(**WORDS, pixel_values=images()), other(**WORDS, pixel_values=images())


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_model_without_heads(qkv_bias: bool, tmp_path: Path) -> None:
    other = theirs(ViltModel, qkv_bias=qkv_bias)
    own, expected = both(import_model(other, tmp_path), other)
    assert difference(own.last_hidden_state, expected.last_hidden_state[:, :8], WORDS["attention_mask"]) < LIMIT
    assert difference(own.pooler_output, expected.pooler_output) < LIMIT
    patches = own.image_last_hidden_state, expected.last_hidden_state[:, 8:]  # ViLT shuffles its patches
    assert difference(patches[0][:, 0], patches[1][:, 0]) < LIMIT
    assert difference(*(x.sort(dim=1).values for x in patches)) < LIMIT


def test_masked_language_modeling(tmp_path: Path) -> None:
    other = theirs(ViltForMaskedLM)
    own, expected = both(import_model(other, tmp_path), other)
    assert difference(own.mlm_logits, expected.logits, WORDS["attention_mask"]) < LIMIT


def test_retrieval(tmp_path: Path) -> None:
    other = theirs(ViltForImageAndTextRetrieval)
    own, expected = both(import_model(other, tmp_path), other)
    assert difference(own.itm_logits[:, 1] - own.itm_logits[:, 0], expected.logits[:, 0]) < LIMIT


def test_question_answering(tmp_path: Path) -> None:
    other = theirs(ViltForQuestionAnswering, id2label=ANSWERS)
    model = import_model(other, tmp_path)
    own, expected = both(model, other)
    assert difference(own.logits, expected.logits) < LIMIT
    assert model.config.labels == [*ANSWERS.values()]


def test_two_images_with_types_of_their_own(tmp_path: Path) -> None:
    other = theirs(ViltForImagesAndTextClassification, num_images=2, modality_type_vocab_size=3, num_labels=2)
    pair = images(8).unflatten(0, (4, 2))
    own = import_model(other, tmp_path)
    with torch.no_grad():
        expected = other(**WORDS, pixel_values=pair).logits
        assert difference(own(**WORDS, pixel_values=pair).logits, expected) < LIMIT
        assert difference(own(**WORDS, pixel_values=pair.flip(1)).logits, expected) > LIMIT


def test_heads_that_can_not_be_expressed_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="classifies tokens, for which mmbert has no head"):
        import_model(theirs(ViltForTokenClassification), tmp_path)
    with pytest.raises(UsageError, match="classifies 3 images of a text; mmbert imports 1 or 2"):
        import_model(theirs(ViltForImagesAndTextClassification, num_images=3, modality_type_vocab_size=4), tmp_path)


def test_vqa_checkpoint_answers_and_is_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The commands a user runs: import, ask, predict and score."""
    other = theirs(ViltForQuestionAnswering, id2label=ANSWERS)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parameter))) * 0.3)
    other.eval().save_pretrained(tmp_path / "vilt")
    tiny_tokenizer().save_pretrained(tmp_path / "vilt")
    settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}
    (tmp_path / "vilt/preprocessor_config.json").write_text(json.dumps(settings))
    main(["import", str(tmp_path / "vilt"), str(tmp_path / "model")])
    assert "fusion.layers" in capsys.readouterr().out

    file, question = tmp_path / "COCO_val2014_000000000001.jpg", "red cat on the car"
    Image.new("RGB", (16, 16), (255, 0, 0)).save(file)
    main(["ask", str(tmp_path / "model"), str(file), question])
    words = tiny_tokenizer()(question, return_tensors="pt")
    pixels = mmbert.load(tmp_path / "model", device="cpu").processor(images=file)["pixel_values"]
    expected = other(**{k: words[k] for k in ("input_ids", "attention_mask")}, pixel_values=pixels).logits[0]
    answer = ANSWERS[int(expected.argmax())]
    said = capsys.readouterr().out
    assert answer in said.splitlines()[0].split(), said

    asked = {"question_id": 7, "image_id": 1, "question": question}
    truth = [{"answer": answer, "answer_id": i} for i in range(10)]
    annotation = {**asked, "answers": truth, "question_type": "what", "answer_type": "other"}
    files = {"questions": [asked], "annotations": [annotation]}
    for name, rows in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({name: rows}))
    images_of = ["--images", str(tmp_path), "--image_names", "COCO_val2014_{:012d}.jpg"]
    questions, results = str(tmp_path / "questions.json"), str(tmp_path / "results.json")
    main(["predict", "vqa", str(tmp_path / "model"), "--questions", questions, *images_of, "--out", results])
    capsys.readouterr()
    annotations = str(tmp_path / "annotations.json")
    main(["score", "vqa", "--questions", questions, "--annotations", annotations, "--results", results])
    assert json.loads(capsys.readouterr().out)["overall"] == 100.0
