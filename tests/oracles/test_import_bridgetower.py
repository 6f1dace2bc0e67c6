"""Imported BridgeTower against transformers, for every head, with padded texts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.import_parity import LIMIT, difference, images, import_model, texts
from transformers import (
    BridgeTowerConfig,
    BridgeTowerForContrastiveLearning,
    BridgeTowerForImageAndTextRetrieval,
    BridgeTowerForMaskedLM,
    BridgeTowerModel,
)

from mmbert.errors import UsageError

WORDS = texts(pad=1)


def theirs(kind: Any, *, image_width: int = 64, **options: Any) -> Any:
    sizes = {"hidden_size": 64, "num_hidden_layers": 3}
    text = {**sizes, "vocab_size": 40, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 18}
    vision = {"hidden_size": image_width, "num_hidden_layers": 3, "image_size": 16, "patch_size": 8}
    config = BridgeTowerConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, text_config=text, vision_config=vision, **options
    )
    config.contrastive_hidden_size = 16  # read by the contrastive model, and saved by the published checkpoint alone
    config.logit_scale_init_value = 2.0
    return kind(config)


def both(own: Any, other: Any) -> tuple[Any, Any]:
    with torch.no_grad():
        return own(**WORDS, pixel_values=images()), other(**WORDS, pixel_values=images())


@pytest.mark.parametrize("image_width", [64, 128])
def test_model_without_heads(image_width: int, tmp_path: Path) -> None:
    other = theirs(BridgeTowerModel, image_width=image_width)
    own, expected = both(import_model(other, tmp_path), other)
    assert difference(own.last_hidden_state, expected.text_features, WORDS["attention_mask"]) < LIMIT
    assert difference(own.image_last_hidden_state, expected.image_features) < LIMIT
    assert difference(own.pooler_output, expected.pooler_output) < LIMIT


@pytest.mark.parametrize("tied", [False, True])
def test_masked_language_modeling(tied: bool, tmp_path: Path) -> None:
    other = theirs(BridgeTowerForMaskedLM, tie_word_embeddings=tied)
    model = import_model(other, tmp_path)
    own, expected = both(model, other)
    assert difference(own.mlm_logits, expected.logits, WORDS["attention_mask"]) < LIMIT
    assert model.config.objectives["mlm"].get("tied", True) is tied


def test_image_text_matching(tmp_path: Path) -> None:
    other = theirs(BridgeTowerForImageAndTextRetrieval)
    own, expected = both(import_model(other, tmp_path), other)
    assert difference(own.itm_logits, expected.logits) < LIMIT


def test_contrastive_heads(tmp_path: Path) -> None:
    other = theirs(BridgeTowerForContrastiveLearning)
    own, expected = both(import_model(other, tmp_path), other)
    scale = other.logit_scale.exp()
    assert difference(own.logits_per_text, scale * expected.text_embeds @ expected.image_embeds.T) < LIMIT


def test_options_that_can_not_be_expressed_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"config\.json has link_tower_type='interpolate'; mmbert has 'add' only"):
        import_model(theirs(BridgeTowerModel, link_tower_type="interpolate"), tmp_path)
