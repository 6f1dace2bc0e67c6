"""Runs with `model.lora`: resume, the saved model, and its options."""

from pathlib import Path

import pytest
import torch
import yaml
from interrupted import trace
from processes import CONFIG, EXACT, finish, start
from safetensors.torch import load_file
from tiers import FULL

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


@pytest.mark.skipif(not FULL, reason="4 runs take 90 s: the full tier only")
def test_adapters_train_sharded_as_in_one_process_and_resume_to_the_bit(tiny: list[str], tmp_path: Path) -> None:
    start_model = fit(tmp_path, "start", [*CONFIG[1:], *tiny, "--trainer.max_steps=1", "--trainer.max_epochs=-1"])
    more = [f"--model.pretrained={start_model}/model", '--model.lora={"rank": 2}', "--name=run"]
    more += ["--checkpoint.every_n_steps=3"]
    main([*CONFIG, *tiny, *EXACT, *more, f"--trainer.default_root_dir={tmp_path / 'one'}"])
    finish(start(tiny, tmp_path / "two", *more, strategy="model_parallel"))
    one, two = ([line.split(",") for line in trace(tmp_path / name)[1:]] for name in ("one", "two"))
    assert [float.fromhex(line[3]) for line in two] == pytest.approx([float.fromhex(line[3]) for line in one], rel=1e-5)
    weights = [load_file(tmp_path / name / "run/model/model.safetensors") for name in ("one", "two")]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=2e-3)
    for file in (tmp_path / "two/run/checkpoints").glob("step=8.ckpt*"):
        file.unlink()
    assert "resuming at step 6" in finish(
        start(tiny, tmp_path / "two", *more, "--resume=auto", strategy="model_parallel")
    )
    assert [line.split(",") for line in trace(tmp_path / "two")[1:]] == two
