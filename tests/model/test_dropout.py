"""Dropout on a CPU: fraction, scale, gradient and seed."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from mmbert.model import dropout as module
from mmbert.model.dropout import Dropout, dropout, speed_up_dropout


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fraction_and_scale(p: float, dtype: torch.dtype) -> None:
    """As many are dropped as chance allows, in each of the four draws of an integer; the others have the scale."""
    torch.manual_seed(0)
    x = torch.ones(400, 1001, dtype=dtype)
    out = dropout(x, p)
    assert out.dtype == dtype and out.shape == x.shape
    fraction = round(p * 65536) / 65536
    assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / (1 - fraction), dtype=dtype).item()}
    zero = (out == 0).flatten()
    for draws in (zero, *(zero[i::4] for i in range(4))):
        deviation = 5 * math.sqrt(p * (1 - p) / len(draws))
        assert abs(draws.double().mean() - fraction) < deviation
    together = (zero[::2][:200_000] & zero[1::2][:200_000]).double().mean()  # neighbours are independent
    assert abs(together - p * p) < 5 * math.sqrt(p * p / 200_000)


def test_gradient_is_the_factor_of_each_element() -> None:
    x = torch.ones(1000, dtype=torch.float64, requires_grad=True)
    out = dropout(x, 0.3)
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())


def test_seed_decides_and_each_call_draws_anew() -> None:
    x, found = torch.ones(1000), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found += [dropout(x, 0.5), dropout(x, 0.5)]
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[0], found[4])


def test_without_training_or_fraction_nothing_changes() -> None:
    x, state = torch.randn(5), torch.get_rng_state()
    assert dropout(x, 0.5, training=False) is x and dropout(x, 0.0) is x and Dropout(0.5).eval()(x) is x
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(dropout(x, 1e-9), x)  # less than a draw can say: torch's own


def test_other_devices_use_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.F, "dropout", lambda x, p: (x.device.type, p))
    assert dropout(torch.empty(3, device="meta"), 0.25) == ("meta", 0.25)


def test_modules_are_replaced_at_any_depth() -> None:
    model = nn.Sequential(nn.Dropout(0.2), nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.3)))
    before = model.state_dict().keys()
    speed_up_dropout(model)
    assert [m.p for m in model.modules() if type(m) is Dropout] == [0.2, 0.3]
    assert model.state_dict().keys() == before
    assert not any(type(m) is nn.Dropout for m in model.modules()) and functional.dropout is module.F.dropout
