"""Calibration of ITM in a run: training stays as it is."""

from pathlib import Path

import torch
from interrupted import fit, trace
from safetensors.torch import load_file


def test_run_is_calibrated_and_trained_as_without(tiny: list[str], tmp_path: Path) -> None:
    def options(calibrate: str) -> list[str]:
        itm = f"{{residual: true, calibrate: {calibrate}}}"
        return ["--name=run", "--trainer.max_epochs=1", f"--model.objectives={{itm: {itm}, itc: 1}}"]

    fit(tiny, tmp_path / "with", *options("true"))
    fit(tiny, tmp_path / "without", *options("false"))
    assert trace(tmp_path / "with") == trace(tmp_path / "without")
    found, plain = (load_file(tmp_path / arm / "run/model/model.safetensors") for arm in ("with", "without"))
    calibration = found.pop("objectives.itm.calibration")
    assert calibration.tolist() != [1, 1, 0] and calibration[0] >= 0
    assert found.keys() == plain.keys() and all(torch.equal(found[name], plain[name]) for name in plain)
