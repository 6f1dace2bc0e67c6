"""Kill a run at any moment, resume it, and its loss curve is bit-identical to that of a run that was left alone."""

import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import fit, killed, results, trace, weights

from mmbert.training import module as training
from mmbert.training.run_folder import read_curves


@pytest.fixture(scope="module")
def whole(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that was never interrupted."""
    root = tmp_path_factory.mktemp("whole")
    fit(tiny, root, "--name=run")
    return root


@pytest.mark.parametrize("batch", [1, 3, 4, 5, 7, 8, 11])
def test_resumed_run_is_bit_identical(batch: int, whole: Path, tiny: list[str], tmp_path: Path) -> None:
    killed(lambda: fit(tiny, tmp_path, "--name=run"), after_batch=batch)
    fit(tiny, tmp_path, "--name=run", "--resume=auto")
    assert trace(tmp_path) == trace(whole)
    assert len(trace(whole)) == 13
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(tmp_path)[name]), name
    assert results(tmp_path) == results(whole)


def test_validation_of_a_run_that_is_resumed_between_epochs_has_the_same_steps(tiny: list[str], tmp_path: Path) -> None:
    """Without a last epoch Lightning counts one step too many (seen as a comparison's curve at step 7 of 6)."""
    options = ["--name=run", "--trainer.max_epochs=-1", "--trainer.max_steps=6"]
    fit(tiny, tmp_path / "whole", *options)
    killed(lambda: fit(tiny, tmp_path / "killed", *options), after_batch=5, hook="on_train_batch_start")
    fit(tiny, tmp_path / "killed", *options, "--resume=auto")
    assert trace(tmp_path / "killed") == trace(tmp_path / "whole")
    curves, expected = (
        {k: v for k, v in read_curves(tmp_path / name / "run").items() if k != "samples/s"}
        for name in ("killed", "whole")
    )
    assert curves == expected and [step for step, _ in curves["val/itm_loss"]] == [3, 6]


def test_run_that_is_resumed_after_its_last_step_is_tested_at_that_step(tiny: list[str], tmp_path: Path) -> None:
    """The step ends no epoch: in its checkpoint Lightning's counter of logged steps is one behind."""
    options = ["--name=run", "--trainer.max_epochs=-1", "--trainer.max_steps=6", "--checkpoint.every_n_steps=1"]
    fit(tiny, tmp_path, *options)
    expected = read_curves(tmp_path / "run")
    assert [step for step, _ in expected["test/itm_loss"]] == [6]
    fit(tiny, tmp_path, *options, "--resume=auto")
    assert read_curves(tmp_path / "run") == expected


def test_logged_learning_rate_is_that_of_the_step(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used, step = [], torch.optim.AdamW.step

    def recorded(self: torch.optim.AdamW, *arguments: Any, **keywords: Any) -> Any:
        used.append(self.param_groups[0]["lr"])
        return step(self, *arguments, **keywords)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    fit(tiny, tmp_path, "--name=run", "--trainer.max_epochs=2", "--optim.warmup=0.5")
    logged = [value for _, value in read_curves(tmp_path / "run")["train/lr"]]
    assert len({*used}) > 4 and logged == pytest.approx(used)


def test_run_killed_between_epochs_is_bit_identical(whole: Path, tiny: list[str], tmp_path: Path) -> None:
    """The newest checkpoint is that of the epoch's end, where Lightning takes no part of an epoch to be left."""
    killed(lambda: fit(tiny, tmp_path, "--name=run"), after_batch=2, hook="on_train_epoch_start")
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step=4.ckpt\n"
    fit(tiny, tmp_path, "--name=run", "--resume=auto")
    assert trace(tmp_path) == trace(whole)
    assert results(tmp_path) == results(whole)


@pytest.mark.parametrize("workers", [1, 2])
def test_resumed_run_is_bit_identical_with_workers(workers: int, whole: Path, tiny: list[str], tmp_path: Path) -> None:
    options = ["--name=run", f"--data.num_workers={workers}"]
    killed(lambda: fit(tiny, tmp_path, *options), after_batch=6)
    fit(tiny, tmp_path, *options, "--resume=auto")
    assert trace(tmp_path) == trace(whole)


def test_chain_of_kills_is_bit_identical(whole: Path, tiny: list[str], tmp_path: Path) -> None:
    for batch in (2, 1, 3):  # two of them in one epoch
        killed(lambda: fit(tiny, tmp_path, "--name=run", "--resume=auto"), after_batch=batch)
    fit(tiny, tmp_path, "--name=run", "--resume=auto")
    assert trace(tmp_path) == trace(whole)


def test_accumulation_resumes_on_its_boundary(tiny: list[str], tmp_path: Path) -> None:
    options = ["--name=run", "--trainer.accumulate_grad_batches=2"]
    fit(tiny, tmp_path / "whole", *options)
    killed(lambda: fit(tiny, tmp_path / "killed", *options), after_batch=3)
    fit(tiny, tmp_path / "killed", *options, "--resume=auto")
    assert trace(tmp_path / "killed") == trace(tmp_path / "whole")
    assert len(trace(tmp_path / "whole")) == 7


@pytest.mark.parametrize(
    ("accumulated", "steps", "hook"), [(1, 9, "on_train_epoch_start"), (2, 6, "on_train_batch_end")]
)
def test_limited_epochs_have_all_their_steps_and_resume(
    accumulated: int, steps: int, hook: str, tiny: list[str], tmp_path: Path
) -> None:
    """The limit does not divide the 4 batches of an epoch: what is left of it must not be the next one."""
    options = ["--name=run", "--trainer.limit_train_batches=3", f"--trainer.accumulate_grad_batches={accumulated}"]
    fit(tiny, tmp_path / "whole", *options)
    rates = [rate for _, rate in read_curves(tmp_path / "whole/run")["train/lr"]]
    assert len(trace(tmp_path / "whole")) == 1 + steps and rates[-1] < 0.2 * max(rates)
    # Between epochs 1 and 2, and within epoch 2: with accumulation before the step of its batches 4 and 5.
    killed(lambda: fit(tiny, tmp_path / "killed", *options), after_batch=2 if accumulated == 1 else 5, hook=hook)
    fit(tiny, tmp_path / "killed", *options, "--resume=auto")
    assert trace(tmp_path / "killed") == trace(tmp_path / "whole")


def test_time_of_a_resumed_run_is_that_of_its_training(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning starts no epoch anew that a run was killed in: the clock would show how long the machine is up."""
    killed(lambda: fit(tiny, tmp_path, "--name=run"), after_batch=2)
    now = time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: 1e7 + now())
    started = now()
    fit(tiny, tmp_path, "--name=run", "--resume=auto")
    found = json.loads((tmp_path / "run/metrics.json").read_text())
    assert 0 < found["run/training_seconds"] < 60 + now() - started
    assert found["run/samples_per_second"] > 1


def test_metrics_file_of_a_resumed_run_is_continuous(tiny: list[str], whole: Path, tmp_path: Path) -> None:
    # A step is logged after its checkpoint is written: killed between the two, that one line is lost.
    killed(lambda: fit(tiny, tmp_path, "--name=run"), after_batch=7, hook="on_train_batch_start")
    fit(tiny, tmp_path, "--name=run", "--resume=auto")
    steps = [
        [row.split(",")[header.split(",").index("step")] for row in rows]
        for header, *rows in ((root / "run/metrics.csv").read_text().splitlines() for root in (whole, tmp_path))
    ]
    assert sorted(set(steps[1]), key=int) == sorted(set(steps[0]), key=int)


def test_resume_auto_without_a_checkpoint_says_that_it_starts_at_zero(
    tiny: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(tiny, tmp_path, "--name=run", "--resume=auto", "--trainer.max_epochs=1")
    assert "starts at step 0" in caplog.text
    assert len(trace(tmp_path)) == 5


@pytest.mark.parametrize("damage", ["cut", "flip", "no sum"])
def test_torn_checkpoint_falls_back_with_a_warning(
    damage: str, whole: Path, tiny: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    killed(lambda: fit(tiny, tmp_path, "--name=run"), after_batch=7)
    newest = max((tmp_path / "run/checkpoints").glob("step=*.ckpt"), key=lambda p: int(p.stem.split("=")[1]))
    content = bytearray(newest.read_bytes())
    if damage == "cut":
        newest.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[len(content) // 3] ^= 1
        newest.write_bytes(content)
    else:
        newest.with_name(newest.name + ".sha256").unlink()
    fit(tiny, tmp_path, "--name=run", "--resume=auto")
    assert "is damaged" in caplog.text
    assert trace(tmp_path) == trace(whole)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("--data.batch_size=8", "data.batch_size was 16 and is 8"),
        ("--model.fusion=late", "model.fusion was 'hybrid' and is 'late'"),
        ("--seed_everything=1", "seed_everything was 0 and is 1"),
        ("--trainer.gradient_clip_val=0.5", "trainer.gradient_clip_val was 1.0 and is 0.5"),
        ("--trainer.limit_train_batches=2", "trainer.limit_train_batches was None and is 2"),
    ],
)
def test_resume_refuses_another_run(
    change: str, named: str, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed(lambda: fit(tiny, tmp_path, "--name=run"), after_batch=2)
    before = trace(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        fit(tiny, tmp_path, "--name=run", "--resume=auto", change)
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err
    assert trace(tmp_path) == before, "nothing is lost"


def test_resume_refuses_other_captions_and_another_tokenizer_behind_the_same_paths(
    tiny: list[str], shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = tmp_path / "shapes"
    for name in ("tokenizer", "annotations"):
        shutil.copytree(shapes / name, copied / name)
    files = {split: str(copied / f"annotations/captions_{split}.json") for split in ("train", "val")}
    options = ["--name=run", f"--data.tokenizer={copied}/tokenizer", f"--data.annotations={json.dumps(files)}"]
    killed(lambda: fit(tiny, tmp_path, *options), after_batch=2)

    def refused() -> str:
        with pytest.raises(SystemExit) as stopped:
            fit(tiny, tmp_path, *options, "--resume=auto")
        assert stopped.value.code == 2
        return capsys.readouterr().err

    train = copied / "annotations/captions_train.json"
    before = train.read_text()
    train.write_text(before.replace(" circle", " square", 1))
    assert "training pairs (SHA-256) was" in refused()
    train.write_text(before)
    tokenizer = copied / "tokenizer/tokenizer.json"
    content = json.loads(tokenizer.read_text())
    words = content["model"]["vocab"]
    words["red"], words["blue"] = words["blue"], words["red"]
    tokenizer.write_text(json.dumps(content))
    assert "tokenizer (SHA-256) was" in refused()
    # The same tokenizer elsewhere is the same tokenizer.
    fit(tiny, tmp_path, *options, "--resume=auto", f"--data.tokenizer={shapes}/tokenizer", "--trainer.max_epochs=3")
    assert len(trace(tmp_path)) == 13


def test_resume_refuses_another_number_of_processes(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    killed(lambda: fit(tiny, tmp_path, "--name=run"), after_batch=2)
    monkeypatch.setattr(training, "world_size", lambda: 2)
    with pytest.raises(SystemExit) as stopped:
        fit(tiny, tmp_path, "--name=run", "--resume=auto")
    assert stopped.value.code == 2
    assert "processes was 1 and is 2" in capsys.readouterr().err


def test_closed_form_is_solved_once(tiny: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A resumed run goes on from the projections of the checkpoint, bit by bit."""
    itm, itc = "{residual: true, negative_texts: true}", "{init: closed_form, pool: first_and_mean, embedding_size: 16}"
    options = ["--name=run", f"--model.objectives={{mlm: 1, itm: {itm}, itc: {itc}}}"]
    with caplog.at_level(logging.INFO, "mmbert"):
        fit(tiny, tmp_path / "whole", *options)
        assert sum("16 directions from 320 training pairs" in r.getMessage() for r in caplog.records) == 1
        caplog.clear()
        killed(lambda: fit(tiny, tmp_path / "killed", *options), after_batch=3)
        fit(tiny, tmp_path / "killed", *options, "--resume=auto")
    # The killed run is another process, whose log is not seen here.
    assert not any("16 directions from" in r.getMessage() for r in caplog.records)
    assert trace(tmp_path / "killed") == trace(tmp_path / "whole")
