"""Warnings of options that change nothing beside the others."""

import logging
from typing import Any

import pytest

from mmbert.data.options import DataOptions
from mmbert.training.option_checks import warn_of_unused_options
from mmbert.training.options import OptimOptions

CLOSED = {"itc": {"weight": 1.0, "init": "closed_form", "ridge": 1.0, "init_samples": 9}}
RANDOM = {"itc": {"weight": 1.0, "ridge": 1.0, "init_samples": 9}}
OPPOSITES = {"left": "right"}


@pytest.mark.parametrize(
    ("optim", "data", "objectives", "names"),
    [
        ({}, {}, {"mlm": {"weight": 1.0}, "itc": {"weight": 1.0, "ridge": 0.3}}, []),
        ({"muon_lr": 0.01}, {}, {}, ["optim.muon_lr"]),
        ({"muon_lr": 0.01, "name": "muon"}, {}, {}, []),
        ({"final_lr": 0.1, "schedule": "constant"}, {}, {}, ["optim.final_lr"]),
        ({"final_lr": 0.1, "schedule": "linear"}, {}, {}, []),
        ({}, {"opposites": OPPOSITES}, {"itm": {"weight": 1.0}}, ["data.opposites"]),
        ({}, {"opposites": OPPOSITES}, {"itm": {"weight": 1.0, "edited": 0.5}}, []),
        ({}, {"opposites": OPPOSITES, "mask_content": True}, {"mlm": {"weight": 1.0}}, []),
        ({}, {}, RANDOM, ["objectives.itc.ridge", "objectives.itc.init_samples"]),
        ({}, {}, CLOSED, []),
    ],
)
def test_option_without_effect_is_a_warning(
    optim: dict[str, Any],
    data: dict[str, Any],
    objectives: dict[str, dict[str, Any]],
    names: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, logger="mmbert"):
        warn_of_unused_options(OptimOptions(**optim), DataOptions(**data), objectives)
    messages = [record.getMessage() for record in caplog.records]
    assert [message.split("=")[0] for message in messages] == names
    assert all("has no effect here: it is for" in message for message in messages)
