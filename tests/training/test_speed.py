"""The speed that is shown while training."""

from collections import deque
from types import SimpleNamespace

import pytest
import torch

from mmbert.training import module
from mmbert.training.module import RECENT, TrainingModule


def test_one_slow_step_is_not_the_speed_that_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tenth step saves a checkpoint, and every tenth step is logged."""
    seconds = [*[1.0] * (RECENT - 1), 11.0, *[1.0] * RECENT]
    ends = iter([sum(seconds[: i + 1]) for i in range(len(seconds))])
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(ends)))
    shown: list[float] = []
    stub = SimpleNamespace(
        _clock=0.0, _recent=deque(maxlen=RECENT), training_seconds=0.0,
        log=lambda name, value, **_: shown.append(value) if name == "samples/s" else None,
        optimizers=lambda: SimpleNamespace(param_groups=[{"lr": 0.1}]),
    )  # fmt: skip
    for i in range(len(seconds)):
        TrainingModule.on_train_batch_end(stub, None, {"index": torch.zeros(16)}, i)  # pyright: ignore
    assert shown[:3] == [16.0] * 3
    assert shown[RECENT - 1] == pytest.approx(16 * RECENT / (RECENT + 10))  # not 16 / 11
    assert shown[-1] == 16.0 and stub.training_seconds == sum(seconds)
