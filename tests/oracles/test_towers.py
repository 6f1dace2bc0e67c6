"""Late fusion's encoders against plain BERT and plain timm."""

import pytest
import timm
import torch
from tiny import difference, inputs, randomize, tiny_batch, tiny_config
from transformers import BertConfig, BertModel

from mmbert.model import encoders
from mmbert.model.modeling import MMBertModel


@pytest.fixture
def towers() -> MMBertModel:
    """Late fusion of two encoders that have the width of the fusion part already."""
    overrides = {"image_hidden_size": 32, "text_layers": 2, "image_layers": 2}
    model = MMBertModel(tiny_config(fusion="late", **overrides)).eval()
    randomize(model)
    return model


@pytest.mark.parametrize("fused", [False, True])
def test_text_tower_equals_bert(towers: MMBertModel, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "fused_attention_is_faster", lambda device: fused)
    config = BertConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=16,
    )
    bert = BertModel(config, add_pooling_layer=False).eval()
    bert.load_state_dict(towers.text_encoder.bert.state_dict(), strict=True)
    batch = tiny_batch()
    expected = bert(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    real = batch["attention_mask"].bool()
    assert difference(towers.encode_and_fuse(**inputs(batch)).text.hidden_states[real], expected[real]) < 1e-5
    assert difference(towers.encode_text(batch["input_ids"], batch["attention_mask"]).first, expected[:, 0]) < 1e-5


@pytest.mark.parametrize("fused", [False, True])
def test_image_tower_equals_timm(towers: MMBertModel, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "fused_attention_is_faster", lambda device: fused)
    vit = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, depth=2, embed_dim=32, num_heads=2, img_size=16, patch_size=8
    ).eval()
    vit.load_state_dict(towers.image_encoder.vit.state_dict(), strict=True)
    batch = tiny_batch()
    expected = vit.forward_features(batch["pixel_values"])
    fused_image = towers.encode_and_fuse(**inputs(batch)).image
    assert fused_image.mask.all()
    assert difference(fused_image.hidden_states, expected) < 1e-5
    assert difference(towers.encode_image(batch["pixel_values"]).first, expected[:, 0]) < 1e-5


def test_towers_meet_in_the_pooled_vector_only(towers: MMBertModel) -> None:
    """What late fusion does at the end, written out."""
    fused = towers.encode_and_fuse(**inputs(tiny_batch()))
    joined = torch.cat([fused.text.hidden_states[:, 0], fused.image.hidden_states[:, 0]], dim=1)
    hidden = torch.nn.functional.gelu(towers.fusion.mlp[0](joined))
    assert difference(fused.pooled, torch.tanh(towers.fusion.pooler.dense(hidden))) < 1e-6
