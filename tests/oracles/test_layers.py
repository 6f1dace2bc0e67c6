"""The fusion layers against transformers' and torch's own."""

import pytest
import torch
from tiny import BERT_NAMES, difference, random_tokens, randomize, tiny_config
from torch import Tensor, nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer

from mmbert.model import layers
from mmbert.model.layers import Attention, CrossAttentionLayer, Pooler, SelfAttentionLayer, attend
from mmbert.model.tokens import Tokens

MASK = [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]


def bert_layer(own: SelfAttentionLayer) -> BertLayer:
    """Transformers' layer with the weights of `own`."""
    config = BertConfig(
        hidden_size=32,
        num_attention_heads=4,
        intermediate_size=48,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        layer_norm_eps=1e-12,
        attn_implementation="eager",
    )
    theirs = BertLayer(config).to(own.feed_forward.up.weight.dtype).eval()
    state = own.state_dict()
    theirs.load_state_dict(
        {f"{name}.{kind}": state[f"{mine}.{kind}"] for mine, name in BERT_NAMES.items() for kind in ("weight", "bias")}
    )
    return theirs


def set_path(monkeypatch: pytest.MonkeyPatch, *, fused: bool) -> None:
    monkeypatch.setattr(layers, "fused_attention_is_faster", lambda device: fused)


@pytest.mark.parametrize("fused", [False, True])
def test_self_attention_layer_equals_bert_layer(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    set_path(monkeypatch, fused=fused)
    own = SelfAttentionLayer(tiny_config()).eval()
    randomize(own)
    tokens = random_tokens(MASK, 32, dtype=torch.float32)
    hidden = (1.0 - tokens.mask.float())[:, None, None, :] * torch.finfo(torch.float32).min
    theirs = bert_layer(own)(tokens.hidden_states, attention_mask=hidden)
    expected: Tensor = theirs[0] if isinstance(theirs, tuple) else theirs
    got = own(tokens)
    assert torch.equal(got.mask, tokens.mask)
    assert difference(got.hidden_states[tokens.mask], expected[tokens.mask]) < 2e-6
    # In double precision only equal arithmetic is this close.
    double = bert_layer(own.double())(tokens.hidden_states.double(), attention_mask=hidden.double())
    expected = double[0] if isinstance(double, tuple) else double
    got = own(tokens._replace(hidden_states=tokens.hidden_states.double()))
    assert difference(got.hidden_states[tokens.mask], expected[tokens.mask]) < 1e-12


@pytest.mark.parametrize("context", [[[1, 1, 1], [1, 0, 1]], [[0, 0, 0], [1, 1, 0]], [[], []]])
def test_attention_paths_agree(context: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.tensor(context, dtype=torch.bool).reshape(2, -1)
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 5, 8), (2, 4, mask.shape[1], 8), (2, 4, mask.shape[1], 8)]
    results = []
    states = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    for fused in (False, True):
        set_path(monkeypatch, fused=fused)
        out = attend(*states, mask)
        assert out.shape == (2, 4, 5, 8)
        assert not out[~mask.any(dim=1)].any()  # exact zeros
        results.append((out, *torch.autograd.grad(out.sin().sum(), states)))
    for plain, through_torch in zip(*results, strict=True):
        assert plain.isfinite().all() and through_torch.isfinite().all()
        assert difference(plain, through_torch) < 1e-12


def test_attention_is_softmax_of_scaled_scores() -> None:
    """One head of width 4: scores 0 and 4 ln 3 / sqrt(4) = 2 ln 3, so weights 1/10 and 9/10."""
    query = torch.tensor([[[[1.0, 0, 0, 0]]]])
    key = torch.tensor([[[[0.0, 0, 0, 0], [4 * torch.log(torch.tensor(3.0)).item(), 0, 0, 0], [9, 0, 0, 0]]]])
    value = torch.tensor([[[[10.0, 0, 0, 0], [0, 10.0, 0, 0], [7, 7, 7, 7]]]])
    out = attend(query, key, value, torch.tensor([[True, True, False]]))
    assert difference(out, torch.tensor([[[[1.0, 9.0, 0, 0]]]])) < 1e-5


@pytest.mark.parametrize("fused", [False, True])
def test_attention_dropout_drops_weights_and_keeps_the_mean(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    set_path(monkeypatch, fused=fused)
    torch.manual_seed(0)
    ones = torch.ones(1, 1, 4000, 1)
    out = attend(ones, torch.zeros(1, 1, 2, 1), torch.ones(1, 1, 2, 1), torch.ones(1, 2, dtype=torch.bool), dropout=0.5)
    assert sorted(set(out.flatten().tolist())) == [0.0, 1.0, 2.0]
    assert abs(out.mean().item() - 1) < 0.06


def torch_attention(own: Attention) -> nn.MultiheadAttention:
    """Torch's attention with the weights of `own`."""
    theirs = nn.MultiheadAttention(32, 4, batch_first=True, dtype=torch.float64).eval()
    parts = (own.query, own.key, own.value)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([p.weight for p in parts]))
        theirs.in_proj_bias.copy_(torch.cat([p.bias for p in parts]))
    theirs.out_proj.load_state_dict(own.output.state_dict())
    return theirs


def test_cross_attention_layer_equals_torch_modules() -> None:
    own = CrossAttentionLayer(tiny_config()).double().eval()
    randomize(own)
    tokens, context = random_tokens(MASK, 32), random_tokens([[1, 1, 1], [1, 1, 0], [0, 1, 0]], 32, seed=1)

    def block(attention: Attention, x: Tensor, other: Tokens) -> Tensor:
        states = other.hidden_states
        seen, _ = torch_attention(attention)(x, states, states, key_padding_mask=~other.mask)
        return attention.norm(x + seen)

    x = block(own.attention, tokens.hidden_states, tokens)
    x = block(own.cross_attention, x, context)
    forward = own.feed_forward
    x = forward.norm(x + forward.down(nn.functional.gelu(forward.up(x))))
    got = own(tokens, context=context)
    assert difference(got.hidden_states[tokens.mask], x[tokens.mask]) < 1e-12
    assert torch.equal(got.mask, tokens.mask)


def test_attention_to_an_empty_context_leaves_the_residual() -> None:
    attention = Attention(tiny_config()).double().eval()
    randomize(attention)
    tokens, context = random_tokens([[1, 1], [1, 1]], 32), random_tokens([[0, 0], [1, 0]], 32, seed=1)
    got = attention(tokens.hidden_states, context)
    residual = attention.norm(tokens.hidden_states)
    assert torch.equal(got[0], residual[0])  # not even the output bias
    assert not torch.allclose(got[1], residual[1])


def test_pooler_is_tanh_of_a_linear_map() -> None:
    pooler = Pooler(tiny_config(), vectors=2)
    a, b = torch.randn(3, 32), torch.randn(3, 32)
    expected = torch.tanh(torch.cat([a, b], dim=1) @ pooler.dense.weight.T + pooler.dense.bias)
    assert difference(pooler(a, b), expected) < 1e-6
