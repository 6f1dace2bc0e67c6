"""One-way cross-attention against the multimodal text encoder of transformers' BLIP, with the same weights."""

import torch
from tiny import difference, random_tokens, randomize, tiny_config
from transformers.models.blip.configuration_blip import BlipTextConfig
from transformers.models.blip.modeling_blip_text import BlipTextModel

from mmbert.model.fusion.hybrid_cross import HybridCrossFusion

# Parts of `CrossAttentionLayer` and their names in BLIP's text layers.
BLIP_NAMES = {
    **{f"attention.{x}": f"attention.self.{x}" for x in ("query", "key", "value")},
    "attention.output": "attention.output.dense",
    "attention.norm": "attention.output.LayerNorm",
    **{f"cross_attention.{x}": f"crossattention.self.{x}" for x in ("query", "key", "value")},
    "cross_attention.output": "crossattention.output.dense",
    "cross_attention.norm": "crossattention.output.LayerNorm",
    "feed_forward.up": "intermediate.dense",
    "feed_forward.down": "output.dense",
    "feed_forward.norm": "output.LayerNorm",
}


def fusion() -> HybridCrossFusion:
    module = HybridCrossFusion(tiny_config(fusion_layers=2)).eval()
    randomize(module)
    return module


def blip(own: HybridCrossFusion) -> BlipTextModel:
    """BLIP's text model with the weights of `own`; its embeddings are not used."""
    config = BlipTextConfig(
        vocab_size=40,
        hidden_size=32,
        encoder_hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        layer_norm_eps=1e-12,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        is_decoder=True,  # which only adds cross-attention; the call below turns the causal mask off
        attn_implementation="eager",
        **{f"{token}_token_id": 0 for token in ("bos", "eos", "sep")},
    )
    theirs = BlipTextModel(config).eval()
    state, mine = theirs.state_dict(), own.state_dict()
    pairs = {
        f"layers.{i}.{a}": f"encoder.layer.{i}.{b}" for i in range(2) for a, b in BLIP_NAMES.items()
    } | {"pooler.dense": "pooler.dense"}  # fmt: skip
    for a, b in pairs.items():
        for kind in ("weight", "bias"):
            assert state[f"{b}.{kind}"].shape == mine[f"{a}.{kind}"].shape
            state[f"{b}.{kind}"] = mine[f"{a}.{kind}"]
    theirs.load_state_dict(state)
    return theirs


def test_cross_fusion_equals_blip() -> None:
    own = fusion()
    text = random_tokens([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], 32, dtype=torch.float32)
    image = random_tokens([[1, 1, 1]] * 3, 32, seed=1, dtype=torch.float32)  # BLIP pads no images
    expected = blip(own)(
        encoder_embeds=text.hidden_states,
        attention_mask=text.mask.long(),
        encoder_hidden_states=image.hidden_states,
        is_decoder=False,
    )
    got = own(text, image)
    assert difference(got.text.hidden_states[text.mask], expected.last_hidden_state[text.mask]) < 1e-5
    assert difference(got.pooled, expected.pooler_output) < 1e-5


def test_image_stays_as_its_encoder_left_it() -> None:
    text, image = random_tokens([[1, 1], [1, 0]], 32), random_tokens([[1, 1, 1]] * 2, 32, seed=1)
    module = fusion().double()
    assert torch.equal(module(text, image).image.hidden_states, image.hidden_states)
    other = image._replace(hidden_states=image.hidden_states.flip(0))
    assert not torch.allclose(module(text, other).pooled, module(text, image).pooled), "yet it is read"
