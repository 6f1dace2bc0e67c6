"""SIGKILL at random times, wherever the run is by then: its start, a step, a save, validation, the end."""

import time
from pathlib import Path

import numpy as np
import torch
from interrupted import fit, killed_at, results, trace, weights
from tiers import tier

from mmbert.training.checkpoints import is_complete, latest_complete_checkpoint, step_of

KILLS = tier(5, 50)


def steps_done(root: Path) -> int:
    lines = trace(root) if (root / "run/trace.csv").is_file() else []
    return int(lines[-1].split(",")[0]) if len(lines) > 1 and lines[-1].count(",") == 3 else 0


def test_random_kills_lose_at_most_one_step_and_change_nothing(tiny: list[str], tmp_path: Path) -> None:
    options = ["--name=run", "--resume=auto"]
    whole = tmp_path / "whole"
    started = time.monotonic()
    assert not killed_at(lambda: fit(tiny, whole, *options), seconds=120)
    length = time.monotonic() - started
    rng = np.random.default_rng(0)
    kills = number = 0
    while kills < KILLS:
        root, number, going_on = tmp_path / f"{number}", number + 1, True
        while going_on and kills < KILLS:
            started = time.monotonic()
            going_on = killed_at(lambda root=root: fit(tiny, root, *options), seconds=float(rng.uniform(0, length)))
            kills += going_on
            if not going_on:
                length = min(length, time.monotonic() - started)  # the first run was cold, or the machine busy
                break
            newest = latest_complete_checkpoint(root / "run/checkpoints")
            assert steps_done(root) - (step_of(newest) if newest else 0) <= 1, "the interval is one step"
            latest = root / "run/checkpoints/latest"
            assert not latest.is_file() or is_complete(latest.with_name(latest.read_text().strip()))
        if going_on:
            fit(tiny, root, *options)
        assert trace(root) == trace(whole)
        assert results(root) == results(whole)
        for name, value in weights(whole).items():
            assert torch.equal(value, weights(root)[name]), name
