"""Parameter groups and the learning rate, against numbers worked out by hand."""

import math

import pytest
import torch
from tiny import tiny_batch, tiny_config

from mmbert.errors import UsageError
from mmbert.model.fusion import FUSIONS
from mmbert.model.modeling import MMBertForPreTraining
from mmbert.training.optim import build_optimizer, lr_factor, parameter_groups
from mmbert.training.options import SCHEDULES, CheckpointOptions, OptimOptions


def model(**overrides: object) -> MMBertForPreTraining:
    torch.manual_seed(0)
    return MMBertForPreTraining(tiny_config(text_hidden_size=16, **overrides))


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("freeze", ["none", "all", 1])
def test_every_trainable_parameter_is_in_one_group(fusion: str, freeze: str | int) -> None:
    built = model(fusion=fusion)
    built.mmbert.text_encoder.freeze(freeze)
    built.mmbert.image_encoder.freeze(freeze)
    grouped = [id(p) for group in parameter_groups(built, OptimOptions()) for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in built.parameters() if p.requires_grad}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_projections_of_itc_have_a_factor_of_their_own(name: str) -> None:
    built = model(objectives={"mlm": 1.0, "itc": 1.0})
    plain, own = (
        parameter_groups(built, OptimOptions(name=name, lr=1.0, head_lr_factor=0.5, itc_lr_factor=factor))
        for factor in (1.0, 0.1)
    )
    assert not any(group["name"].startswith("itc") for group in plain)
    rates = {id(p): group["lr"] for group in own for p in group["params"]}
    assert len(rates) == sum(len(group["params"]) for group in own) == sum(len(group["params"]) for group in plain)
    for key, expected in (("itc", 0.05), ("mlm", 0.5)):
        assert {rates[id(p)] for p in built.objectives[key].parameters()} == {expected}


def test_biases_and_norms_are_not_decayed() -> None:
    built = model()
    names = {id(p): n for n, p in built.named_parameters()}
    decay = {
        names[id(p)]: g["weight_decay"]
        for g in parameter_groups(built, OptimOptions(weight_decay=0.3))
        for p in g["params"]
    }
    norms = {
        f"{path}.{name}"
        for path, module in built.named_modules()
        if isinstance(module, torch.nn.LayerNorm)
        for name, _ in module.named_parameters()
    }
    vectors = {n for n in decay if n.endswith(("bias", "log_scale", "absent_text", "absent_image"))}
    assert norms and vectors
    assert all(decay[n] == 0 for n in norms | vectors)
    assert all(decay[n] == 0.3 for n in decay if n.endswith("weight") and n not in norms)
    assert decay["mmbert.text_encoder.bert.embeddings.word_embeddings.weight"] == 0.3


def test_positions_and_learned_tokens_are_not_decayed() -> None:
    built = MMBertForPreTraining(tiny_config(fusion="hybrid_bottleneck", image_model="vit_small_patch14_reg4_dinov2"))
    groups = parameter_groups(built, OptimOptions(weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    learned = ("pos_embed", "cls_token", "reg_token", "bottlenecks")
    found = {name: decay[id(p)] for name, p in built.named_parameters() if name.endswith(learned)}
    assert len(found) == len(learned) and set(found.values()) == {0.0}, found


def test_factors_apply_to_their_part() -> None:
    built = model()
    options = OptimOptions(lr=2.0, text_lr_factor=0.1, image_lr_factor=0.2, fusion_lr_factor=3, head_lr_factor=4)
    names = {id(p): n for n, p in built.named_parameters()}
    rates = {names[id(p)]: g["lr"] for g in parameter_groups(built, options) for p in g["params"]}
    expected = {
        "mmbert.text_encoder.": 0.2,
        "mmbert.image_encoder.": 0.4,
        "mmbert.fusion.": 6.0,
        "mmbert.text_projection.": 6.0,
        "mmbert.image_projection.": 6.0,
        "objectives.": 8.0,
    }
    for prefix, rate in expected.items():
        found = {rates[n] for n in rates if n.startswith(prefix)}
        assert len(found) == 1 and math.isclose(found.pop(), rate), prefix
    assert all(n.startswith(tuple(expected)) for n in rates)


@pytest.mark.parametrize(
    ("schedule", "final_lr", "expected"),
    [  # 10 steps, 2 of warm-up; after it progress is 0, 1/8, ..., 7/8
        ("constant", 0.0, [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", 0.0, [0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        ("linear", 0.2, [0.5, 1, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]),
        ("cosine", 0.0, [0.5, 1, 1, 0.961940, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.038060]),
        ("cosine", 0.5, [0.5, 1, 1, 0.980970, 0.926777, 0.845671, 0.75, 0.654329, 0.573223, 0.519030]),
    ],
)
def test_schedule_values(schedule: str, final_lr: float, expected: list[float]) -> None:
    options = OptimOptions(warmup=0.2, schedule=schedule, final_lr=final_lr)
    assert [round(lr_factor(step, 10, options), 6) for step in range(10)] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule_ends_at_the_final_rate_and_stays(schedule: str) -> None:
    options = OptimOptions(warmup=0.1, schedule=schedule, final_lr=0.25)
    end = 1.0 if schedule == "constant" else 0.25
    assert math.isclose(lr_factor(100, 100, options), end)
    assert math.isclose(lr_factor(500, 100, options), end)


@pytest.mark.parametrize("warmup", [0.0, 1.0])
@pytest.mark.parametrize("total", [1, 7])
def test_schedule_survives_the_ends_of_warmup(warmup: float, total: int) -> None:
    factors = [lr_factor(step, total, OptimOptions(warmup=warmup)) for step in range(total + 1)]
    assert all(0 <= f <= 1 for f in factors)
    assert factors[0] == (1 / total if warmup else 1.0)


def test_optimizer_moves_with_the_schedule() -> None:
    built = model()
    options = OptimOptions(lr=0.01, text_lr_factor=0.5, warmup=0.5, schedule="linear")
    optimizer, schedule = build_optimizer(built, options, total_steps=4)
    seen = []
    for _ in range(4):
        seen.append({g["name"].split("/")[0]: g["lr"] for g in optimizer.param_groups})
        built(**tiny_batch(), generator=torch.Generator().manual_seed(0)).loss.backward()
        optimizer.step()
        schedule.step()
    assert [s["fusion"] for s in seen] == pytest.approx([0.005, 0.01, 0.01, 0.005])
    assert [s["text"] for s in seen] == pytest.approx([0.0025, 0.005, 0.005, 0.0025])
    assert optimizer.defaults["betas"] == (0.9, 0.98)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"schedule": "cosin"}, r"optim\.schedule='cosin'; allowed are cosine, linear, constant"),
        ({"lr": 0.0}, r"optim\.lr=0\.0: must be above 0"),
        *(({"lr": value}, rf"optim\.lr={value}") for value in (math.nan, math.inf)),
        *(({"head_lr_factor": value}, rf"optim\.head_lr_factor={value}") for value in (-1.0, math.nan, math.inf)),
        *(({"weight_decay": value}, rf"optim\.weight_decay={value}") for value in (-1.0, math.nan, math.inf)),
        *(({"betas": value}, r"optim\.betas=\[") for value in ((0.9,), (0.9, 1.0), (math.nan, 0.9), (-0.1, 0.9))),
        ({"warmup": 1.5}, r"optim\.warmup=1\.5: a fraction from 0 to 1"),
        ({"final_lr": -0.1}, r"optim\.final_lr=-0\.1: a fraction"),
    ],
)
def test_options_refuse_values_out_of_range(overrides: dict, message: str) -> None:
    OptimOptions().check()
    with pytest.raises(UsageError, match=message):
        OptimOptions(**overrides).check()


def test_checkpoint_options_refuse_values_out_of_range() -> None:
    CheckpointOptions(every_seconds=math.inf).check()
    for options in ({"every_seconds": math.nan}, {"every_seconds": -1.0}, {"max_time_fraction": math.nan}):
        with pytest.raises(UsageError, match=f"checkpoint.{next(iter(options))}="):
            CheckpointOptions(**options).check()
