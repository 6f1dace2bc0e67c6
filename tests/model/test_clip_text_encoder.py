"""Text encoder of CLIP: causal attention, padding, pooling, and what all encoders do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCAB, difference, randomize, tiny_batch, tiny_config

from mmbert.errors import UsageError
from mmbert.model.clip_text_encoder import ClipTextEncoder
from mmbert.model.initialization import build_model
from mmbert.model.modeling import MMBertForPreTraining, MMBertModel
from mmbert.model.options import ModelOptions


def encoder(**overrides: Any) -> ClipTextEncoder:
    built = ClipTextEncoder(tiny_config(text_tower="clip", text_layers=2, **overrides))
    randomize(built)
    return built.double().eval()


@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_padding_changes_no_state(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmbert.model.clip_text_encoder.fused_attention_is_faster", lambda device: fused)
    model, batch = encoder(), tiny_batch(4)
    got = model(batch["input_ids"], batch["attention_mask"], layers=(0, 1))
    for row, length in enumerate(batch["attention_mask"].sum(dim=1)):
        alone = model(batch["input_ids"][row : row + 1, :length], layers=(0, 1))
        for some, one in zip((got[0], *got.intermediate), (alone[0], *alone.intermediate), strict=True):
            assert difference(some[row, :length], one[0]) < 1e-12
    assert not batch["attention_mask"].all()


@torch.no_grad()
def test_a_token_sees_those_before_it_and_the_last_is_first() -> None:
    model, ids = encoder(), torch.randint(5, VOCAB, (1, 8))
    changed = ids.clone()
    changed[0, 5] += 1 if ids[0, 5] < VOCAB - 1 else -1
    one, other = model(ids).hidden_states[0], model(changed).hidden_states[0]
    same = (one == other).all(dim=-1)
    assert same.tolist() == [False, True, True, True, True, False, False, False]
    assert torch.equal(one[0], one[7])


def test_every_parameter_is_trained_and_survives_saving(tmp_path: Path) -> None:
    model = MMBertForPreTraining(tiny_config(text_tower="clip", fusion="hybrid_bridge", text_layers=2, image_layers=2))
    randomize(model)
    model(**tiny_batch(), generator=torch.Generator().manual_seed(0)).loss.backward()
    unused = [n for n, p in model.mmbert.text_encoder.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert not unused
    model.eval().save_pretrained(tmp_path)
    again = MMBertForPreTraining.from_pretrained(tmp_path).eval()
    batch = {name: tiny_batch()[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    assert torch.equal(model(**batch).mlm_logits, again(**batch).mlm_logits)


def test_hidden_states_attentions_and_word_embeddings() -> None:
    model = MMBertModel(tiny_config(text_tower="clip", text_layers=2, fusion="late")).eval()
    batch = {name: tiny_batch()[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    output = model(**batch, output_hidden_states=True, output_attentions=True)
    assert [tuple(x.shape) for x in output.hidden_states[:3]] == [(4, 8, 32)] * 3
    assert [tuple(x.shape) for x in output.attentions[:2]] == [(4, 4, 8, 8)] * 2
    assert output.attentions[0].triu(1).abs().max() == 0
    assert model.word_embeddings.shape == (VOCAB, 32)
    assert model.resize_token_embeddings(VOCAB + 2).weight.shape == model.word_embeddings.shape == (VOCAB + 2, 32)


def test_what_it_can_not_do_is_refused() -> None:
    ids = torch.ones(1, 4, dtype=torch.int64)
    with pytest.raises(UsageError, match="text_tower='clip' has no token types"):
        encoder()(ids, token_type_ids=torch.zeros_like(ids))
    with pytest.raises(UsageError, match="input_ids has 17 tokens, but max_position_embeddings=16"):
        encoder()(torch.ones(1, 17, dtype=torch.int64))
    with pytest.raises(UsageError, match="text_hidden_act='gelo' is no activation"):
        encoder(text_hidden_act="gelo")
    with pytest.raises(UsageError, match="text_pretrained='bert' loads a BERT, but text_tower='clip'"):
        build_model(ModelOptions(text_pretrained="bert", text_tower="clip"))
    with pytest.raises(UsageError, match="text_tower='gpt'; allowed are bert, clip"):
        tiny_config(text_tower="gpt")
