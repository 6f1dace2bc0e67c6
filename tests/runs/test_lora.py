"""Runs with `model.lora`: resume, the saved model, and its options."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mmbert.cli.main import main
from mmbert.inference.loaded import load
from mmbert.training.run import TrainingRun
from mmbert.training.run_options import parse_run

MORE = ["--trainer.precision=32-true", "--threads=1", "--evaluation.test_images=2", "--evaluation.val_images=2"]


def fit(folder: Path, name: str, options: list[str]) -> Path:
    main(["fit", *options, *MORE, f"--trainer.default_root_dir={folder}", f"--name={name}"])
    return folder / name


def test_run_with_adapters_resumes_and_saves_a_plain_model(tiny: list[str], tmp_path: Path) -> None:
    preset = ["--config", "pretrain/shapes_plain", *tiny]
    start = fit(tmp_path, "start", [*preset, "--trainer.max_steps=1", "--trainer.max_epochs=-1"])
    options = [
        "--config", "pretrain/shapes_plain", *tiny, f"--model.pretrained={start}/model", "--optim.lr=0.01",
        '--model.lora={"rank": 2, "targets": "both"}', "--trainer.max_epochs=2", "--checkpoint.every_n_steps=3",
    ]  # fmt: skip
    whole = fit(tmp_path, "whole", options)
    checkpoint = torch.load(whole / "checkpoints/step=6.ckpt", weights_only=True)
    kept = [name for name in checkpoint["state_dict"] if "encoder." in name]
    assert kept and all(".lora_" in name for name in kept), "frozen weights are not in checkpoints"
    trace, weights = (whole / "trace.csv").read_text(), load_file(whole / "model/model.safetensors")
    fit(tmp_path, "whole", [*options, f"--resume={whole}/checkpoints/step=6.ckpt"])
    assert (whole / "trace.csv").read_text() == trace
    again = load_file(whole / "model/model.safetensors")
    assert all(torch.equal(value, again[name]) for name, value in weights.items())

    before = load_file(start / "model/model.safetensors")
    assert weights.keys() == before.keys() and load(whole / "model").fill_mask(None, "a [MASK] circle")
    changed = {name for name in weights if not torch.equal(weights[name], before[name])}
    assert any("text_encoder.bert.encoder.layer" in name for name in changed)
    assert not any("embeddings" in name or "patch_embed" in name for name in changed), "adapters are on linear layers"
    assert "lora" not in (whole / "model/config.json").read_text()
    assert "LoRA adapters (rank: `2`, targets: `both`), merged" in (whole / "model/README.md").read_text()
    content = yaml.safe_load((whole / "config.yaml").read_text())
    assert content["model"]["lora"] == {"rank": 2, "targets": "both"}


def test_command_line_takes_single_keys(tiny: list[str]) -> None:
    options = ["--config", "pretrain/shapes_plain", *tiny, "--model.lora.rank=4"]
    assert parse_run(options).sections.model.lora == {"rank": 4}
    with pytest.raises(ValueError, match="the text encoder is random"):
        TrainingRun(parse_run(options), dry=True)
