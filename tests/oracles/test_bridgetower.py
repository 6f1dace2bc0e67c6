"""Bridged fusion against the cross-modal half of transformers' BridgeTower, with the same weights."""

import pytest
import torch
from oracles.test_blip import BLIP_NAMES
from tiny import difference, inputs, random_tokens, randomize, tiny_batch, tiny_config
from torch import Tensor, nn
from transformers import BridgeTowerConfig
from transformers.models.bridgetower.configuration_bridgetower import BridgeTowerTextConfig
from transformers.models.bridgetower.modeling_bridgetower import BridgeTowerBertCrossLayer, BridgeTowerLinkTower

from mmbert.model.fusion.hybrid_bridge import Bridges, HybridBridgeFusion
from mmbert.model.layers import CrossAttentionLayer
from mmbert.model.modeling import MMBertModel
from mmbert.model.tokens import Tokens

DEPTHS = {"text_layers": 5, "image_layers": 4, "fusion_layers": 3}


def cross_layer(own: CrossAttentionLayer) -> BridgeTowerBertCrossLayer:
    """BridgeTower's cross-modal layer with the weights of `own`."""
    config = BridgeTowerTextConfig(
        hidden_size=32, num_attention_heads=4, intermediate_size=48, layer_norm_eps=1e-12, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, add_cross_attention=True, is_decoder=True, attn_implementation="eager",
    )  # fmt: skip
    theirs = BridgeTowerBertCrossLayer(config).double().eval()
    mine = own.state_dict()
    pairs = {f"{b}.{kind}": mine[f"{a}.{kind}"] for a, b in BLIP_NAMES.items() for kind in ("weight", "bias")}
    theirs.load_state_dict(pairs)
    return theirs


def link(norm: nn.Module) -> BridgeTowerLinkTower:
    """BridgeTower's bridge with the weights of `norm`."""
    config = BridgeTowerConfig(hidden_size=32, layer_norm_eps=1e-12, link_tower_type="add")
    theirs = BridgeTowerLinkTower(config).double()
    theirs.LayerNorm.load_state_dict(norm.state_dict())
    return theirs


def hidden(mask: Tensor) -> Tensor:
    return (~mask).double()[:, None, None, :] * torch.finfo(torch.float64).min


def test_bridged_fusion_equals_bridgetower() -> None:
    own = HybridBridgeFusion(tiny_config(**DEPTHS, text_hidden_size=16)).double().eval()
    randomize(own)
    text, image = random_tokens([[1, 1, 1], [1, 0, 0]], 32), random_tokens([[1, 1], [1, 1]], 32, seed=1)
    text = text._replace(intermediate=tuple(random_tokens([[1] * 3] * 2, 16, seed=s).hidden_states for s in (2, 3)))
    image = image._replace(intermediate=tuple(random_tokens([[1] * 2] * 2, 24, seed=s).hidden_states for s in (4, 5)))

    def transformed(bridges: Bridges, tokens: Tokens) -> list[Tensor]:
        normed = [(x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True, correction=0) for x in tokens.intermediate]
        return [f(x) for f, x in zip(bridges.projections, [*normed, tokens.hidden_states], strict=True)]

    read = {"text": transformed(own.text_bridges, text), "image": transformed(own.image_bridges, image)}
    x, y = own.text_bridges.norms[0](read["text"][0]), own.image_bridges.norms[0](read["image"][0])
    for i in range(3):
        if i > 0:
            x = link(own.text_bridges.norms[i])(read["text"][i], x, None)
            y = link(own.image_bridges.norms[i])(read["image"][i], y, None)
        of_text, of_image = hidden(text.mask), hidden(image.mask)
        x, y = (
            cross_layer(own.text_layers[i])(x, y, attention_mask=of_text, encoder_attention_mask=of_image)[0],
            cross_layer(own.image_layers[i])(y, x, attention_mask=of_image, encoder_attention_mask=of_text)[0],
        )
    got = own(text, image)
    assert difference(got.text.hidden_states[text.mask], x[text.mask]) < 1e-10
    assert difference(got.image.hidden_states, y) < 1e-10
    assert difference(got.pooled, own.pooler(x[:, 0], y[:, 0])) < 1e-10


@pytest.mark.parametrize(
    ("layers", "fusion_layers", "lower", "bridges"),
    [
        (12, 6, (7, 8, 9, 10, 11), 6),  # BridgeTower's own, besides the output of layer 12
        (5, 3, (3, 4), 3),
        (3, 3, (1, 2), 3),
        (2, 3, (1,), 2),  # the third has none
        (1, 3, (), 1),  # the output alone
        (0, 3, (), 1),  # the embeddings
        (4, 1, (), 1),
        (4, 0, (), 0),
    ],
)
def test_fusion_layers_read_the_upper_unimodal_layers(
    layers: int, fusion_layers: int, lower: tuple[int, ...], bridges: int
) -> None:
    fusion = HybridBridgeFusion(tiny_config(text_layers=layers, image_layers=2, fusion_layers=fusion_layers))
    assert fusion.reads_text_layers == lower
    assert len(fusion.text_bridges.projections) == bridges


def test_a_lower_layer_alone_changes_the_outcome() -> None:
    """Layers 3 and 4 of five are read besides the output; in a full model their outputs are what arrives."""
    torch.manual_seed(0)
    model = MMBertModel(tiny_config(fusion="hybrid_bridge", **DEPTHS, text_hidden_size=16)).double().eval()
    randomize(model)
    batch = inputs(tiny_batch(dtype=torch.float64))
    text, image = (
        model.encode_text(batch["input_ids"], batch["attention_mask"]),
        model.encode_image(batch["pixel_values"]),
    )
    assert [x.shape[-1] for x in text.intermediate + image.intermediate] == [16, 16, 24, 24]
    own = model.fuse(text, image)
    assert torch.equal(own.pooled, model.encode_and_fuse(**batch).pooled)
    for i in range(2):
        layers = list(text.intermediate)
        layers[i] = layers[i].flip(0)
        moved = model.fuse(text._replace(intermediate=tuple(layers)), image)
        assert (moved.pooled - own.pooled).abs().amax() > 1e-4
        layers = list(image.intermediate)
        layers[i] = layers[i].flip(0)
        moved = model.fuse(text, image._replace(intermediate=tuple(layers)))
        assert (moved.text.hidden_states - own.text.hidden_states).abs().amax() > 1e-4


def test_width_of_the_image_encoder_is_filled_in() -> None:
    model = MMBertModel(
        tiny_config(fusion="hybrid_bridge", **DEPTHS, image_hidden_size=None, image_num_attention_heads=None)
    )
    assert model.config.image_hidden_size == 192, "vit_tiny's own"
    assert model.fusion.image_bridges.projections[0].in_features == 192
