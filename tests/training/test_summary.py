"""The log of a run's start: expensive tests are announced."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from mmbert.evaluation.options import EvaluationOptions
from mmbert.training.summary import _log_ranking_cost


@pytest.mark.parametrize(
    ("scorer", "images", "expected"),
    [
        ("auto", 1000, "1,000,000 fusion passes"),  # a model with itm alone, as the preset ucm
        ("auto", 200, ""),
        ("itc", 1000, ""),
    ],
)
def test_test_that_fuses_very_many_pairs_is_announced(
    scorer: str, images: int, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    module: Any = SimpleNamespace(
        model=SimpleNamespace(scorer="itm"),
        evaluation_options=EvaluationOptions(test_scorer=scorer, test_images=images),
    )
    data: Any = SimpleNamespace(sizes=lambda: {"train": 9000, "val": 500, "test": 3000}, test_splits=["test"])
    with caplog.at_level(logging.WARNING, logger="mmbert"):
        _log_ranking_cost(module, data)
    assert (expected in caplog.text) if expected else not caplog.text
    assert ("evaluation.test_scorer=itc lowers that" in caplog.text) == bool(expected)
