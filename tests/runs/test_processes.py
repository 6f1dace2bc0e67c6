"""Training in two processes (DDP on gloo): the numbers of one process, no hang at uneven ends, and no orphan."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from interrupted import results, trace
from processes import CONFIG, EXACT, finish, fit_in_two, start
from tiers import FULL

from mmbert.cli.main import main
from mmbert.model.modeling import MMBertForPreTraining


# torchrun starts the runs of the tests below too; here it adds 2 imports of everything.
@pytest.mark.parametrize("torchrun", [False, True] if FULL else [False], ids=lambda x: "torchrun" if x else "lightning")
def test_two_processes_train_and_evaluate_as_one(torchrun: bool, tiny: list[str], tmp_path: Path) -> None:
    # 15 validation pairs in batches of 4: one process has 2 batches, the other 2; 7 pairs and 8.
    more = ["--name=run", "--data.val_size=15", "--data.eval_batch_size=4", "--evaluation.test_scorer=itm"]
    main([*CONFIG, *tiny, *EXACT, *more, f"--trainer.default_root_dir={tmp_path / 'one'}"])
    errors = finish(start(tiny, tmp_path / "two", *more, torchrun=torchrun))
    # torch reports where nothing was unused, on stderr and not as a Python warning; a batch may leave something unused.
    unexpected = [line for line in errors.splitlines() if "Warning" in line and "find_unused_parameters" not in line]
    assert not unexpected, errors
    one, two = ([line.split(",") for line in trace(tmp_path / name)[1:]] for name in ("one", "two"))
    assert [line[:3] for line in one] == [line[:3] for line in two], "the same samples in every step"
    for a, b in zip(one, two, strict=True):
        assert float.fromhex(b[3]) == pytest.approx(float.fromhex(a[3]), rel=1e-5)
    expected, found = results(tmp_path / "one"), results(tmp_path / "two")
    assert set(expected) == set(found)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4), name


ALONE = {"itc": ("late", "{itc: 1}"), "mlm": ("hybrid", "{mlm: 1}"), "mlm and itc": ("early", "{mlm: 1, itc: 1}")}
"""Combinations of which a step leaves parameters without a gradient: late fusion's MLP, hybrid's joint vector."""


@pytest.mark.parametrize("name", ALONE if FULL else ["itc", "mlm"])
def test_objectives_that_leave_parameters_unused_train_in_two_processes_as_in_one(
    name: str, tiny: list[str], tmp_path: Path
) -> None:
    fusion, objectives = ALONE[name]
    more = ["--name=run", f"--model.fusion={fusion}", f"--model.objectives={objectives}", "--trainer.max_epochs=1"]
    more += ["--data.val_size=4", "--evaluation.test_images=4"]
    main([*CONFIG, *tiny, *EXACT, *more, f"--trainer.default_root_dir={tmp_path / 'one'}"])
    fit_in_two(tiny, tmp_path / "two", *more)
    one, two = ([line.split(",") for line in trace(tmp_path / name)[1:]] for name in ("one", "two"))
    assert [line[:3] for line in one] == [line[:3] for line in two], "the same samples in every step"
    losses = [[float.fromhex(line[3]) for line in lines] for lines in (one, two)]
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=1e-5)
    expected, found = results(tmp_path / "one"), results(tmp_path / "two")
    assert found == pytest.approx(expected, rel=1e-4)


SOLVED = (
    "{mlm: 1, itm: {weight: 1, residual: true, calibrate: true}, "
    "itc: {weight: 1, init: closed_form, refit: true, embedding_size: 4}}"
)
"""Objectives with parts that are computed from the gathered weights before step 1 and before each validation."""


@pytest.mark.parametrize("solved", [False, True] if FULL else [True])
def test_fsdp_trains_as_one_process_and_resumes_to_the_bit(solved: bool, tiny: list[str], tmp_path: Path) -> None:
    # Validation and test have 3 batches: 2 for one process, 1 for the other.
    more = ["--name=run", "--checkpoint.every_n_steps=3", "--data.val_size=15", "--data.eval_batch_size=5"]
    more += ["--evaluation.test_images=15", *([f"--model.objectives={SOLVED}"] if solved else [])]
    main([*CONFIG, *tiny, *EXACT, *more, f"--trainer.default_root_dir={tmp_path / 'one'}"])
    finish(start(tiny, tmp_path / "two", *more, strategy="model_parallel"))
    one, two = ([line.split(",") for line in trace(tmp_path / name)[1:]] for name in ("one", "two"))
    assert [line[:3] for line in one] == [line[:3] for line in two]
    for a, b in zip(one, two, strict=True):
        assert float.fromhex(b[3]) == pytest.approx(float.fromhex(a[3]), rel=1e-5)
    expected, found = results(tmp_path / "one"), results(tmp_path / "two")
    assert set(expected) == set(found)
    for name in ("test/mlm_loss", "test/itm_loss", "val/mlm_loss"):  # ranks may swap where two scores nearly agree
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name
    weights = [
        MMBertForPreTraining.from_pretrained(tmp_path / name / "run/model").state_dict() for name in ("one", "two")
    ]
    for name, value in weights[0].items():
        # The closed form of a few near-equal texts amplifies small differences of the encoders.
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=2e-2 if "refit" in name else 2e-3)

    for file in (tmp_path / "two/run/checkpoints").glob("step=8.ckpt*"):
        file.unlink()
    errors = finish(start(tiny, tmp_path / "two", *more, "--resume=auto", strategy="model_parallel"))
    assert "resuming at step 6" in errors
    assert [line.split(",") for line in trace(tmp_path / "two")[1:]] == two


def test_one_validation_pair_for_two_processes_does_not_hang(tiny: list[str], tmp_path: Path) -> None:
    errors = finish(start(tiny, tmp_path, "--data.val_size=1", "--trainer.max_epochs=1"))
    assert "val/itm_auroc" in errors, "without a second pair nothing can be chosen on validation, and that is said"


def processes_of(torchrun: subprocess.Popen[str]) -> list[int]:
    """Process numbers of rank 0 and 1."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
        for variable in environment:
            if variable.startswith(b"RANK=") and parent == torchrun.pid:
                found[int(variable[5:])] = int(folder.name)
    return [found[rank] for rank in sorted(found)]


def wait_for(condition: object, *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # pyright: ignore
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes in /proc")
@pytest.mark.parametrize(("name", "rank", "seconds"), [("SIGTERM", 1, 30), ("SIGKILL", 1, 60)])
def test_signal_to_one_process_ends_both_with_a_checkpoint(
    name: str, rank: int, seconds: float, tiny: list[str], tmp_path: Path
) -> None:
    run = start(tiny, tmp_path, "--name=run", "--trainer.max_epochs=2000", "--checkpoint.every_n_steps=3")
    file = tmp_path / "run/trace.csv"
    wait_for(lambda: file.is_file() and len(file.read_text().splitlines()) > 8, seconds=90)
    os.kill(processes_of(run)[rank], getattr(signal, name))
    started = time.monotonic()
    errors = run.communicate(timeout=seconds)[1]
    assert time.monotonic() - started < seconds
    assert run.returncode != 0
    steps = int(file.read_text().splitlines()[-1].split(",")[0])
    latest = (tmp_path / "run/checkpoints/latest").read_text().strip()
    if name == "SIGTERM":
        assert latest == f"step={steps}.ckpt", errors
    else:
        assert steps - int(latest[5:-5]) <= 3
    # Both go on from there, to the same curve.
    more = ["--name=run", "--resume=auto", "--trainer.max_epochs=2000", "--checkpoint.every_n_steps=3"]
    again = start(tiny, tmp_path, *more)
    wait_for(lambda: len(file.read_text().splitlines()) > steps + 5, seconds=90)
    again.terminate()  # passed on to both; killed, torchrun would leave orphans
    again.communicate(timeout=60)
