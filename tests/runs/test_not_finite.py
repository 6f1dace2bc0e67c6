"""A loss that is not finite stops the run before the optimizer takes the step, and says what the step saw."""

import json
from pathlib import Path

import pytest
import torch
from interrupted import fit, trace

from mmbert.model.modeling import MMBertForPreTraining
from mmbert.training.checkpoints import VerifiedCheckpointIO, latest_complete_checkpoint


@pytest.mark.parametrize(
    ("where", "said"), [("loss", "the loss is nan"), ("gradient", "the norm of the gradient is nan")]
)
def test_run_stops_with_step_rates_norms_and_samples(
    where: str,
    said: str,
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original, calls = MMBertForPreTraining.forward, [0]

    def poisoned(self: MMBertForPreTraining, *arguments: object, **options: object) -> object:
        output = original(self, *arguments, **options)  # pyright: ignore
        calls[0] += self.training
        if calls[0] == 7 and where == "loss":
            mlm = output.objectives["mlm"]._replace(loss=output.loss * torch.nan)
            output.objectives["mlm"], output.loss = mlm, mlm.loss
        elif calls[0] == 7:
            output.loss.register_hook(lambda gradient: gradient * torch.nan)
        return output

    monkeypatch.setattr(MMBertForPreTraining, "forward", poisoned)
    with pytest.raises(SystemExit) as stopped:
        fit(tiny, tmp_path, "--name=run", "--trainer.accumulate_grad_batches=2")
    assert stopped.value.code == 1
    errors = capsys.readouterr().err
    assert f"step 4: {said}" in errors
    assert f"{tmp_path}/run/not_finite.json" in errors
    facts = json.loads((tmp_path / "run/not_finite.json").read_text())
    assert facts["step"] == 4
    assert set(facts["learning_rates"]) == set(facts["gradient_norms_after_clipping"])
    assert len(facts["sample_ids"]) == len(facts["samples"]) == 32, "both batches of the step"
    assert facts["samples"][0]["image"].endswith(".png")
    assert [set(losses) for losses in facts["losses"]] == [{"mlm", "itm", "itc"}] * 2
    assert len(trace(tmp_path)) == 4, "three steps were taken"
    newest = latest_complete_checkpoint(tmp_path / "run/checkpoints")
    assert newest is not None
    weights = VerifiedCheckpointIO().load_checkpoint(newest)["state_dict"]
    assert all(bool(value.isfinite().all()) for value in weights.values())
