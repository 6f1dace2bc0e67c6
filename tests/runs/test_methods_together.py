"""Every training method at once: image warm-up on boxes, n-grams, closed form, momentum model, Muon, edits, rtd, mim.

The same guarantees as for plain runs: resume, SIGKILL at random times, workers and processes change no number.
"""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from interrupted import fit, killed, killed_at, results, trace, weights
from processes import CONFIG, EXACT, fit_in_two
from safetensors.torch import load_file
from tiers import FULL

from mmbert.cli.main import main
from mmbert.model.modeling import MMBertForPreTraining
from mmbert.training.momentum import MomentumDistillation

OBJECTIVES = (
    "{boxes: 1.0, ngrams: {weight: 1.0, min_fraction: 0.1}, mlm: 1.0, "
    "itm: {weight: 1.0, edited: 0.5, negatives: {hard: 0.9, warmup: 0.5}}, "
    "itc: {weight: 1.0, init: closed_form, embedding_size: 16}, rtd: 1.0, mim: 0.5}"
)
TOGETHER = [
    "--name=run", "--optim.name=muon", "--optim.first_stage=boxes", "--optim.first_stage_steps=3",
    f"--model.objectives={OBJECTIVES}", "--optim.momentum_distillation={decay: 0.9, alpha: 0.4, ramp_steps: 6}",
    "--data.mask_content=true", "--data.opposites={left: right}",
]  # fmt: skip
KILLS = 20

full_tier = pytest.mark.skipif(not FULL, reason="several runs take 10 s and more: the full tier only")


def averages(root: Path) -> dict[str, torch.Tensor]:
    """Averages of the momentum model in the last checkpoint."""
    newest = max((root / "run/checkpoints").glob("step=*.ckpt"), key=lambda p: int(p.stem.split("=")[1]))
    return torch.load(newest, weights_only=True)["mmbert"]["momentum"]


def assert_same_run(root: Path, whole: Path) -> None:
    assert trace(root) == trace(whole) and len(trace(whole)) == 13
    assert results(root) == results(whole)
    for found, expected in ((weights(root), weights(whole)), (averages(root), averages(whole))):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.fixture(scope="module")
def tiny(tiny: list[str], shapes: Path) -> list[str]:
    """With the boxes of the training images, which follow crops and mirroring."""
    return [*tiny, f"--data.boxes={shapes}/annotations/instances_train.json"]


@pytest.fixture(scope="module")
def whole(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that was never interrupted."""
    root = tmp_path_factory.mktemp("together")
    fit(tiny, root, *TOGETHER)
    return root


def test_run_killed_in_either_stage_resumes_bit_identically(whole: Path, tiny: list[str], tmp_path: Path) -> None:
    for batch in (2, 4):  # from the start, and from the second batch
        killed(lambda: fit(tiny, tmp_path, *TOGETHER, "--resume=auto"), after_batch=batch)
    fit(tiny, tmp_path, *TOGETHER, "--resume=auto")
    assert_same_run(tmp_path, whole)


def test_saved_model_has_its_classes_and_no_momentum_model(whole: Path) -> None:
    model = MMBertForPreTraining.from_pretrained(whole / "run/model")
    assert model.objectives["ngrams"].head.weight.shape[0] == len(model.config.ngrams) > 5  # pyright: ignore
    assert "red circle" in model.config.box_classes
    assert model.objectives["boxes"].head.weight.shape[0] == len(model.config.box_classes)  # pyright: ignore
    parameters = sum(p.numel() for p in model.parameters())
    assert json.loads((whole / "run/metrics.json").read_text())["run/parameters"] == parameters
    assert load_file(whole / "run/model/model.safetensors").keys() == model.state_dict().keys()
    assert {name.removeprefix("model.") for name in weights(whole)} == model.state_dict().keys()
    # The averages follow the weights, but have not reached them.
    final, found = weights(whole), averages(whole)
    assert not any(torch.equal(final[f"model.{name}"], value) for name, value in found.items() if value.ndim > 1)


@full_tier
def test_late_interaction_with_the_cache_resumes_bit_identically(tiny: list[str], tmp_path: Path) -> None:
    """ITC of tokens with momentum distillation, hard negatives and images of the encoder cache; mim trains images."""
    tokens = OBJECTIVES.replace("init: closed_form", "interaction: tokens").replace(", mim: 0.5", "")
    options = [
        *TOGETHER, f"--model.objectives={tokens}", "--data.crop=1", "--data.flip=false", "--optim.freeze_image=all",
        f"--data.cache={tmp_path / 'cache'}",
    ]  # fmt: skip
    fit(tiny, tmp_path / "whole", *options)
    killed(lambda: fit(tiny, tmp_path / "killed", *options), after_batch=6)
    fit(tiny, tmp_path / "killed", *options, "--resume=auto")
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


@full_tier
@pytest.mark.parametrize("batch", [1, 3, 4, 5, 8, 11])
def test_run_killed_after_a_batch_resumes_bit_identically(
    batch: int, whole: Path, tiny: list[str], tmp_path: Path
) -> None:
    killed(lambda: fit(tiny, tmp_path, *TOGETHER), after_batch=batch)
    fit(tiny, tmp_path, *TOGETHER, "--resume=auto")
    assert_same_run(tmp_path, whole)


@full_tier
def test_soft_targets_change_the_curve_after_the_first_stage(whole: Path, tiny: list[str], tmp_path: Path) -> None:
    fit(tiny, tmp_path, *(option for option in TOGETHER if "momentum" not in option))
    with_momentum, without = trace(whole), trace(tmp_path)
    assert with_momentum[:5] == without[:5], "a first stage of 3 steps, and alpha 0 in the next"
    assert all(a != b for a, b in zip(with_momentum[5:], without[5:], strict=True))


@full_tier
def test_random_kills_change_nothing(whole: Path, tiny: list[str], tmp_path: Path) -> None:
    rng, kills, root, number = np.random.default_rng(0), 0, tmp_path, 0
    started = time.monotonic()
    assert not killed_at(lambda: fit(tiny, tmp_path / "timed", *TOGETHER), seconds=240)
    length = time.monotonic() - started
    while kills < KILLS:
        root, number = tmp_path / f"{number}", number + 1
        while kills < KILLS:
            seconds = float(rng.uniform(0, length))
            if not killed_at(lambda root=root: fit(tiny, root, *TOGETHER, "--resume=auto"), seconds=seconds):
                break
            kills += 1
        else:
            fit(tiny, root, *TOGETHER, "--resume=auto")
        assert_same_run(root, whole)


@full_tier
def test_workers_change_nothing(whole: Path, tiny: list[str], tmp_path: Path) -> None:
    options = [*TOGETHER, "--data.num_workers=2"]
    killed(lambda: fit(tiny, tmp_path, *options), after_batch=6)
    fit(tiny, tmp_path, *options, "--resume=auto")
    assert_same_run(tmp_path, whole)


@full_tier
def test_two_processes_train_as_one(tiny: list[str], tmp_path: Path) -> None:
    """Without dropout, which differs between ranks."""
    more = [*TOGETHER, "--data.crop=0.7"]
    main([*CONFIG, *tiny, *EXACT, *more, f"--trainer.default_root_dir={tmp_path / 'one'}"])
    fit_in_two(tiny, tmp_path / "two", *more)
    one, two = ([line.split(",") for line in trace(tmp_path / name)[1:]] for name in ("one", "two"))
    assert len(one) == 8 and [line[:3] for line in one] == [line[:3] for line in two], "the same samples in every step"
    losses = [[float.fromhex(line[3]) for line in lines] for lines in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    found, expected = averages(tmp_path / "two"), averages(tmp_path / "one")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-4)


@full_tier
def test_accumulation_updates_the_momentum_model_once_a_step(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, updates = MomentumDistillation.update, [0]

    def counting(self: MomentumDistillation) -> None:
        updates[0] += 1
        original(self)

    monkeypatch.setattr(MomentumDistillation, "update", counting)
    fit(tiny, tmp_path, *TOGETHER, "--trainer.accumulate_grad_batches=2", "--trainer.limit_test_batches=1")
    assert updates[0] == 6 == len(trace(tmp_path)) - 1
