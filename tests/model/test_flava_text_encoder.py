"""Text encoder of FLAVA and early fusion with a class token: padding, absent modalities, and what all models do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import difference, inputs, randomize, tiny_batch, tiny_config

from mmbert.errors import UsageError
from mmbert.model.flava_text_encoder import FlavaTextEncoder
from mmbert.model.modeling import MMBertForPreTraining, MMBertModel
from mmbert.model.tokens import Reads, Tokens

FLAVA: dict[str, Any] = {
    "text_tower": "flava", "text_layers": 2, "image_layers": 2, "fusion": "early", "fusion_norm": "pre",
    "fusion_final_norm": True, "early_image_norm": False, "early_class_token": True, "early_inputs": "last_layer",
}  # fmt: skip


def model_with(kind: Any = MMBertForPreTraining, **overrides: Any) -> Any:
    model = kind(tiny_config(**{**FLAVA, **overrides}))
    randomize(model)
    return model.eval()


@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_padding_changes_no_state(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmbert.model.layers.fused_attention_is_faster", lambda device: fused)
    model, batch = FlavaTextEncoder(tiny_config(**FLAVA)).double().eval(), tiny_batch(4)
    got = model(batch["input_ids"], batch["attention_mask"], layers=(0, 1, 2))
    for row, length in enumerate(batch["attention_mask"].sum(dim=1)):
        alone = model(batch["input_ids"][row : row + 1, :length], layers=(0, 1, 2))
        for some, one in zip((got[0], *got.intermediate), (alone[0], *alone.intermediate), strict=True):
            assert difference(some[row, :length], one[0]) < 1e-12
    assert torch.equal(got.hidden_states, model.norm(got.intermediate[2])) and not batch["attention_mask"].all()


def test_every_parameter_is_trained_and_survives_saving(tmp_path: Path) -> None:
    model = model_with().train()
    model.gradient_checkpointing_enable()
    model(**tiny_batch(), generator=torch.Generator().manual_seed(0)).loss.backward()
    unused = {n for n, p in model.mmbert.named_parameters() if p.grad is None or not p.grad.abs().sum()}
    assert not unused
    model.eval().save_pretrained(tmp_path)
    again = MMBertForPreTraining.from_pretrained(tmp_path).eval()
    batch = inputs(tiny_batch())
    for name in ("mlm_logits", "itm_logits", "logits_per_text"):
        assert torch.equal(model(**batch)[name], again(**batch)[name])


@torch.no_grad()
def test_early_reads_the_last_layers_and_itc_the_output() -> None:
    """By hand: one sequence of class token, text and image, each mapped from the states before the last LayerNorm."""
    model, batch = model_with(MMBertModel), inputs(tiny_batch(1))
    text, image = model.encode_text(*[*batch.values()][:2]), model.encode_image(batch["pixel_values"])
    fusion = model.fusion
    assert torch.equal(text.hidden_states, model.text_encoder.norm(text.intermediate[0]))
    states = [fusion.class_token[None, None], fusion.text_input(text.intermediate[0])]
    states.append(fusion.image_input(image.intermediate[0]) + fusion.image_type)
    layer = fusion.layers[0]
    joint = torch.cat(states, dim=1)
    mask = torch.ones(joint.shape[:2], dtype=torch.bool)

    expected = layer(Tokens(joint, mask)).hidden_states
    output = model(**batch)
    assert difference(output.pooler_output, fusion.pooler(expected[:, 0])) < 1e-6
    assert difference(output.last_hidden_state, expected[:, 1:9]) < 1e-6
    assert difference(output.image_last_hidden_state, expected[:, 9:]) < 1e-6


@torch.no_grad()
def test_what_is_not_read_is_not_computed_and_a_modality_may_be_absent() -> None:

    model, batch = model_with(MMBertModel), inputs(tiny_batch())
    text, image = model.encode_text(*[*batch.values()][:2]), model.encode_image(batch["pixel_values"])
    everything = model.fuse(text, image)
    assert difference(model.fuse(text, image, reads=Reads(pooled=True)).pooled, everything.pooled) < 1e-6
    only_text = model.fuse(text, image, reads=Reads(text=True)).text
    assert difference(only_text.hidden_states, everything.text.hidden_states) < 1e-6
    pixels = batch.pop("pixel_values")
    assert model(**batch).image_last_hidden_state.shape == (4, 0, 32)
    alone = model(pixel_values=pixels)
    assert alone.last_hidden_state.shape == (4, 0, 32) and alone.pooler_output.isfinite().all()


@pytest.mark.parametrize("depth", ["all", 1])
@torch.no_grad()
def test_the_encoder_cache_holds_the_last_layer(depth: str | int) -> None:
    model, batch = model_with(MMBertModel), tiny_batch()
    expected = model.encode_image(batch["pixel_values"])
    model.image_encoder.freeze(depth)
    layers = model.fusion.reads_image_layers
    states = model.image_encoder.encode_frozen(batch["pixel_values"], depth, layers=layers)
    found = model.encode_batch_images({"image_hidden_states": states})
    assert torch.equal(found.hidden_states, expected.hidden_states)
    assert torch.equal(found.intermediate[0], expected.intermediate[0])


def test_hidden_states_and_attentions() -> None:
    output = model_with(MMBertModel)(**inputs(tiny_batch()), output_hidden_states=True, output_attentions=True)
    assert [tuple(x.shape) for x in output.hidden_states[:3]] == [(4, 8, 32)] * 3
    assert [tuple(x.shape) for x in output.attentions] == [(4, 4, 8, 8)] * 2 + [(4, 2, 5, 5)] * 2 + [(4, 4, 14, 14)]
    assert difference(output.attentions[0].sum(dim=-1), torch.ones(4, 4, 8)) < 1e-6


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"text_hidden_act": "relu"}, "text_hidden_act='relu': text_tower='flava' has gelu only"),
        ({"text_layers": 0}, "early_inputs=last_layer: both encoders need at least 1 layer, but text_layers=0"),
        ({"early_pool": "last"}, "early_pool=last: with early_class_token the class token is pooled"),
        ({"early_inputs": "first"}, "early_inputs='first'; allowed are output, last_layer"),
    ],
)
def test_what_it_can_not_do_is_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        model_with(MMBertModel, **overrides)


def test_too_long_texts_are_refused() -> None:
    with pytest.raises(UsageError, match="input_ids has 17 tokens, but max_position_embeddings=16"):
        FlavaTextEncoder(tiny_config(**FLAVA))(torch.ones(1, 17, dtype=torch.int64))
