"""Late bilinear fusion against its formula."""

import math

import torch
from tiny import difference, random_tokens, randomize, tiny_config

from mmbert.model.fusion.late_bilinear import LateBilinearFusion
from mmbert.model.tokens import Tokens


def test_pooled_vector_by_hand() -> None:
    """Width 1, so rank 2: tanh(0.5) tanh(3 * 0.25) - 2 tanh(2 * 0.5) tanh(-0.25) + 0.1 = 0.7663, and its tanh."""
    fusion = LateBilinearFusion(tiny_config(fusion_layers=0, hidden_size=1, num_attention_heads=1))
    with torch.no_grad():
        for linear, weight in ((fusion.text_factors, [[1.0], [2.0]]), (fusion.image_factors, [[3.0], [-1.0]])):
            linear.weight.copy_(torch.tensor(weight))
            linear.bias.zero_()
        fusion.pooler.dense.weight.copy_(torch.tensor([[1.0, -2.0]]))
        fusion.pooler.dense.bias.fill_(0.1)
    x, y = (Tokens(torch.full((1, 1, 1), value), torch.ones(1, 1, dtype=torch.bool)) for value in (0.5, 0.25))
    by_hand = math.tanh(0.5) * math.tanh(0.75) - 2 * math.tanh(1.0) * math.tanh(-0.25) + 0.1
    assert abs(by_hand - 0.7666) < 1e-3
    assert abs(fusion(x, y).pooled.item() - math.tanh(by_hand)) < 1e-6


def test_pooled_vector_is_a_bilinear_form_of_low_rank() -> None:
    """One (D, D) matrix for each output, built in full: what the low rank saves."""
    fusion = LateBilinearFusion(tiny_config(fusion_layers=0)).double().eval()
    randomize(fusion)
    with torch.no_grad():  # so small that tanh is its argument
        for linear in (fusion.text_factors, fusion.image_factors):
            linear.weight.mul_(1e-4)
            linear.bias.zero_()
        fusion.pooler.dense.weight.mul_(1e4)
        fusion.pooler.dense.bias.zero_()
    text, image = random_tokens([[1, 1], [1, 0]], 32), random_tokens([[1], [1]], 32, seed=1)
    u, v, p = fusion.text_factors.weight, fusion.image_factors.weight, fusion.pooler.dense.weight
    full = torch.einsum("or,ri,rj->oij", p, u, v)  # (D, D, D)
    expected = torch.einsum("bi,oij,bj->bo", text.first, full, image.first)
    pooled = fusion(text, image).pooled
    assert difference(pooled, expected) < 1e-6 * expected.abs().max()
    double = fusion(text._replace(hidden_states=2 * text.hidden_states), image).pooled
    assert difference(double, 2 * pooled) < 1e-6 * expected.abs().max(), "linear in either side"


def test_layers_count_the_mlp_behind_the_product() -> None:
    fusion = LateBilinearFusion(tiny_config(fusion_layers=2)).double().eval()
    randomize(fusion)
    text, image = random_tokens([[1, 1], [1, 0]], 32), random_tokens([[1], [1]], 32, seed=1)
    x = fusion.text_factors(text.hidden_states[:, 0]).tanh() * fusion.image_factors(image.hidden_states[:, 0]).tanh()
    linear = [module for module in fusion.mlp if isinstance(module, torch.nn.Linear)]
    assert len(linear) == 2
    for layer in linear:
        x = torch.nn.functional.gelu(x @ layer.weight.T + layer.bias)
    dense = fusion.pooler.dense
    assert difference(fusion(text, image).pooled, torch.tanh(x @ dense.weight.T + dense.bias)) < 1e-12
