"""Imported FLAVA against transformers, with padded texts: all outputs that mmbert has."""

from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.import_parity import LIMIT, difference, images, import_model, texts
from transformers import FlavaConfig, FlavaForPreTraining, FlavaModel
from transformers.utils.constants import OPENAI_CLIP_MEAN

import mmbert
from mmbert.errors import UsageError

WORDS = texts()


def theirs(kind: Any, **options: Any) -> Any:
    """A model of width 32 with 2 layers in each part."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    parts: dict[str, dict[str, Any]] = {
        "text": {**sizes, "vocab_size": 40, "max_position_embeddings": 16},
        "image": {**sizes, "image_size": 16, "patch_size": 8, "vocab_size": 20},
        "multimodal": {**sizes, "num_hidden_layers": 3, "intermediate_size": 64},
    }
    for part, changes in options.items():
        parts[part] |= changes
    codebook = {"num_blocks_per_group": 1, "hidden_size": 8, "vocab_size": 20}
    configs: Any = {f"{name}_config": part for name, part in parts.items()}
    configs |= {"image_codebook_config": codebook, "hidden_size": 32, "projection_dim": 24}
    return kind(FlavaConfig(**configs))


@torch.no_grad()
def test_model_without_heads(tmp_path: Path) -> None:
    other = theirs(FlavaModel)
    model = import_model(other, tmp_path)
    expected = other(**WORDS, pixel_values=images())
    own = model.mmbert(**WORDS, pixel_values=images())
    patches, joint = expected.image_embeddings.shape[1], expected.multimodal_embeddings
    assert difference(own.pooler_output, expected.multimodal_output.pooler_output) < LIMIT
    assert difference(own.image_last_hidden_state, joint[:, 1 : 1 + patches]) < LIMIT
    assert difference(own.last_hidden_state, joint[:, 1 + patches :], WORDS["attention_mask"]) < LIMIT
    text, image = model.mmbert.encode_text(**WORDS), model.mmbert.encode_image(images())
    assert difference(text.hidden_states, expected.text_embeddings, WORDS["attention_mask"]) < LIMIT
    assert difference(image.hidden_states, expected.image_embeddings) < LIMIT
    itc = model.objectives["itc"]
    for own_vector, features in (
        (itc.embed_text(text), other.get_text_features(**WORDS)),
        (itc.embed_image(image), other.get_image_features(images())),
    ):
        vectors = torch.nn.functional.normalize(features.pooler_output[:, 0], dim=-1)
        assert difference(own_vector, vectors) < LIMIT


@torch.no_grad()
def test_pretraining_heads(tmp_path: Path) -> None:
    other = theirs(FlavaForPreTraining)
    model = import_model(other, tmp_path)
    own = model(**WORDS, pixel_values=images())
    expected = other(**WORDS, pixel_values=images(), return_loss=False)
    assert mmbert.load(tmp_path / "own", device="cpu").processor.image_settings.mean == tuple(OPENAI_CLIP_MEAN)
    assert difference(own.mlm_logits, expected.mmm_text_logits, WORDS["attention_mask"]) < LIMIT
    assert difference(own.itm_logits, expected.itm_logits) < LIMIT
    assert difference(own.logits_per_text, expected.contrastive_logits_per_text) < LIMIT
    assert difference(own.logits_per_image, expected.contrastive_logits_per_image) < LIMIT


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": {"hidden_act": "relu"}}, "config.json has hidden_act='relu'; mmbert has 'gelu' only"),
        ({"multimodal": {"use_cls_token": False}}, "config.json has use_cls_token=False; mmbert has True only"),
        ({"image": {"hidden_size": 48}}, r"widths 32 \(text\), 48 \(image\), 32 \(fusion\); mmbert imports FLAVA"),
    ],
)
def test_what_can_not_be_expressed_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        import_model(theirs(FlavaModel, **options), tmp_path)
