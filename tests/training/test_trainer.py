"""`lightning.Trainer` from a run's options: what is adapted, what is refused."""

import json
from typing import Any

import pytest
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, OnExceptionCheckpoint, Timer

from mmbert.errors import UsageError
from mmbert.training.run_options import dump_config, parse_run
from mmbert.training.trainer import (
    PRECISIONS,
    UNSUPPORTED_CALLBACKS,
    build_trainer,
    report_lightning_errors,
    resolve_precision,
    trainer_options,
    validate_trainer_options,
)


def options_of(*arguments: str) -> dict[str, Any]:
    parsed = parse_run(list(arguments))
    validate_trainer_options(parsed.sections.trainer)
    return trainer_options({**dict(parsed.sections.trainer), "precision": "32-true"}, explicit=parsed.explicit)


def test_a_number_of_batches_stays_a_number_and_a_fraction_a_fraction() -> None:
    keys = ("limit_train_batches", "limit_val_batches", "limit_test_batches", "val_check_interval")
    ones = options_of(*(f"--trainer.{key}=1" for key in keys))
    assert all(type(ones[key]) is int and ones[key] == 1 for key in keys)
    parts = options_of(*(f"--trainer.{key}=1.0" for key in keys))
    assert all(type(parts[key]) is float for key in keys)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("logger=true", "leave it out"),
        ("logger=false", "leave it out"),
        ("enable_checkpointing=true", "section checkpoint"),
        ("reload_dataloaders_every_n_epochs=1", "leave it out"),
        ("overfit_batches=2", "data.train_fraction"),
        ("gradient_clip_val=-1", "0 for no clipping"),
        ("gradient_clip_val=.nan", "0 for no clipping"),
        ("accumulate_grad_batches=0", "must be 1 or more"),
        ("barebones=true", "leave it out"),
    ],
)
def test_option_without_effect_is_refused(argument: str, expected: str) -> None:
    with pytest.raises(UsageError, match=expected) as error:
        options_of(f"--trainer.{argument}")
    assert f"trainer.{argument.split('=')[0]}=" in str(error.value)


def test_distributed_sampler_without_effect_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    for argument in ((), ("--trainer.use_distributed_sampler=false",)):  # config.yaml of a run holds false
        assert options_of(*argument)["use_distributed_sampler"] is False and not caplog.records
    assert options_of("--trainer.use_distributed_sampler=true")["use_distributed_sampler"] is False
    assert "trainer.use_distributed_sampler=true has no effect" in caplog.text


@pytest.mark.parametrize("value", ["bf16-true", "16-true", "64-true", "64", "transformer-engine", "bf16-mixd"])
def test_precision_that_training_can_not_use_is_refused(value: str) -> None:
    with pytest.raises(UsageError, match=f"trainer.precision={value}: .*{', '.join(PRECISIONS)}"):
        resolve_precision(value)


def test_short_names_of_precisions_are_resolved() -> None:
    assert resolve_precision("bf16") == ("bf16-mixed", "as requested")
    assert resolve_precision(32) == ("32-true", "as requested")
    assert resolve_precision(None)[0] in PRECISIONS


def test_callback_may_be_named_alone_or_in_a_list() -> None:
    for value in ("LearningRateMonitor", '["LearningRateMonitor"]'):
        callbacks = options_of(f"--trainer.callbacks={value}")["callbacks"]
        assert [type(callback) for callback in callbacks] == [LearningRateMonitor]


def test_a_model_checkpoint_of_the_user_is_let_in() -> None:
    assert options_of()["enable_checkpointing"] is False
    options = options_of("--trainer.callbacks=ModelCheckpoint", "--trainer.accelerator=cpu")
    assert options["enable_checkpointing"] is True
    trainer = build_trainer(options)
    assert sum(isinstance(callback, ModelCheckpoint) for callback in trainer.callbacks) == 1  # pyright: ignore


@pytest.mark.parametrize("name", UNSUPPORTED_CALLBACKS)
def test_callback_that_would_fail_or_have_no_effect_is_refused(name: str) -> None:
    arguments = {
        "GradientAccumulationScheduler": ["--trainer.callbacks.scheduling={0: 2}"],
        "ModelPruning": ["--trainer.callbacks.pruning_fn=l1_unstructured"],
    }
    with pytest.raises(UsageError, match=f"trainer.callbacks: {name} can't be used: "):
        options_of(f"--trainer.callbacks={name}", *arguments.get(name, []))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["logger=WandbLogger"], "trainer: WandbLogger: .*wandb.* not met"),
        (["callbacks=ModelCheckpoint", "callbacks.save_top_k=3"], r"trainer: ModelCheckpoint\(save_top_k=3"),
        (["callbacks=EarlyStopping"], "trainer.callbacks: the following arguments are required: monitor$"),
        (["callbacks=LearningRateMonitr"], "there is no class LearningRateMonitr.*Did you mean 'LearningRateMonitor'?"),
        (
            ["callbacks=EarlyStopping", "callbacks.monitr=x"],
            "callbacks: there is no option monitr. Did you mean 'monit",
        ),
    ],
)
def test_callback_or_logger_that_can_not_be_built_is_one_sentence(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        options_of(*(f"--trainer.{argument}" for argument in arguments))
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)


def test_a_callback_with_an_enum_is_written_to_the_configuration() -> None:
    arguments = ["--trainer.callbacks=Timer", "--trainer.callbacks.duration=00:00:00:05"]
    written = dump_config(parse_run(arguments))["trainer"]["callbacks"]
    again = parse_run([f"--trainer.callbacks={json.dumps(written)}"]).sections.trainer.callbacks
    assert isinstance(again[0] if isinstance(again, list) else again, Timer) and "'interval': 'step'" in str(written)


def test_a_checkpoint_on_exceptions_is_let_in() -> None:
    options = options_of("--trainer.callbacks=OnExceptionCheckpoint", "--trainer.callbacks.dirpath=x")
    assert isinstance(options["callbacks"][0], OnExceptionCheckpoint) and options["enable_checkpointing"] is True


def test_several_processes_may_leave_parameters_unused() -> None:
    for arguments, expected in (
        (["--trainer.devices=2"], "ddp_find_unused_parameters_true"),
        (["--trainer.devices=2", "--trainer.strategy=ddp"], "ddp_find_unused_parameters_true"),
        (["--trainer.devices=1"], "auto"),
    ):
        assert options_of("--trainer.accelerator=cpu", *arguments)["strategy"] == expected


def test_what_lightning_refuses_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="trainer: "):
        build_trainer({"accelerator": "gpu"})
    with pytest.raises(UsageError, match=r"trainer: .*strategy='foo'"):
        build_trainer({"accelerator": "cpu", "strategy": "foo"})
    with pytest.raises(UsageError, match="no wandb"), report_lightning_errors():
        raise ModuleNotFoundError("no wandb", name="wandb")
    with pytest.raises(ModuleNotFoundError), report_lightning_errors():
        raise ModuleNotFoundError("ours", name="mmbert.nowhere")
    with pytest.raises(UsageError, match=r"trainer.val_check_interval: .* \(50\)"), report_lightning_errors():
        raise ValueError(
            "`val_check_interval` (50) must be less than or equal to the number of the training batches (4)."
        )
    with pytest.raises(ValueError, match="something else"), report_lightning_errors():
        raise ValueError("something else")
    with pytest.raises(RuntimeError, match="something else"), report_lightning_errors():
        raise RuntimeError("something else")
