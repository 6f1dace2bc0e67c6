"""Early fusion against transformers' VisualBERT, with the same weights."""

import pytest
import torch
from tiny import BERT_NAMES, difference, random_tokens, randomize, tiny_batch, tiny_config
from transformers import VisualBertConfig, VisualBertModel

from mmbert.model.modeling import MMBertModel


def visualbert(own: MMBertModel) -> VisualBertModel:
    """VisualBERT with the weights of `own`, whose image features are 24 wide."""
    config = VisualBertConfig(
        vocab_size=40,
        hidden_size=32,
        visual_embedding_dim=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=16,
        pad_token_id=0,  # not VisualBERT's default
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        layer_norm_eps=1e-12,
    )
    theirs = VisualBertModel(config).eval()
    state, mine = theirs.state_dict(), own.state_dict()
    bert = "text_encoder.bert.embeddings"
    for name in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
        state[f"embeddings.{name}.weight"] = mine[f"{bert}.{name}.weight"]
    pairs = {f"{bert}.LayerNorm": "embeddings.LayerNorm", "image_projection": "embeddings.visual_projection"}
    pairs["fusion.pooler.dense"] = "pooler.dense"
    for layer in range(2):
        pairs |= {f"fusion.layers.{layer}.{a}": f"encoder.layer.{layer}.{b}" for a, b in BERT_NAMES.items()}
    for a, b in pairs.items():
        for kind in ("weight", "bias"):
            state[f"{b}.{kind}"] = mine[f"{a}.{kind}"]
    # VisualBERT adds a type vector and the vector of position 0 to every visual token; here the sum is one vector.
    half = torch.randn(32, generator=torch.Generator().manual_seed(9)) * 0.1
    state["embeddings.visual_token_type_embeddings.weight"][1] = half
    state["embeddings.visual_position_embeddings.weight"][0] = mine["fusion.image_type"] - half
    theirs.load_state_dict(state)
    return theirs


@pytest.mark.parametrize("length", [8, 5])
def test_early_fusion_equals_visualbert(length: int) -> None:
    own = MMBertModel(tiny_config(fusion="early", text_layers=0, fusion_layers=2)).eval()
    randomize(own)
    # VisualBERT has one LayerNorm for both modalities, mmbert one for each.
    own.fusion.image_norm.load_state_dict(own.text_encoder.bert.embeddings.LayerNorm.state_dict())
    batch = tiny_batch(length=length)
    features = random_tokens(
        [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]], 24, dtype=torch.float32
    )
    text = own.encode_text(batch["input_ids"], batch["attention_mask"])
    assert not text.mask.all()
    got = own.fuse(text, features._replace(hidden_states=own.image_projection(features.hidden_states)))
    expected = visualbert(own)(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        visual_embeds=features.hidden_states,
        visual_attention_mask=features.mask.long(),
    )
    joint = torch.cat([got.text.hidden_states, got.image.hidden_states], dim=1)
    real = torch.cat([text.mask, features.mask], dim=1)
    assert difference(joint[real], expected.last_hidden_state[real]) < 1e-5
    assert difference(got.pooled, expected.pooler_output) < 1e-5
