"""`mmbert.fit`: a training run as a function, from Python."""

import json
import random
import signal
import threading
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, StochasticWeightAveraging
from safetensors.torch import load_file

import mmbert
from mmbert.errors import UsageError
from mmbert.training.checkpoints import latest_complete_checkpoint
from mmbert.training.run import TrainingRun
from mmbert.training.run_options import flatten_sections, parse_run


@pytest.fixture(scope="module")
def sections(tiny: list[str]) -> dict[str, dict[str, Any]]:
    """The options of `tiny` as Python gives them."""
    found: dict[str, dict[str, Any]] = {}
    for option in tiny:
        key, _, value = option.removeprefix("--").partition("=")
        section, name = key.split(".", 1)
        found.setdefault(section, {})[name] = yaml.safe_load(value)
    found["trainer"] |= {"max_epochs": 1, "precision": "32-true"}
    found["evaluation"] = {"test_images": 2, "val_images": 2}
    return found


def trained(sections: dict[str, dict[str, Any]], folder: Path, **changes: Any) -> mmbert.RunResult:
    """A run of the quickstart's preset, made tiny."""
    options: dict[str, Any] = {name: dict(own) for name, own in sections.items()}
    options["trainer"]["default_root_dir"] = str(folder)
    for name in [name for name in changes if name in options]:
        options[name] |= changes.pop(name)
    return mmbert.fit("pretrain/shapes_plain", **options, **changes)


def test_result_holds_metrics_outcomes_model_and_curves(sections: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    run = trained(sections, tmp_path, model={"fusion": "late"}, name="first", seed=3, threads=1)
    assert run.folder == tmp_path / "first"
    assert run.metrics == json.loads((run.folder / "metrics.json").read_text())
    assert run.metrics["run/fusion"] == "late" and run.metrics["run/seed"] == 3
    accuracy = run.outcomes["test"]["itm_accuracy"]
    assert np.mean(accuracy.values) == pytest.approx(run.metrics["test/itm_accuracy"])
    image = next(Path(sections["data"]["images"]).glob("train/*.png"))
    assert len(run.model.match(image, ["a red circle", "a blue square"]).scores) == 2
    figure = run.curves()
    assert figure is not None and figure._repr_png_().startswith(b"\x89PNG")  # pyright: ignore
    assert any("validation loss" in axis.get_title() for axis in figure.axes)
    assert "test/" not in repr(run) and "itm_accuracy" in repr(run) and "<td>itm_accuracy</td>" in run._repr_html_()
    rows = [line.split()[0] for line in repr(run).splitlines()]
    first, loss = rows.index("text_to_image/R@1"), rows.index("mlm_loss")
    assert first < loss, "the most wanted metrics come first"
    card = (run.folder / "model/README.md").read_text()
    assert f"| test/itm_accuracy | {run.metrics['test/itm_accuracy']:.4g} |" in card and "seed: 3" in card


def test_a_run_in_a_thread_equals_one_on_the_command_line(
    sections: dict[str, dict[str, Any]], tiny: list[str], tmp_path: Path
) -> None:
    from mmbert.cli.main import main

    results: list[mmbert.RunResult] = []
    thread = threading.Thread(target=lambda: results.append(trained(sections, tmp_path, name="thread", threads=1)))
    thread.start()
    thread.join()
    more = ["--trainer.max_epochs=1", "--trainer.precision=32-true", "--threads=1", "--name=shell"]
    evaluation = ["--evaluation.test_images=2", "--evaluation.val_images=2", f"--trainer.default_root_dir={tmp_path}"]
    main(["fit", "--config", "pretrain/shapes_plain", *tiny, *more, *evaluation])
    assert (results[0].folder / "trace.csv").read_text() == (tmp_path / "shell/trace.csv").read_text()


def test_runs_leave_the_process_as_it_was(sections: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = random.random(), float(np.random.rand()), float(torch.rand(()))
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    first = trained(sections, tmp_path, threads=2)
    assert (random.random(), float(np.random.rand()), float(torch.rand(()))) == expected
    assert torch.get_num_threads() == threads and signal.getsignal(signal.SIGTERM) == handler
    second = trained(sections, tmp_path, threads=2)
    assert second.folder.name == f"{first.folder.name}-2"
    assert (first.folder / "trace.csv").read_text() == (second.folder / "trace.csv").read_text()


def test_dataclasses_and_mappings_are_the_same_options() -> None:
    options = mmbert.OptimOptions(lr=0.5, betas=(0.8, 0.9))
    assert flatten_sections({"optim": options, "data": None}) == ({"optim.lr": 0.5, "optim.betas": (0.8, 0.9)}, {})
    stopping = EarlyStopping("val/mlm_loss")
    flat, objects = flatten_sections({"trainer": {"max_steps": 3, "callbacks": [stopping]}})
    assert flat == {"trainer.max_steps": 3} and objects == {"callbacks": [stopping]}


def test_new_mlm_head_starts_at_the_frequencies_of_the_captions(
    sections: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """One step of a tiny rate leaves the bias where it started: tokens of the captions high, [CLS] and [SEP] lowest."""
    changes: dict[str, Any] = {"optim": {"lr": 1e-9}, "trainer": {"max_steps": 1}}
    objectives = {"mlm": {"weight": 1.0, "initial_bias": "prior"}, "itm": 1.0, "itc": 1.0}
    first = trained(sections, tmp_path, model={"objectives": objectives}, name="first", **changes)
    bias = first.model.model.objectives["mlm"].bias
    tokenizer = first.model.processor.tokenizer
    assert bias[tokenizer.convert_tokens_to_ids("a")] > bias[tokenizer.convert_tokens_to_ids("tiny")]
    assert bias.min() == bias[tokenizer.cls_token_id] and torch.allclose(bias.exp().sum(), torch.tensor(1.0))
    kept = trained(
        sections, tmp_path, model={"objectives": objectives, "pretrained": str(first.folder / "model")}, name="second",
        data={"train_fraction": 0.5}, **changes,
    )  # fmt: skip
    assert torch.equal(kept.model.model.objectives["mlm"].bias, bias), "that of a checkpoint is kept"


def test_errors_are_exceptions(sections: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"Did you mean 'model.fusion'"):
        trained(sections, tmp_path, model={"fusoin": "late"})
    with pytest.raises(UsageError, match="expected a mapping"):
        mmbert.fit("pretrain/shapes_plain", model="late")  # pyright: ignore
    with pytest.raises(UsageError, match="name of a preset"):
        mmbert.fit("quickstrat")


def test_ctrl_c_is_a_keyboard_interrupt_that_leaves_its_handler(
    sections: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    class Interrupt(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trained(sections, tmp_path, trainer={"callbacks": [Interrupt()]})
    assert signal.getsignal(signal.SIGINT) == before


def test_config_holds_what_was_used(sections: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    run = trained(sections, tmp_path, trainer={"precision": None})
    content = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert content["trainer"]["precision"] == run.metrics["run/precision"]
    assert content["trainer"]["use_distributed_sampler"] is False
    assert content["threads"] >= 1 and content["checkpoint"]["monitor"].startswith("val/")


def test_early_stopping_ends_a_run_for_good(sections: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    def start() -> mmbert.RunResult:
        stopping = EarlyStopping("val/mlm_loss", mode="min", patience=1, min_delta=100.0)
        return trained(
            sections, tmp_path, name="stopped", resume="auto", trainer={"max_epochs": 8, "callbacks": [stopping]}
        )

    first = start()
    trace, weights = (first.folder / "trace.csv").read_text(), load_file(first.folder / "model/model.safetensors")
    assert 0 < first.metrics["run/steps"] < 8 * 4
    again = start()
    assert (again.folder / "trace.csv").read_text() == trace and again.metrics["run/steps"] == first.metrics[
        "run/steps"
    ]
    resumed = load_file(again.folder / "model/model.safetensors")
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)


def test_best_of_another_metric_is_forgotten_on_resume(
    sections: dict[str, dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    more = {"name": "run", "checkpoint": {"every_n_steps": 3}, "trainer": {"max_epochs": 2}}
    run = trained(sections, tmp_path, **{**more, "checkpoint": {"every_n_steps": 3, "monitor": "val/itm_auroc"}})
    for path in (run.folder / "checkpoints").glob("step=8.ckpt*"):
        path.unlink()  # as if killed in the second epoch
    changed = {"checkpoint": {"every_n_steps": 3, "monitor": "val/mlm_loss"}, "data": {"val_size": 8}}
    again = trained(sections, tmp_path, resume="auto", **{**more, **changed})
    assert "checkpoint.monitor was val/itm_auroc and is val/mlm_loss, data.val_size was 1000 and is 8" in caplog.text
    best = [p for p in (again.folder / "checkpoints").glob("best-step=8.ckpt")]
    assert best, "the loss of the second epoch is compared with nothing and kept"


def test_precision_of_a_resumed_run_must_be_the_same(sections: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    trained(sections, tmp_path, name="run")
    with pytest.raises(UsageError, match=r"trainer.precision was '32-true' and is 'bf16-mixed'"):
        trained(sections, tmp_path, name="run", resume="auto", trainer={"precision": "bf16-mixed"})


def test_averaged_weights_are_tested_and_saved(sections: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    plain = trained(sections, tmp_path, name="plain", optim={"lr": 0.01}, trainer={"max_epochs": 2})
    ema = trained(
        sections, tmp_path, name="ema", optim={"lr": 0.01},
        trainer={"max_epochs": 2, "callbacks": [EMAWeightAveraging(decay=0.5)]},
    )  # fmt: skip
    swa = trained(
        sections, tmp_path, name="swa", optim={"lr": 0.01},
        trainer={"max_epochs": 4, "callbacks": [StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)]},
    )  # fmt: skip
    saved = {run.folder.name: load_file(run.folder / "model/model.safetensors") for run in (plain, ema, swa)}
    name = "mmbert.fusion.text_layers.0.self_attention.query.weight"
    name = name if name in saved["plain"] else next(n for n in saved["plain"] if n.endswith("query.weight"))
    assert not torch.equal(saved["plain"][name], saved["ema"][name]), "the average lags behind the weights"
    best = next((ema.folder / "checkpoints").glob("best-*.ckpt"))
    content = torch.load(best, weights_only=True)
    assert torch.equal(content["state_dict"][f"model.{name}"], saved["ema"][name])
    assert not torch.equal(content["current_model_state"][f"model.{name}"], saved["ema"][name])
    swa_best = torch.load(next((swa.folder / "checkpoints").glob("best-*.ckpt")), weights_only=True)["state_dict"]
    assert not torch.equal(swa_best[f"model.{name}"], saved["swa"][name]), (
        "no checkpoint before the end has the average"
    )


def test_frozen_weights_are_left_out_of_checkpoints(sections: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    options = {"optim": {"freeze_image": "all"}, "checkpoint": {"every_n_steps": 3}, "trainer": {"max_epochs": 2}}
    whole = trained(sections, tmp_path, name="whole", **options)
    path = latest_complete_checkpoint(whole.folder / "checkpoints")
    assert path is not None
    content = torch.load(path, weights_only=True)
    assert not any(key.startswith("model.mmbert.image_encoder.vit.blocks") for key in content["state_dict"])
    assert content["mmbert"]["frozen"]["names"]
    half = whole.folder / "checkpoints/step=6.ckpt"
    again = trained(sections, tmp_path, resume=half, **options)
    assert again.folder == whole.folder
    weights = load_file(again.folder / "model/model.safetensors")
    assert any("image_encoder.vit.blocks" in name for name in weights)
    with pytest.raises(UsageError, match="frozen weights"):
        arguments = ["--config", str(whole.folder / "config.yaml"), "--seed_everything=1", f"--ckpt_path={path}"]
        TrainingRun(parse_run([*arguments, f"--trainer.default_root_dir={tmp_path}"]), command="test").test()


def test_run_that_max_time_ends_in_its_warm_up_warns(
    sections: dict[str, dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"name": "run", "trainer": {"max_time": "00:00:00:01", "max_epochs": 100_000, "max_steps": -1}}
    steps = trained(sections, tmp_path, **options).metrics["run/steps"]
    assert "trainer.max_time ended the run at step" in caplog.text and "within its warm-up" in caplog.text
    options["trainer"]["max_time"] = "00:00:00:02"
    assert trained(sections, tmp_path, resume="auto", **options).metrics["run/steps"] > steps, "more time trains on"


def test_run_without_an_optimizer_step_warns(
    sections: dict[str, dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = trained(sections, tmp_path, trainer={"max_epochs": 0}, data={"val_size": 2})
    assert "no optimizer step was taken: the initial weights are tested and saved" in caplog.text
    assert run.metrics["run/steps"] == 0 and "test/mlm_loss" in run.metrics
    assert "nothing is tested" not in caplog.text
    run = trained(sections, tmp_path, trainer={"max_epochs": 0, "limit_test_batches": 0}, data={"val_size": 2})
    assert "trainer.limit_test_batches=0: nothing is tested" in caplog.text and "test/mlm_loss" not in run.metrics


def test_model_is_saved_before_the_test(
    sections: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def test(self: L.Trainer, *_: Any, **__: Any) -> None:
        raise SystemExit(143)  # as SIGTERM does

    monkeypatch.setattr(L.Trainer, "test", test)
    with pytest.raises(SystemExit):
        trained(sections, tmp_path, name="run")
    assert (tmp_path / "run/model/model.safetensors").is_file()
    assert "Not tested yet." in (tmp_path / "run/model/README.md").read_text()


def test_datamodule_and_module_work_with_a_plain_trainer(
    sections: dict[str, dict[str, Any]], tiny: list[str], tmp_path: Path
) -> None:
    options = parse_run(["--config", "pretrain/shapes_plain", *tiny])
    run = TrainingRun(options, dry=True)
    module = mmbert.TrainingModule(
        run.parts.model, run.parts.data, optim=mmbert.OptimOptions(), evaluation=mmbert.EvaluationOptions(), seed=0
    )
    trainer = L.Trainer(max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, barebones=False,
                        enable_progress_bar=False, default_root_dir=tmp_path, limit_val_batches=0)  # fmt: skip
    trainer.fit(module, datamodule=run.parts.data)
    assert trainer.global_step == 2


def test_training_uses_deterministic_algorithms(sections: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """So that two runs with several threads are equal, whatever a custom fusion computes."""
    seen = []

    class Look(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.append(torch.are_deterministic_algorithms_enabled())

    trained(sections, tmp_path, trainer={"max_steps": 1, "callbacks": [Look()]})
    assert seen == [True] and not torch.are_deterministic_algorithms_enabled()
