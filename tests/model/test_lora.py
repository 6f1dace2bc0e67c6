"""LoRA adapters: what they train, that merging changes no output, and what is refused."""

import copy
import importlib.util
from typing import Any

import pytest
import torch
from tiers import FULL
from tiny import difference, randomize, tiny_batch, tiny_config
from torch import nn

from mmbert.errors import UsageError
from mmbert.model import lora
from mmbert.model.lora import LoraOptions, adapted_layers, add_adapters, check_adapters_are_used, merge_adapters
from mmbert.model.modeling import MMBertForPreTraining
from mmbert.model.options import ModelOptions
from mmbert.training.assembly import assemble
from mmbert.training.options import OptimOptions

OPTIONS = LoraOptions(rank=2, alpha=8.0)


def adapted(
    fusion: str = "hybrid", options: LoraOptions = OPTIONS
) -> tuple[MMBertForPreTraining, MMBertForPreTraining]:
    """A model with random weights, and the same one with adapters."""
    config = tiny_config(fusion=fusion, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    plain, model = MMBertForPreTraining(config), MMBertForPreTraining(config)
    randomize(plain)
    model.load_state_dict(plain.state_dict())
    add_adapters(model, options, seed=0)
    return plain, model


def outputs(model: MMBertForPreTraining) -> dict[str, torch.Tensor]:
    batch = {k: v for k, v in tiny_batch().items() if k in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        found: Any = model.eval()(**batch)
    return {name: found[name] for name in ("mlm_logits", "itm_logits", "logits_per_text")}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("fusion", ["early", "late", "hybrid"])
def test_adapters_learn_and_merge_into_a_plain_model(fusion: str, checkpointing: bool) -> None:
    plain, model = adapted(fusion)
    before = outputs(model)
    assert all(difference(value, before[name]) < 1e-6 for name, value in outputs(plain).items()), "B starts at 0"
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):  # A has no gradient while B is 0
        optimizer.zero_grad()
        loss: Any = model(**tiny_batch()).loss
        loss.backward()
        optimizer.step()
    trained = {name for name, p in model.mmbert.named_parameters() if "encoder." in name and p.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    gradients = {n: p.grad for n, p in model.mmbert.named_parameters() if n in trained}
    assert all(g is not None and g.abs().sum() > 0 for g in gradients.values()), "every adapter is trained"
    after = outputs(model)
    assert all(difference(value, after[name]) > 1e-3 for name, value in before.items())
    for part in ("text_encoder", "image_encoder"):
        own = {
            n.replace(".base_layer", ""): p
            for n, p in getattr(model.mmbert, part).named_parameters()
            if "lora" not in n
        }
        base = dict(getattr(plain.mmbert, part).named_parameters())
        assert own.keys() == base.keys() and all(torch.equal(own[n], base[n]) for n in base), "its weights are frozen"
    merged = MMBertForPreTraining(model.config)
    merged.load_state_dict(merge_adapters(model, model.state_dict()))
    assert all(difference(value, after[name]) < 1e-5 for name, value in outputs(merged).items())


def test_targets_and_rank_are_those_of_the_options() -> None:
    _, model = adapted(options=LoraOptions(rank=3, targets="image"))
    layers = adapted_layers(model)
    assert {name.split(".")[1] for name in layers} == {"image_encoder"}
    assert {name.rpartition("blocks.0.")[2] for name in layers} == {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
    assert {layer.lora_A["default"].out_features for layer in layers.values()} == {3}
    assert all(p.requires_grad for p in model.mmbert.text_encoder.parameters())
    plain = MMBertForPreTraining(model.config)
    state = plain.state_dict()
    assert merge_adapters(plain, state).keys() == state.keys(), "a model without adapters is saved as it is"


def test_adapters_depend_on_the_seed_only() -> None:
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(weights))
        model = MMBertForPreTraining(tiny_config())
        state = torch.get_rng_state()
        add_adapters(model, OPTIONS, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        weights.append([layer.lora_A["default"].weight for layer in adapted_layers(model).values()])
    first, same, other = weights
    assert all(map(torch.equal, first, same)) and not any(map(torch.equal, first, other))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rnk": 8}, r"model\.lora\.rnk: allowed are rank, alpha, targets\. Did you mean 'rank'"),
        ({"rank": 0}, r"model\.lora\.rank=0: a number of 1 or more"),
        ({"rank": True}, r"model\.lora\.rank=True: a number of 1 or more"),
        ({"alpha": float("inf")}, r"model\.lora\.alpha=inf: a number above 0"),
        ({"targets": ["text"]}, r"model\.lora\.targets=\['text'\]; allowed are text, image, both"),
        ({"alpha": -1.0}, r"model\.lora\.alpha=-1\.0: a number above 0"),
        ({"targets": "images"}, r"model\.lora\.targets='images'; allowed are text, image, both\. Did you mean 'image'"),
    ],
)
def test_wrong_options_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        LoraOptions.parse(options)


@pytest.mark.parametrize(
    ("model", "optim", "message"),
    [
        ({}, {}, r"the text encoder is random, and frozen it would stay so"),
        (
            {"lora": {"targets": "image"}, "pretrained": "x"},
            {"freeze_image": "all"},
            r"optim\.freeze_image=all; leave one",
        ),
        ({"pretrained": "x"}, {"freeze_text": 2}, r"optim\.freeze_text=2; leave one of them out"),
        ({"pretrained": "x"}, {"name": "muon"}, r"optim\.name=muon orthogonalizes .* model\.lora; use adamw"),
    ],
)
def test_contradictory_options_are_errors(model: dict[str, Any], optim: dict[str, Any], message: str) -> None:
    options: Any = ModelOptions(**{"lora": {}, **model})
    with pytest.raises(UsageError, match=message):
        assemble(options, None, OptimOptions(**optim), seed=0)  # pyright: ignore - raised before the data are read


def test_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(lora.importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    with pytest.raises(
        UsageError, match=r"^model.lora needs peft, which is not installed: pip install 'mmbert\[lora\]'"
    ):
        add_adapters(MMBertForPreTraining(tiny_config()), OPTIONS, seed=0)
    options: Any = ModelOptions(lora={}, pretrained="x")
    with pytest.raises(UsageError, match=r"^model\.lora needs peft"):
        assemble(options, None, OptimOptions(), seed=0)  # pyright: ignore - raised before weights and data are read


@pytest.mark.skipif(not FULL, reason="compiling takes 15 s: the full tier only")
def test_compiled_model_with_adapters_trains_and_merges_as_the_plain_one() -> None:
    _, model = adapted()
    compiled = copy.deepcopy(model)
    compiled.compile(dynamic=True, backend="eager")
    losses: list[list[float]] = [[], []]
    for found, trained in zip(losses, (model, compiled), strict=True):
        trained.train()
        optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=0.1)
        for length in (8, 9, 8):
            optimizer.zero_grad()
            loss: Any = trained(**tiny_batch(length=length), generator=torch.Generator().manual_seed(0)).loss
            loss.backward()
            optimizer.step()
            found.append(loss.item())
    assert losses[0] == losses[1]
    expected, got = (merge_adapters(m, m.state_dict()) for m in (model, compiled))
    assert expected.keys() == got.keys() and all(torch.equal(value, got[name]) for name, value in expected.items())


def test_layer_that_is_not_called_is_an_error() -> None:
    """Some ViTs of timm read the weight of a layer instead of calling it; the adapter would have no effect."""
    _, model = adapted()
    encoder = model.mmbert.image_encoder
    block = encoder.vit.blocks[0]
    block.attn.proj, hidden = nn.Identity(), block.attn.proj
    encoder.vit.hidden = hidden
    with pytest.raises(UsageError, match=r"image encoder does not call its layer vit\.hidden, .* no effect"):
        check_adapters_are_used(encoder, "image", 16)


def test_encoder_without_layers_is_an_error() -> None:
    model = MMBertForPreTraining(tiny_config(fusion="early", text_layers=0, objectives={"mlm": 1.0}))
    with pytest.raises(UsageError, match=r"targets=both: the text encoder has no layers"):
        add_adapters(model, OPTIONS, seed=0)
