"""Budgets of real models on real batches, for every rule."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmbert.compare.budget import RULES
from mmbert.compare.calibration import calibrate
from mmbert.compare.plan import Comparison, Stage
from mmbert.compare.specs import budget_inputs
from mmbert.errors import UsageError

ROOT = Path(__file__).parents[2]


def comparison(tiny: list[str], match: str, **changes: Any) -> Comparison:
    """Three strategies; an early fusion of four layers as the reference."""
    options = {o.removeprefix("--").split("=", 1)[0]: yaml.safe_load(o.split("=", 1)[1]) for o in tiny}
    return Comparison(
        strategies={"early": {"model.fusion_layers": 4}, "late": {}, "hybrid": {}},
        match=match,
        pretrain=Stage(run=str(ROOT / "configs/pretrain/shapes_plain.yaml"), steps=100, options={**options, **changes}),
    )


@pytest.mark.parametrize("match", RULES)
def test_budgets_are_equal_by_the_rule_and_reproducible(tiny: list[str], match: str) -> None:
    found = calibrate(comparison(tiny, match), [], {})
    budgets: dict[str, dict[str, Any]] = {name: entry["budget"] for name, entry in found.items()}
    spent = {
        "flops": {name: b["training_flops"] for name, b in budgets.items()},
        "time": {name: b["steps"] * b.get("seconds_per_step", 0) for name, b in budgets.items()},
        "parameters": {name: b["parameters"] for name, b in budgets.items()},
        "steps": {name: b["steps"] for name, b in budgets.items()},
    }
    for name, value in spent[match].items():
        assert value == pytest.approx(spent[match]["early"], rel=0.05), name
    assert budgets["early"]["steps"] == 100 and budgets["early"]["fusion_layers"] == 4
    for name, entry in found.items():
        assert entry["stages"]["pretrain"] == budgets[name]["steps"]
        assert bool(entry["options"]) == (match == "parameters")
    if match in ("time", "parameters"):  # measured and matched values are kept
        again = calibrate(comparison(tiny, match), [], json.loads(json.dumps(found)))
        assert json.dumps(again) == json.dumps(found)


def test_cached_encoder_is_charged_once_for_each_training_image(tiny: list[str]) -> None:
    frozen = {"optim.freeze_image": "all"}
    before, after = (replace(comparison(tiny, "flops", **frozen), cached_encoder=x) for x in (False, True))
    inputs = [budget_inputs(plan) for plan in (before, after)]
    assert inputs[1] == {**inputs[0], "cached_encoder": True} and "cached_encoder" not in inputs[0]
    plain, cached = (calibrate(plan, [], {}) for plan in (before, after))
    once = {name: entry["costs"]["pretrain"].once_flops for name, entry in cached.items()}
    assert {entry["costs"]["pretrain"].once_flops for entry in plain.values()} == {0.0}
    images, batch = 64, 16
    for name, entry in cached.items():
        step = plain[name]["budget"]["flops_per_step"] - entry["budget"]["flops_per_step"]
        assert once[name] == step / batch * images  # what a step no longer computes
        budget = entry["budget"]
        assert budget["training_flops"] == pytest.approx(cached["early"]["budget"]["training_flops"], rel=0.01)
        assert budget["training_flops"] == once[name] + budget["steps"] * budget["flops_per_step"]
    assert cached["late"]["stages"]["pretrain"] > plain["late"]["stages"]["pretrain"]  # its fusion is the cheapest
    with pytest.raises(UsageError, match=r"cached_encoder=true, but data\.cache=null with data\.crop=1\.0"):
        calibrate(replace(comparison(tiny, "flops", **frozen, **{"data.cache": None}), cached_encoder=True), [], {})


def test_towers_have_a_budget_of_their_own_and_encoders_that_fit(tiny: list[str], monkeypatch: Any) -> None:
    monkeypatch.setattr("mmbert.compare.calibration.COUNTED_BATCHES", 2)
    plan = comparison(tiny, "flops")
    towers = replace(plan.pretrain, steps=7, options={**plan.pretrain.options, "model.objectives": {"ngrams": 1.0}})
    found, plain = (calibrate(chosen, [], {}) for chosen in (replace(plan, towers=towers), plan))
    budget = found.pop("towers")
    assert found == plain, "no arm pays for the towers"
    cost = budget["budget"]
    assert cost["steps"] == 7 and cost["training_flops"] == 7 * cost["flops_per_step"]
    assert 0 < cost["flops_per_step"] < plain["early"]["budget"]["flops_per_step"] / 2, "of ngrams alone"
    plan.strategies["early"]["model.text_layers"] = 2  # pyright: ignore[reportCallIssue, reportArgumentType]
    with pytest.raises(UsageError, match=r"'early' can't start from them, as its model\.text_layers is 2 and theirs 1"):
        calibrate(replace(plan, towers=towers), [], {})
