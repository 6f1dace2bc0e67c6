"""Imported BLIP for retrieval against transformers, with padded texts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.import_parity import LIMIT, difference, images, import_model, texts
from transformers import BlipConfig, BlipForConditionalGeneration, BlipForImageTextRetrieval

import mmbert
from mmbert.errors import UsageError
from mmbert.evaluation.encoding import pack, unpack

WORDS = texts()


def theirs(kind: Any = BlipForImageTextRetrieval, *, image_width: int = 32) -> Any:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    text = {**sizes, "hidden_size": 32, "vocab_size": 40, "max_position_embeddings": 18, "bos_token_id": 2}
    vision = {**sizes, "hidden_size": image_width, "image_size": 16, "patch_size": 8}
    return kind(BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=24))


@torch.no_grad()
def test_retrieval(tmp_path: Path) -> None:
    other, pixels = theirs(), images()
    model = import_model(other, tmp_path)
    own = model(**WORDS, pixel_values=pixels)
    assert difference(own.itm_logits, other(**WORDS, pixel_values=pixels).itm_score) < LIMIT
    alone = other(**WORDS, pixel_values=pixels, use_itm_head=False)
    scale = model.objectives["itc"].scale
    assert difference(own.logits_per_image / scale, alone.itm_score) < LIMIT
    text = model.mmbert.encode_text(**WORDS)
    assert difference(text.hidden_states, alone.question_embeds, WORDS["attention_mask"]) < LIMIT
    without_image = model.mmbert(**WORDS).last_hidden_state
    assert difference(without_image, alone.question_embeds, WORDS["attention_mask"]) < LIMIT
    again = unpack(pack(text), text.mask, 32, model.mmbert.text_encoder.width)
    assert torch.equal(again.intermediate[0], text.intermediate[0])


def test_both_heads_rank_through_the_loaded_model(tmp_path: Path) -> None:
    import_model(theirs(), tmp_path)
    model = mmbert.load(tmp_path / "own", device="cpu")
    image = torch.zeros(16, 16, 3, dtype=torch.uint8).numpy()
    assert model.match(image, ["a cat", "a red dog"]).kind == "probability"
    vectors = model.embed(texts=["a cat", "a red dog"]).texts
    assert vectors is not None and difference(vectors[:1], vectors[1:]) > 1e-3


@torch.no_grad()
def test_rows_without_image_skip_cross_attention(tmp_path: Path) -> None:
    body = import_model(theirs(), tmp_path).mmbert
    text, image = body.encode_text(**WORDS), body.encode_image(images())
    mask = image.mask.clone()
    mask[1] = False
    mixed = body.fuse(text, image._replace(mask=mask)).text.hidden_states
    assert difference(mixed[1], text.hidden_states[1]) < LIMIT
    assert difference(mixed[0], body.fuse(text, image).text.hidden_states[0]) < LIMIT


def test_what_can_not_be_expressed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no itm_head; of BLIP mmbert imports BlipForImageTextRetrieval"):
        import_model(theirs(BlipForConditionalGeneration), tmp_path / "captions")
    with pytest.raises(UsageError, match="of width 32, reads an image encoder of width 48"):
        import_model(theirs(image_width=48), tmp_path / "large")
