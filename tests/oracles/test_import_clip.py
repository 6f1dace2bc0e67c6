"""Imported CLIP against transformers, with padded texts, and its use with its own kind of tokenizer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.import_parity import LIMIT, difference, images, import_model, texts
from tiers import FULL
from tiny import tiny_examples
from transformers import CLIPConfig, CLIPForImageClassification, CLIPModel, CLIPTokenizer

import mmbert
from mmbert.cli.main import main
from mmbert.errors import UsageError

END = 39
"""End of text, the last of the vocabulary, with which OpenAI's tokenizer also pads."""


def theirs(kind: Any = CLIPModel, *, act: str = "quick_gelu", end: int = END, vocabulary: int = 40) -> Any:
    """A model with texts of width 32 and images of width 48."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "hidden_act": act}
    ids = {"bos_token_id": 1, "eos_token_id": end, "pad_token_id": 1}
    text = {**sizes, **ids, "hidden_size": 32, "vocab_size": vocabulary, "max_position_embeddings": 12}
    vision = {**sizes, "hidden_size": 48, "image_size": 16, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    return kind(config)


def padded_texts() -> dict[str, torch.Tensor]:
    """Random texts that end with `END`, and are padded with it."""
    words = texts(vocabulary=END, pad=END)
    last = words["attention_mask"].sum(dim=1) - 1
    words["input_ids"][torch.arange(4), last] = END
    return words


@pytest.mark.parametrize(("act", "end"), [("quick_gelu", END), ("gelu", 2)])  # 2: files of before 2023
@torch.no_grad()
def test_contrastive(act: str, end: int, tmp_path: Path) -> None:
    other, words = theirs(act=act, end=end), padded_texts()
    model = import_model(other, tmp_path)
    own, expected = model(**words, pixel_values=images()), other(**words, pixel_values=images())
    assert difference(own.logits_per_text, expected.logits_per_text) < LIMIT
    assert difference(own.logits_per_image, expected.logits_per_image) < LIMIT
    itc, body = model.objectives["itc"], model.mmbert
    tokens = body.encode_text(**words)
    assert difference(itc.embed_text(tokens), expected.text_embeds) < LIMIT
    assert difference(itc.embed_image(body.encode_image(images())), expected.image_embeds) < LIMIT
    states, behind = expected.text_model_output.last_hidden_state[:, 1:], words["attention_mask"][:, 1:]
    assert difference(tokens.hidden_states[:, 1:, :32], states, behind) < LIMIT


def clip_tokenizer() -> CLIPTokenizer:
    """A tokenizer of CLIP's kind: byte-level BPE with tokens for begin and end of a text, without [MASK]."""
    letters = [*"abcdeghilnortu"]
    words = ["re", "red</w>", "ca", "cat</w>", "a</w>", "d</w>", "t</w>"]
    vocabulary = {word: i for i, word in enumerate([*letters, *words, "<|startoftext|>", "<|endoftext|>"])}
    merges: Any = [("r", "e"), ("re", "d</w>"), ("c", "a"), ("ca", "t</w>")]
    return CLIPTokenizer(vocabulary, merges)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An imported CLIP with its own tokenizer."""
    tokenizer = clip_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    other = theirs(end=len(tokenizer) - 1, vocabulary=len(tokenizer))
    import_model(other, tmp_path, tokenizer=str(tmp_path / "tokenizer"))
    return tmp_path


@torch.no_grad()
def test_texts_and_images_through_the_loaded_model(folder: Path) -> None:
    examples = tiny_examples(folder, [("red cat",), ("a cat",)])
    files = [example.image for example in examples]
    model, tokenizer = mmbert.load(folder / "own", device="cpu"), clip_tokenizer()
    assert model.processor.encode("a red cat") == tokenizer("a red cat")["input_ids"]
    other = CLIPModel.from_pretrained(folder / "theirs").eval()
    captions = ["a red cat", "cat"]
    found = model.embed(images=files, texts=captions)
    pixels = model.processor(images=files)["pixel_values"]
    expected = other(**tokenizer(captions, padding=True, return_tensors="pt"), pixel_values=pixels)
    assert difference(found.texts, expected.text_embeds) < LIMIT
    assert difference(found.images, expected.image_embeds) < LIMIT
    matches = model.match(files[0], captions)
    cosines = (expected.image_embeds @ expected.text_embeds.T)[0].tolist()
    assert matches.kind == "cosine" and matches.scores == pytest.approx(cosines, abs=LIMIT)


def test_what_masks_words_is_refused_with_a_sentence(folder: Path) -> None:
    (example,) = tiny_examples(folder, [("red cat",)])
    model = mmbert.load(folder / "own", device="cpu")
    with pytest.raises(UsageError, match="has no mask_token, so no word can be masked"):
        model.explain(example.image, "None of the cats")


def captions(folder: Path) -> dict[str, Any]:
    """Options of images with captions."""
    examples = tiny_examples(folder, [("red cat",), ("a cat",), ("a red cat",), ("cat",)])
    rows = [f"{example.image.name},{example.captions[0]}" for example in examples]
    (folder / "a.csv").write_text("\n".join(["image,caption", *rows]))
    return {"format": "csv", "annotations": str(folder / "a.csv"), "images": str(folder)}


def test_evaluation_of_retrieval(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [f"--{name}={value}" for name, value in captions(folder).items()]
    main(["evaluate", "retrieval", str(folder / "own"), *options, "--scorer", "itc"])
    assert "4 images, 4 texts" in capsys.readouterr().out


def fit(folder: Path, objectives: dict[str, Any]) -> Any:
    """A run of one step that starts from the imported model."""
    return mmbert.fit(
        data={**captions(folder), "batch_size": 2, "num_workers": 0, "max_text_length": 12},
        model={"pretrained": str(folder / "own"), "objectives": objectives},
        trainer={"default_root_dir": str(folder), "max_steps": 1, "max_epochs": -1, "precision": "32-true"},
        name="run", threads=1,
    )  # fmt: skip


def test_training_with_masked_words_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"the objectives mlm read masked texts, but data.tokenizer='.*' has no mask"):
        fit(folder, {"mlm": 1.0, "itc": {"embedding_size": 24}})


@pytest.mark.skipif(not FULL, reason="a training run, which takes seconds; MMBERT_FULL=1 runs it")
def test_training_goes_on(folder: Path) -> None:
    before = mmbert.load(folder / "own", device="cpu").model.state_dict()
    after = fit(folder, {"itc": {"embedding_size": 24}}).model.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("text_encoder.clip.encoder" in name for name in changed)


def test_a_classifier_of_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="lacks one of the projections text_projection and visual_projection"):
        import_model(theirs(CLIPForImageClassification), tmp_path)
