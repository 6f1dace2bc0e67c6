"""A comparison spelled out: the command lines of each arm, and what makes a row the row of this arm."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from mmbert.compare.plan import PRETRAIN, Arm, Comparison, Stage
from mmbert.training.config_files import written_options


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
        stages[name] = [
            *fit_arguments(stage, {**options, **length, **quiet}),
            *(f"--allow-import={module}" for module in settings.allow_import),
        ]
    config = {
        f"{name}.{key}": value
        for name, arguments in stages.items()
        for key, value in written_options([a for a in arguments if not a.startswith("--allow-import")]).items()
        if key not in ("model.pretrained", "name")
    }
    judged = {k: v for k, v in asdict(comparison).items() if k in ("retrieval", "foils")}
    return {
        "arm": arm.name,
        **arm._asdict(),
        "folder": str(folder),
        "items": str(settings.out / "items" / f"{arm.name}.npz"),
        "stages": {name: [*arguments, f"--threads={comparison.threads}"] for name, arguments in stages.items()},
        **judged,
        "budget": budget["budget"],
        "threads": comparison.threads,
        "exploratory": settings.exploratory,
        "allow_import": settings.allow_import,
        "config": {**config, **judged},
    }


def asked_of(comparison: Comparison) -> dict[str, Any]:
    """What every budget follows from, flat."""
    content = asdict(comparison)
    rule = {key: content[key] for key in ("match", "threads")}
    stages = {
        f"{name}.{key}": value
        for name, stage in comparison.stages.items()
        for key, value in {"steps": stage.steps, **written_options(fit_arguments(stage, {}))}.items()
    }
    return json.loads(json.dumps({**rule, "reference": comparison.reference or comparison.names[0], **stages}))


def fit_arguments(stage: Stage, options: Mapping[str, Any]) -> list[str]:
    """The command line of `fit` for a stage, with more options on top of its own."""
    merged = {**stage.options, **options}
    given = {key: value if isinstance(value, str) else json.dumps(value) for key, value in merged.items()}
    return ["fit", "--config", stage.run, *(f"--{key}={value}" for key, value in given.items())]


def told_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two flat configurations, the first five keys; empty where nothing does."""
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    return "; ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in changed[:5])
