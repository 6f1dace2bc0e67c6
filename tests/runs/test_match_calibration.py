"""Calibration of ITM and refit of ITC in a run: training stays as it is."""

from pathlib import Path

import pytest
import torch
from interrupted import fit, trace, weights
from safetensors.torch import load_file

from mmbert.cli.main import main

SOLVED = "objectives.itm.calibration", "objectives.itc.refit_text_weight", "objectives.itc.refit_image_bias"


def options(value: str) -> list[str]:
    itm, itc = f"{{calibrate: {value}}}", f"{{init: closed_form, embedding_size: 8, refit: {value}}}"
    return ["--name=run", "--trainer.max_epochs=2", "--optim.lr=0.01", f"--model.objectives={{itm: {itm}, itc: {itc}}}"]


def test_weights_that_no_validation_saw_are_solved_before_they_are_saved(tiny: list[str], tmp_path: Path) -> None:
    fit(tiny, tmp_path / "unseen", *options("true"), "--trainer.limit_val_batches=0")
    fit(tiny, tmp_path / "seen", *options("true"))
    saved, last = load_file(tmp_path / "unseen/run/model/model.safetensors"), weights(tmp_path / "seen")
    assert all(torch.equal(saved[name], last[f"model.{name}"]) for name in SOLVED)


def test_refit_of_a_model_that_was_trained_without_is_refused(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tiny, tmp_path, *options("false"))
    capsys.readouterr()
    pretrained = [f"--model.pretrained={tmp_path}/run/model", f"--trainer.default_root_dir={tmp_path}"]
    with pytest.raises(SystemExit) as stopped:
        main(["test", *[x for x in tiny if not x.startswith("--model.")], *pretrained, options("true")[-1]])
    assert stopped.value.code == 2
    assert "this model was trained without it" in capsys.readouterr().err


def test_run_is_calibrated_and_trained_as_without(tiny: list[str], tmp_path: Path) -> None:
    def options(value: str) -> list[str]:
        itm = f"{{residual: true, calibrate: {value}}}"
        itc = f"{{init: closed_form, embedding_size: 8, refit: {value}}}"
        return ["--name=run", "--trainer.max_epochs=2", f"--model.objectives={{itm: {itm}, itc: {itc}}}"]

    fit(tiny, tmp_path / "with", *options("true"))
    fit(tiny, tmp_path / "without", *options("false"))
    assert trace(tmp_path / "with") == trace(tmp_path / "without")
    saved = load_file(tmp_path / "with/run/model/model.safetensors")
    calibration = saved["objectives.itm.calibration"]
    assert calibration.tolist() != [1, 1, 0] and calibration[0] >= 0
    # Those of the last step: the best checkpoint is chosen by calibrated scores.
    found, plain = (weights(tmp_path / arm) for arm in ("with", "without"))
    refit = [f"objectives.itc.refit_{side}_{part}" for side in ("text", "image") for part in ("weight", "bias")]
    assert found.keys() - plain.keys() == {f"model.{name}" for name in ["objectives.itm.calibration", *refit]}
    projection = saved["objectives.itc.text_projection.weight"]
    assert saved[refit[0]].any() and not torch.allclose(saved[refit[0]], projection, atol=1e-2)
    assert all(torch.equal(found[name], plain[name]) for name in plain)
