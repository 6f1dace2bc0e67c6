"""Calibration of ITM in a run: training stays as it is."""

from pathlib import Path

import torch
from interrupted import fit, trace, weights
from safetensors.torch import load_file


def test_run_is_calibrated_and_trained_as_without(tiny: list[str], tmp_path: Path) -> None:
    def options(calibrate: str) -> list[str]:
        itm = f"{{residual: true, calibrate: {calibrate}}}"
        return ["--name=run", "--trainer.max_epochs=2", f"--model.objectives={{itm: {itm}, itc: 1}}"]

    fit(tiny, tmp_path / "with", *options("true"))
    fit(tiny, tmp_path / "without", *options("false"))
    assert trace(tmp_path / "with") == trace(tmp_path / "without")
    calibration = load_file(tmp_path / "with/run/model/model.safetensors")["objectives.itm.calibration"]
    assert calibration.tolist() != [1, 1, 0] and calibration[0] >= 0
    # Those of the last step: the best checkpoint is chosen by calibrated scores.
    found, plain = (weights(tmp_path / arm) for arm in ("with", "without"))
    assert found.keys() - plain.keys() == {"model.objectives.itm.calibration"}
    assert all(torch.equal(found[name], plain[name]) for name in plain)
