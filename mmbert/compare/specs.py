"""Specifications of arms: the options of each training run, and the identity of an arm's row."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from mmbert.compare.plan import PRETRAIN, RESERVED_OPTIONS, TOWERS, Arm, Comparison, Shares
from mmbert.compare.towers import start_options, tower_comparison
from mmbert.training.config_files import explicit_options
from mmbert.training.run_options import to_arguments

EVALUATIONS = ("retrieval", "foils", "shares")
"""Sections of a comparison that evaluate the pretrained model after training."""
WITHOUT_EFFECT = ("data.prepare", "data.cache", "data.images_in_memory", "name")
"""Options that don't change what is trained or measured, so that they are not part of an arm's identity."""


LATER_DEFAULTS = {"retrieval": {"itc_weight": 0.0}, "shares": asdict(Shares())}
"""Options of evaluations that older rows do not have, with the value that stands for their absence."""


class Settings(NamedTuple):
    """How a comparison is run; not part of the identity of its rows."""

    out: Path
    jobs: int
    exploratory: bool
    allow_import: list[str]
    command: str
    rows_from: Path | None = None
    retry_failed: bool = False


def arm_spec(comparison: Comparison, arm: Arm, budget: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """Build the content of arm.json, the input of `mmbert.compare.arm`.

    Args:
        comparison: The comparison.
        arm: Strategy or towers, seed and fraction.
        budget: Budget of the strategy, as `mmbert.compare.calibration` found it.
        settings: Output folder and allowed modules.
    """
    if arm.strategy == TOWERS and comparison.has_towers:
        comparison = tower_comparison(comparison)
    folder = settings.out / "arms" / arm.name
    start: dict[str, Any] = {}
    origin: dict[str, Any] = {}
    if comparison.has_towers:
        steps = {"options": {}, "stages": {PRETRAIN: comparison.towers.steps}, "budget": {}}
        towers = arm_spec(comparison, arm.towers, steps, settings)
        start = start_options(Path(towers["folder"]))
        trained = {key: value for key, value in towers["config"].items() if key.startswith(f"{PRETRAIN}.")}
        origin = {f"{TOWERS}{key.removeprefix(PRETRAIN)}": value for key, value in trained.items()}
    stages = {}
    for name, stage in comparison.stages.items():
        options: dict[str, Any] = {
            "seed_everything": arm.seed,
            "data.train_fraction": arm.fraction,
            "data.eval_seed": 0,
        }
        if name == PRETRAIN:
            options |= {**comparison.strategy_options(arm.strategy), **budget["options"], **start}
        else:
            options |= {"model.pretrained": str(folder / PRETRAIN / "model")}
        length = {"trainer.max_steps": budget["stages"][name], "trainer.max_epochs": -1}
        quiet = {"trainer.enable_progress_bar": False}
        stages[name] = {"config": stage.run, "options": {**stage.options, **options, **length, **quiet}}
    config = {
        f"{name}.{key}": value
        for name, stage in stages.items()
        for key, value in explicit_options(to_arguments(stage["config"], stage["options"])).items()
        if key not in WITHOUT_EFFECT and (key != "model.pretrained" or arm.strategy == TOWERS)
    }
    evaluations = {
        key: {n: v for n, v in value.items() if (n, v) not in LATER_DEFAULTS.get(key, {}).items()}
        for key, value in asdict(comparison).items()
        if key in EVALUATIONS
    }
    evaluations = {key: value for key, value in evaluations.items() if value}  # later sections that are not asked for
    return {
        "arm": arm.name,
        **arm._asdict(),
        **({TOWERS: arm.towers.name} if comparison.has_towers else {}),
        "folder": str(folder),
        "items": str(settings.out / "items" / f"{arm.name}.npz"),
        "stages": stages,
        **evaluations,
        "budget": budget["budget"],
        "threads": comparison.threads,
        "exploratory": settings.exploratory,
        "allow_import": settings.allow_import,
        "config": {**origin, **config, **evaluations},
    }


def budget_inputs(comparison: Comparison) -> dict[str, Any]:
    """Everything that the budgets depend on besides the strategies, flat."""
    content = asdict(comparison)
    rule = {key: content[key] for key in ("match", "threads")}
    if comparison.cached_encoder:  # absent in older files
        rule["cached_encoder"] = True
    stages = {
        f"{name}.{key}": value
        for name, stage in comparison.runs.items()
        for key, value in {"steps": stage.steps, **explicit_options(to_arguments(stage.run, stage.options))}.items()
        if key not in WITHOUT_EFFECT
    }
    return json.loads(json.dumps({**rule, "reference": comparison.reference or comparison.names[0], **stages}))


def overridden_options(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """Run -> options of its configuration file that the comparison replaces by its own.

    `name` is left out: an arm has its own folders.
    """
    found = {}
    for name, stage in comparison.runs.items():
        reserved = [*RESERVED_OPTIONS, *(key for key in comparison.reserved_of(name) if key != "model.fusion")]
        given = explicit_options(to_arguments(stage.run, {}))
        found[name] = {key: given[key] for key in reserved if key in given and key != "name" and given[key] is not None}
    return {name: options for name, options in found.items() if options}


def describe_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Describe the first five differences between two flat configurations; empty if they are equal."""
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    return "; ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in changed[:5])
