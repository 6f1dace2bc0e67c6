"""Calibration of ITM and refit of ITC in a run: training stays as it is."""

from pathlib import Path

import torch
from interrupted import fit, trace, weights
from safetensors.torch import load_file


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
