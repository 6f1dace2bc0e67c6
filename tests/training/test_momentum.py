"""Momentum distillation: its averages, soft targets, cost, and what is refused."""

import copy
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from lightning.pytorch.strategies import ModelParallelStrategy
from tiers import FULL
from tiny import randomize, tiny_batch, tiny_config
from torch import nn

from mmbert.compare.cost import cached_batches, flops_per_step
from mmbert.errors import UsageError
from mmbert.model.lora import LoraOptions, add_adapters
from mmbert.model.modeling import MMBertForPreTraining, MMBertForTask
from mmbert.model.objectives import OBJECTIVES
from mmbert.training.lightning_features import validate_callbacks
from mmbert.training.module import TrainingModule
from mmbert.training.momentum import MomentumDistillation
from mmbert.training.options import MomentumOptions, OptimOptions


def trained_model(*, freeze: str | None = None, **overrides: Any) -> MMBertForPreTraining:
    """A random model in training mode."""
    torch.manual_seed(0)
    model = MMBertForPreTraining(tiny_config(**overrides)).train()
    randomize(model)
    if freeze is not None:
        model.mmbert.image_encoder.freeze(freeze)
    return model


def started(model: MMBertForPreTraining, **options: Any) -> MomentumDistillation:
    momentum = MomentumDistillation(model, MomentumOptions(**options))
    momentum.start()
    return momentum


def averages(momentum: MomentumDistillation) -> dict[str, torch.Tensor]:
    found = momentum.state_dict()
    assert found is not None
    return found


def loss_and_gradients(model: MMBertForPreTraining, **arguments: Any) -> list[torch.Tensor]:
    torch.manual_seed(1)  # of dropout
    loss = model(**tiny_batch(), generator=torch.Generator().manual_seed(2), **arguments).loss
    return [loss, *torch.autograd.grad(loss, [*model.parameters()], materialize_grads=True)]


def test_average_equals_one_computed_by_hand() -> None:
    """1 at the start, then 0.9 * 1 + 0.1 * 2 = 1.1, then 0.9 * 1.1 + 0.1 * 4 = 1.39."""
    model = trained_model(objectives={"itc": 1.0})
    head: Any = model.objectives["itc"]
    nn.init.constant_(head.text_projection.bias, 1.0)
    momentum = started(model, decay=0.9)
    assert momentum.model is not None
    average: Any = momentum.model.objectives["itc"]
    for value, expected in ((2.0, 1.1), (4.0, 1.39)):
        nn.init.constant_(head.text_projection.bias, value)
        momentum.update()
        assert average.text_projection.bias.tolist() == pytest.approx([expected] * 256, rel=1e-6)
    assert head.text_projection.bias.tolist() == [4.0] * 256


def test_momentum_model_shares_frozen_parameters_and_has_no_gradient_and_no_dropout() -> None:
    model = trained_model(freeze="all", hidden_dropout_prob=0.5)
    momentum = started(model)
    assert momentum.model is not None
    assert [*momentum.model.objectives] == ["mlm", "itc"], "ITM has labels only"
    own, trained = dict(momentum.model.named_parameters()), dict(model.named_parameters())
    for name, parameter in own.items():
        assert (parameter is trained[name]) == (not trained[name].requires_grad) == (".vit." in name), name
        assert not parameter.requires_grad
    assert averages(momentum).keys() == {name for name in own if ".vit." not in name}
    first, second = (momentum.soft_targets(tiny_batch(), step=0).predictions for _ in range(2))
    for name, predictions in first.items():
        for a, b in zip(predictions, second[name], strict=True):
            assert torch.equal(a, b) and not a.requires_grad
    assert model.training and any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("objectives", [{"mlm": 1.0}, {"itc": 1.0}, {"mlm": 1.0, "itm": 1.0, "itc": 1.0}])
def test_alpha_0_gives_the_loss_and_gradients_without(objectives: dict[str, float]) -> None:
    model = trained_model(objectives=objectives)
    momentum = started(model, alpha=0.0)
    for average in averages(momentum).values():
        average.mul_(1.5)  # another teacher than the model itself
    without, alpha_0, alpha_1 = (
        loss_and_gradients(model, **arguments)
        for arguments in (
            {},
            {"soft_targets": momentum.soft_targets(tiny_batch(), step=0)},
            {"soft_targets": momentum.soft_targets(tiny_batch(), step=0)._replace(alpha=torch.tensor(1.0))},
        )
    )
    assert all(torch.equal(a, b) for a, b in zip(without, alpha_0, strict=True))
    assert not torch.equal(without[0], alpha_1[0])


def test_a_model_that_is_its_own_teacher_has_no_gradient_at_alpha_1() -> None:
    """The cross-entropy with one's own distribution is at its minimum."""
    model = trained_model(objectives={"mlm": 1.0, "itc": 1.0}).eval()
    soft = started(model, alpha=1.0, decay=0.0).soft_targets(tiny_batch(), step=0)
    _, *gradients = loss_and_gradients(model, soft_targets=soft)
    _, *with_labels = loss_and_gradients(model)
    without_temperature = [n for n, _ in model.named_parameters()].index("objectives.itc.log_scale")
    for i, gradient in enumerate(gradients):
        assert i == without_temperature or gradient.abs().max() < 1e-6
    assert max(float(gradient.abs().max()) for gradient in with_labels) > 1e-2


def test_momentum_model_reads_the_projections_of_training() -> None:
    """It is in evaluation mode, in which ITC would read the closed form of the last validation."""
    objectives = {"itc": {"init": "closed_form", "embedding_size": 4, "refit": True}, "mlm": 1.0}
    model = trained_model(objectives=objectives)
    momentum = started(model)
    found = momentum.soft_targets(tiny_batch(), step=0).predictions["itc"]
    assert model.objectives["itc"].refit, "the trained model is as it was"
    model.objectives["itc"].refit = False  # pyright: ignore
    with torch.no_grad():
        expected = model.eval().objectives["itc"].predictions(model.encode(tiny_batch()))  # pyright: ignore
    torch.testing.assert_close(found, expected)


def test_alpha_rises_over_the_ramp() -> None:
    momentum = started(trained_model(), alpha=0.4, ramp_steps=4)
    found = [float(momentum.soft_targets(tiny_batch(), step=step).alpha) for step in (0, 1, 2, 4, 100)]
    assert found == pytest.approx([0, 0.1, 0.2, 0.4, 0.4])


def test_soft_targets_and_progress_come_after_the_first_stage() -> None:
    """The ramp and the progress, of 10 optimizer steps, count from its end."""
    model = trained_model(objectives={"mlm": 1.0, "ngrams": 1.0})
    module: Any = SimpleNamespace(
        optim_options=OptimOptions(first_stage="ngrams", first_stage_steps=3),
        momentum=started(model, alpha=0.5, ramp_steps=2),
        trainer=SimpleNamespace(global_step=2),
        model=model,
        device=torch.device("cpu"),
        _total_steps=13,
    )
    assert TrainingModule._stage(module, tiny_batch()) == {"only": "ngrams"}
    for step, alpha, progress in ((3, 0.0, 0.0), (4, 0.25, 0.1), (9, 0.5, 0.6)):
        module.trainer.global_step = step
        found = TrainingModule._stage(module, tiny_batch())
        assert float(found["soft_targets"].alpha) == alpha
        assert float(found["progress"]) == pytest.approx(progress) and found["progress"].dtype == torch.float32


def test_averages_of_a_checkpoint_replace_the_copy() -> None:
    model = trained_model(freeze="all")
    momentum = started(model)
    for parameter in model.parameters():
        parameter.data += parameter.requires_grad * 0.1
    momentum.update()
    saved = copy.deepcopy(averages(momentum))
    resumed = MomentumDistillation(model, MomentumOptions())
    assert resumed.state_dict() is None
    resumed.load_state_dict(saved)
    resumed.start()
    assert all(torch.equal(averages(resumed)[name], value) for name, value in saved.items())
    momentum.start()
    assert not any(torch.equal(averages(momentum)[name], value) for name, value in saved.items())


def test_images_of_the_encoder_cache_are_not_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained_model(freeze="all")
    momentum, batch = started(model), tiny_batch()
    (cached,) = cached_batches(model, [dict(batch)])
    expected = momentum.soft_targets(batch, step=0).predictions
    monkeypatch.setattr("mmbert.model.modeling.MMBertModel.encode_image", None)
    found = momentum.soft_targets(cached, step=0).predictions
    for name, predictions in expected.items():
        for a, b in zip(predictions, found[name], strict=True):
            torch.testing.assert_close(a, b)


def test_adapters_are_averaged_and_their_weights_shared() -> None:
    pytest.importorskip("peft", reason="needs the extra lora")
    model = trained_model(objectives={"itc": 1.0})
    add_adapters(model, LoraOptions(rank=2), seed=0)
    momentum = started(model)
    names = [*averages(momentum)]
    assert any(".lora_A." in name for name in names) and not any(".base_layer." in name for name in names)
    before = momentum.soft_targets(tiny_batch(), step=0).predictions["itc"][0]
    for name, parameter in model.named_parameters():
        parameter.data += 0.1 * (".lora_" in name)
    torch.testing.assert_close(momentum.soft_targets(tiny_batch(), step=0).predictions["itc"][0], before)
    momentum.update()
    assert not torch.equal(momentum.soft_targets(tiny_batch(), step=0).predictions["itc"][0], before)


@pytest.mark.skipif(not FULL, reason="tracing takes 20 s: the full tier only")
def test_compiled_and_checkpointed_models_have_an_eager_teacher() -> None:
    model = trained_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    expected = started(model).soft_targets(tiny_batch(), step=0).predictions["mlm"][0]
    losses = loss_and_gradients(model, soft_targets=started(model).soft_targets(tiny_batch(), step=0))
    model.gradient_checkpointing_enable()
    model.compile(dynamic=True, backend="eager")
    soft = started(model).soft_targets(tiny_batch(), step=0)
    assert torch.equal(soft.predictions["mlm"][0], expected)
    for found, value in zip(loss_and_gradients(model, soft_targets=soft), losses, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-6)


def test_flops_of_the_momentum_model_are_counted() -> None:
    """Both encoders, projections to 16 features, and similarities in both directions, forward only."""
    batch_size, tokens, patches, width, vit = 4, 8, 5, 32, 24
    model = trained_model(fusion="late", objectives={"itc": {"weight": 1.0, "embedding_size": 16}})
    linear = lambda rows, k, n: 2 * rows * k * n  # noqa: E731

    def layer(length: int, size: int, inner: int) -> int:
        rows = batch_size * length
        return 4 * linear(rows, size, size) + 2 * linear(rows, length, size) + 2 * linear(rows, size, inner)

    encoders = layer(tokens, width, 48) + linear(batch_size * (patches - 1), 192, vit) + layer(patches, vit, 4 * vit)
    heads = linear(batch_size * patches, vit, width) + 2 * linear(batch_size, width, 16)
    similarities = 2 * linear(batch_size, 16, batch_size)
    plain, counted = (flops_per_step(model, [tiny_batch()], momentum=m) for m in (None, started(model)))
    assert counted - plain == encoders + heads + similarities


# --- What is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1}, "momentum_distillation.decay=1: from 0 to below 1, such as 0.995; with 1 the momentum model"),
        ({"decay": -0.1}, "momentum_distillation.decay=-0.1: from 0 to below 1"),
        ({"decay": float("nan")}, "momentum_distillation.decay=nan: from 0 to below 1"),
        ({"decay": "0.9"}, "momentum_distillation.decay='0.9': from 0 to below 1"),
        ({"alpha": 1.5}, "momentum_distillation.alpha=1.5: a fraction from 0 to 1."),
        ({"alpha": True}, "momentum_distillation.alpha=True: a fraction from 0 to 1."),
        ({"ramp_steps": 0.5}, "momentum_distillation.ramp_steps=0.5: a whole number of 0 or more."),
        ({"alhpa": 0.4}, "momentum_distillation.alhpa: allowed are decay, alpha, ramp_steps. Did you mean 'alpha'?"),
        (True, "momentum_distillation=True: a mapping, such as {decay: 0.995, alpha: 0.4}."),
    ],
)
def test_wrong_options_are_errors(options: Any, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"optim.{message}")):
        OptimOptions(momentum_distillation=options).check()


def test_models_without_soft_targets_are_errors() -> None:
    optim = OptimOptions(momentum_distillation={})
    assert [name for name, objective in OBJECTIVES.items() if objective.has_soft_targets] == ["mlm", "itc"]
    message = "has no effect on the objectives itm, ngrams: it gives soft targets to mlm and itc; leave it out, or add"
    with pytest.raises(UsageError, match=message):
        MomentumDistillation.of(trained_model(objectives={"itm": 1.0, "ngrams": 1.0}), optim)
    task = MMBertForTask(tiny_config(task="vqa", labels=["a", "b"]))
    with pytest.raises(UsageError, match=r"has no effect on model\.task=vqa: it gives soft targets"):
        MomentumDistillation.of(task, optim)
    assert MomentumDistillation.of(task, OptimOptions()) is None


def test_callbacks_that_unfreeze_and_sharding_are_errors() -> None:
    optim = OptimOptions(momentum_distillation={})
    trainer: Any = SimpleNamespace(callbacks=[BackboneFinetuning()], world_size=1)
    validate_callbacks(trainer, OptimOptions())
    with pytest.raises(UsageError, match=r"BackboneFinetuning: the momentum model of optim\.momentum_distillation"):
        validate_callbacks(trainer, optim)
    module: Any = SimpleNamespace(
        optim_options=optim,
        momentum=started(trained_model()),
        trainer=SimpleNamespace(strategy=ModelParallelStrategy()),
    )
    with pytest.raises(UsageError, match=r"optim\.momentum_distillation copies the model, but trainer\.strategy=model"):
        TrainingModule.configure_model(module)
