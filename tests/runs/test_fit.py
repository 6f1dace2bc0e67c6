"""Whole runs of the command line on a few drawn scenes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mmbert.cli.main import main
from mmbert.data.processor import MMBertProcessor
from mmbert.model.fusion import FUSIONS
from mmbert.model.modeling import MMBertForPreTraining
from mmbert.training.run import TrainingRun
from mmbert.training.run_folder import read_curves
from mmbert.training.run_options import parse_run

ROOT = Path(__file__).parents[2]
OTHERS = ("finetune", "compare")  # need more than `tiny`; are no configurations of fit
CONFIGS = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "configs").rglob("*.yaml") if p.parent.name not in OTHERS)
FINETUNE = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "configs/finetune").glob("*.yaml"))


def fit(tiny: list[str], root: Path, *more: str, config: str = "configs/pretrain/shapes_plain.yaml") -> None:
    main(["fit", "--config", str(ROOT / config), *tiny, f"--trainer.default_root_dir={root}", *more])


@pytest.mark.parametrize("config", CONFIGS)
def test_every_yaml_trains_and_validates(config: str, tiny: list[str], tmp_path: Path) -> None:
    fit(tiny, tmp_path, "--trainer.fast_dev_run=1", config=config)
    assert list(tmp_path.iterdir()) == [], "a dry run writes nothing"


@pytest.mark.parametrize("config", FINETUNE)
def test_every_finetuning_yaml_trains_and_validates(
    config: str, tiny_tasks: dict[str, list[str]], tmp_path: Path
) -> None:
    task = yaml.safe_load((ROOT / config).read_text())["model"]["task"]
    fit(tiny_tasks[task], tmp_path, "--trainer.fast_dev_run=1", config=config)
    assert list(tmp_path.iterdir()) == [], "a dry run writes nothing"


@pytest.mark.parametrize(("monitor", "best"), [("val/mlm_loss", min), ("val/mlm_accuracy", max)])
def test_best_checkpoint_is_the_best_of_what_is_watched(
    monitor: str, best: Any, tiny: list[str], tmp_path: Path
) -> None:
    """The learning rate rises until the loss explodes, so that the last epoch is not the best."""
    rising = ["--optim.lr=0.3", "--optim.warmup=0.9", "--trainer.gradient_clip_val=null"]
    fit(tiny, tmp_path, f"--checkpoint.monitor={monitor}", "--trainer.max_epochs=5", *rising)
    seen = read_curves(tmp_path / "shapes-plain")[monitor][:5]  # what follows is the best, validated once more
    step, _ = best(seen, key=lambda point: point[1])
    assert len({value for _, value in seen}) > 1, seen
    assert [p.stem for p in (tmp_path / "shapes-plain/checkpoints").glob("best-*.ckpt")] == [f"best-step={step + 1}"]


def test_run_of_image_labels_alone_saves_its_last_weights_and_its_heads_are_kept(
    tiny: list[str], shapes: Path, tmp_path: Path
) -> None:
    boxes = f"--data.boxes={shapes}/annotations/instances_train.json"
    objectives = "--model.objectives={ngrams: 1.0, boxes: 1.0}"
    fit(tiny, tmp_path, "--model.fusion=late", objectives, boxes, "--trainer.max_epochs=1")
    folder = tmp_path / "shapes-plain"
    assert not list((folder / "checkpoints").glob("best-*")), "no validation metric chooses a best one"
    head, of_boxes = (f"objectives.{name}.head.weight" for name in ("ngrams", "boxes"))
    saved = load_file(folder / "model/model.safetensors")
    last = torch.load(folder / "checkpoints/step=4.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(saved[head], last[f"model.{head}"])

    def started(*more: str) -> dict[str, torch.Tensor]:
        start = [f"--model.pretrained={folder}/model", "--model.pretrained_parts=encoders", *more]
        arguments = ["--config", str(ROOT / "configs/pretrain/shapes_plain.yaml"), *tiny, *start, boxes]
        run = TrainingRun(parse_run([*arguments, "--model.objectives={itm: 1.0, ngrams: 1.0, boxes: 1.0}"]), dry=True)
        return run.parts.model.state_dict()

    found = started()
    assert torch.equal(found[head], saved[head]) and torch.equal(found[of_boxes], saved[of_boxes])
    fewer = started("--data.train_fraction=0.5")[head]  # with other n-grams
    assert fewer.shape != saved[head].shape and fewer.std() < 0.03


def test_first_stage_of_masked_images_has_no_other_loss(tiny: list[str], tmp_path: Path) -> None:
    options = ["--model.objectives={mlm: 1.0, mim: 1.0}", "--optim.first_stage=mim", "--optim.first_stage_steps=2"]
    fit(tiny, tmp_path, *options, "--trainer.max_steps=4", "--trainer.log_every_n_steps=1")
    curves = read_curves(tmp_path / "shapes-plain")
    assert [step for step, _ in curves["train/mim_loss"]] == [0, 1, 2, 3]
    assert [step for step, _ in curves["train/mlm_loss"]] == [2, 3]
    model = load_file(tmp_path / "shapes-plain/model/model.safetensors")
    assert model["objectives.mim.mask_token"].shape == (32,)


def test_first_stage_that_takes_all_steps_is_told(
    tiny: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = ["--model.objectives={mlm: 1, itm: 1}", "--optim.first_stage=mlm", "--trainer.max_epochs=1"]
    file = str(ROOT / "configs/pretrain/shapes_plain.yaml")
    for steps, told in ((4, True), (3, False)):
        caplog.clear()
        arguments = ["--config", file, *tiny, *options, f"--trainer.default_root_dir={tmp_path}"]
        TrainingRun(parse_run([*arguments, f"--optim.first_stage_steps={steps}"]))
        assert ("first_stage_steps=4 takes all 4 steps of the run, and nothing trains itm" in caplog.text) == told


def test_options_without_effect_are_told(tiny: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = ["--optim.muon_lr=0.01", "--data.opposites={red: blue}", "--model.objectives.itc.ridge=1"]
    file = str(ROOT / "configs/pretrain/shapes_plain.yaml")
    TrainingRun(parse_run(["--config", file, *tiny, *options, f"--trainer.default_root_dir={tmp_path}"]), dry=True)
    told = [r.getMessage().split("=")[0] for r in caplog.records if "has no effect here" in r.getMessage()]
    assert told == ["optim.muon_lr", "data.opposites", "objectives.itc.ridge"]


@pytest.mark.parametrize("fusion", FUSIONS)
def test_run_folder_holds_what_the_readme_promises(fusion: str, tiny: list[str], tmp_path: Path) -> None:
    fit(tiny, tmp_path, "--name=first", f"--model.fusion={fusion}", "--trainer.max_epochs=1")
    folder = tmp_path / "first"
    metrics = json.loads((folder / "metrics.json").read_text())
    for split in ("val", "test", "test_seen", "test_unseen"):
        for key in ("itm_accuracy", "itm_auroc", "mlm_accuracy", "mlm_image_gain"):
            assert f"{split}/{key}" in metrics
        for direction in ("image_to_text", "text_to_image"):
            assert 0 <= metrics[f"{split}/{direction}/R@1"] <= metrics[f"{split}/{direction}/R@10"] <= 1
    if fusion == "late":
        assert metrics["test/mlm_image_gain"] == 0.0
    for key in ("wall_seconds", "samples_per_second", "peak_memory_bytes", "seed", "parameters", "version/torch"):
        assert f"run/{key}" in metrics
    kinds = ("seen", "skipped", "repeated", "lost")
    assert [metrics[f"run/samples_{kind}"] for kind in kinds] == [64, 0, 0, 0]
    assert (folder / "curves.png").stat().st_size > 5000
    assert (folder / "metrics.csv").read_text().count("\n") > 2
    assert list((folder / "tensorboard").iterdir()) and list((folder / "checkpoints").glob("best-*.ckpt"))
    loaded = MMBertForPreTraining.from_pretrained(folder / "model")
    processor = MMBertProcessor.from_pretrained(folder / "model")
    best = torch.load(next((folder / "checkpoints").glob("best-*.ckpt")), weights_only=True)["state_dict"]
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, best[f"model.{name}"]), name
    output = loaded.mmbert.eval()(**processor(text="a small red circle"))
    assert output.pooler_output.shape == (1, 32)


def test_taken_run_name_gets_a_number(tiny: list[str], tmp_path: Path) -> None:
    for _ in range(2):
        fit(tiny, tmp_path, "--name=same", "--trainer.max_steps=1", "--trainer.limit_val_batches=1")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["same", "same-2"]


def test_saved_config_runs_again_to_the_same_numbers(tiny: list[str], tmp_path: Path) -> None:
    fit(tiny, tmp_path, "--name=one", "--trainer.max_epochs=2", "--trainer.precision=32-true")
    main(["fit", "--config", str(tmp_path / "one/config.yaml"), "--name=two"])
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    varying = re.compile(r"run/(wall_seconds|training_seconds|checkpoint_seconds|samples_per_second|peak_memory_bytes)")
    assert {k: v for k, v in one.items() if not varying.match(k)} == {
        k: v for k, v in two.items() if not varying.match(k)
    }


def test_numbers_do_not_depend_on_workers_or_evaluation_batch(tiny: list[str], tmp_path: Path) -> None:
    settings = {"a": ("0", "16"), "b": ("2", "7")}
    for name, (workers, size) in settings.items():
        fit(
            tiny, tmp_path, f"--name={name}", "--trainer.max_epochs=1", "--trainer.precision=32-true",
            f"--data.num_workers={workers}", f"--data.eval_batch_size={size}",
        )  # fmt: skip
    a, b = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in settings)
    curves = [(tmp_path / name / "metrics.csv").read_text() for name in settings]
    assert len(curves[0]) == pytest.approx(len(curves[1]), rel=0.2)
    for key in a:
        if key.startswith(("val/", "test")):
            assert a[key] == pytest.approx(b[key], abs=1e-6), key


def test_test_command_gives_the_numbers_of_fit(tiny: list[str], tmp_path: Path) -> None:
    fit(tiny, tmp_path, "--name=fitted", "--trainer.max_epochs=1", "--trainer.precision=32-true")
    folder = tmp_path / "fitted"
    best = next((folder / "checkpoints").glob("best-*.ckpt"))
    main(["test", "--config", str(folder / "config.yaml"), "--ckpt_path", str(best), "--name=tested"])
    fitted, tested = (json.loads((tmp_path / n / "metrics.json").read_text()) for n in ("fitted", "tested"))
    keys = [k for k in fitted if k.startswith("test")]
    assert keys and all(fitted[k] == pytest.approx(tested[k], abs=1e-6) for k in keys)


def test_frozen_encoder_does_not_move(tiny: list[str], tmp_path: Path) -> None:
    fit(
        tiny,
        tmp_path,
        "--name=frozen",
        "--trainer.max_epochs=2",
        "--optim.freeze_image=all",
        "--optim.lr=0.01",
        "--checkpoint.every_n_steps=2",
    )
    trained = load_file(tmp_path / "frozen/model/model.safetensors")
    run = TrainingRun(parse_run(["--config", str(tmp_path / "frozen/config.yaml")]), dry=True)
    first = run.parts.model.state_dict()
    image = [n for n in trained if ".vit." in n]
    assert image and all(torch.equal(first[n], trained[n]) for n in image)
    assert any(not torch.equal(first[n], trained[n]) for n in trained)


@pytest.mark.parametrize(
    "options",
    [
        ["--optim.activation_checkpointing=true"],
        ["--trainer.accumulate_grad_batches=2", "--optim.schedule=linear"],
        ["--trainer.precision=bf16-mixed"],
        ["--data.whole_word=true", "--data.crop=0.5", "--data.flip=true"],
        ["--model.objectives={mlm: 1, itm: {negatives: hard, text: masked}, itc: 0.5}"],
        ["--model.objectives={mlm: 1, itm: 1}", "--model.fusion=early", "--model.text_layers=0",
         "--model.image_layers=0"],
        ["--evaluation.test_scorer=itm", "--evaluation.val_scorer=itm"],
    ],
    ids=["checkpointing", "accumulation", "bf16", "augmentation", "hard negatives", "ViLT style", "itm scorer"],
)  # fmt: skip
def test_options_run(options: list[str], tiny: list[str], tmp_path: Path) -> None:
    fit(tiny, tmp_path, "--name=run", "--trainer.max_epochs=1", *options)
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["run/steps"] == (2 if "accumulate" in options[0] else 4)
