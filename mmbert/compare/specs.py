"""A comparison spelled out: the command lines of each arm, and what makes a row the row of this arm."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from mmbert.compare.plan import PRETRAIN, Arm, Comparison
from mmbert.training.config_files import explicit_options
from mmbert.training.run_options import to_arguments


class Settings(NamedTuple):
    """What of a command line is no part of the comparison."""

    out: Path
    jobs: int
    exploratory: bool
    allow_import: list[str]
    command: str
    rows_from: Path | None = None
    retry_failed: bool = False


def arm_spec(comparison: Comparison, arm: Arm, budget: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """Everything that `mmbert.compare.arm` needs to know."""
    folder = settings.out / "arms" / arm.name
    stages = {}
    for name, stage in comparison.stages.items():
        options: dict[str, Any] = {
            "seed_everything": arm.seed,
            "data.train_fraction": arm.fraction,
            "data.eval_seed": 0,
        }
        if name == PRETRAIN:
            options |= {**comparison.differences(arm.strategy), **budget["options"]}
        else:
            options |= {"model.pretrained": str(folder / PRETRAIN / "model")}
        length = {"trainer.max_steps": budget["stages"][name], "trainer.max_epochs": -1}
        quiet = {"trainer.enable_progress_bar": False}
        stages[name] = {"config": stage.run, "options": {**stage.options, **options, **length, **quiet}}
    config = {
        f"{name}.{key}": value
        for name, stage in stages.items()
        for key, value in explicit_options(to_arguments(stage["config"], stage["options"])).items()
        if key not in ("model.pretrained", "name")
    }
    judged = {k: v for k, v in asdict(comparison).items() if k in ("retrieval", "foils")}
    return {
        "arm": arm.name,
        **arm._asdict(),
        "folder": str(folder),
        "items": str(settings.out / "items" / f"{arm.name}.npz"),
        "stages": stages,
        **judged,
        "budget": budget["budget"],
        "threads": comparison.threads,
        "exploratory": settings.exploratory,
        "allow_import": settings.allow_import,
        "config": {**config, **judged},
    }


def budget_inputs(comparison: Comparison) -> dict[str, Any]:
    """What every budget follows from, flat."""
    content = asdict(comparison)
    rule = {key: content[key] for key in ("match", "threads")}
    stages = {
        f"{name}.{key}": value
        for name, stage in comparison.stages.items()
        for key, value in {"steps": stage.steps, **explicit_options(to_arguments(stage.run, stage.options))}.items()
    }
    return json.loads(json.dumps({**rule, "reference": comparison.reference or comparison.names[0], **stages}))


def describe_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two flat configurations, the first five keys; empty where nothing does."""
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    return "; ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in changed[:5])
