"""Imported VisualBERT against transformers, for every head, with padded texts and regions."""

from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.import_parity import LIMIT, difference, import_model, texts
from torch import Tensor
from transformers import (
    VisualBertConfig,
    VisualBertForMultipleChoice,
    VisualBertForPreTraining,
    VisualBertForQuestionAnswering,
    VisualBertForVisualReasoning,
    VisualBertModel,
)

from mmbert.errors import UsageError

SIZES = {
    "vocab_size": 40, "hidden_size": 32, "visual_embedding_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 16, "pad_token_id": 0,
}  # fmt: skip


def theirs(kind: Any, **options: Any) -> Any:
    return kind(VisualBertConfig(**SIZES, **options))


def regions() -> tuple[Tensor, Tensor]:
    """Features of 5 regions, the last 0 to 3 of which are padding."""
    features = torch.randn(4, 5, 24, generator=torch.Generator().manual_seed(2))
    return features, torch.tensor([[1] * 5, [1] * 4 + [0], [1] * 3 + [0] * 2, [1, 1, 0, 0, 0]])


def both(own: Any, other: Any) -> tuple[Any, Any]:
    features, mask = regions()
    words = texts()
    with torch.no_grad():
        return (
            own(**words, pixel_values=features, image_mask=mask),
            other(**words, visual_embeds=features, visual_attention_mask=mask),
        )


def test_model_without_heads(tmp_path: Path) -> None:
    other = theirs(VisualBertModel)
    own, expected = both(import_model(other, tmp_path), other)
    mask = texts()["attention_mask"]
    assert difference(own.last_hidden_state, expected.last_hidden_state[:, :8], mask) < LIMIT
    assert difference(own.image_last_hidden_state, expected.last_hidden_state[:, 8:], regions()[1]) < LIMIT
    assert difference(own.pooler_output, expected.pooler_output) < LIMIT


def test_pretraining_heads(tmp_path: Path) -> None:
    other = theirs(VisualBertForPreTraining)
    own, expected = both(import_model(other, tmp_path), other)
    mask = texts()["attention_mask"]
    assert difference(own.mlm_logits, expected.prediction_logits[:, :8], mask) < LIMIT
    assert difference(own.itm_logits, expected.seq_relationship_logits.flip(1)) < LIMIT, "their class 0 is a match"


@pytest.mark.parametrize("kind", [VisualBertForQuestionAnswering, VisualBertForVisualReasoning])
def test_task_heads(kind: Any, tmp_path: Path) -> None:
    other = theirs(kind, num_labels=3, id2label={0: "no", 1: "two", 2: "yes"})
    model = import_model(other, tmp_path)
    own, expected = both(model, other)
    assert difference(own.logits, expected.logits) < LIMIT
    assert model.config.labels == ["no", "two", "yes"]


def test_heads_that_can_not_be_expressed_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is a VisualBertForMultipleChoice; of VisualBERT mmbert imports"):
        import_model(theirs(VisualBertForMultipleChoice), tmp_path)
    with pytest.raises(UsageError, match="bypass_transformer=True; mmbert has False only"):
        import_model(theirs(VisualBertModel, bypass_transformer=True), tmp_path)
    with pytest.raises(UsageError, match="hidden_act='relu'; mmbert has 'gelu' only"):
        import_model(theirs(VisualBertModel, hidden_act="relu"), tmp_path)
    assert not (tmp_path / "own").exists()


def test_images_are_refused_by_a_model_of_region_features(tmp_path: Path) -> None:
    model = import_model(theirs(VisualBertModel), tmp_path)
    with pytest.raises(UsageError, match=r"this model reads \(B, regions, 24\) features of an object detector"):
        model(pixel_values=torch.zeros(1, 3, 16, 16))
    with pytest.raises(UsageError, match="it has no patches"):
        _ = model.image_encoder.vit.patch_embed
    with pytest.raises(UsageError, match="a run reads images"):
        _ = model.image_encoder.vit.pretrained_cfg
