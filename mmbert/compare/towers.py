"""Towers of a comparison: encoders that are trained once per seed, which every strategy of the seed starts from.

Their training is an arm of its own (`plan.TOWERS`), whose model the other arms name in `model.pretrained`.
"""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmbert.compare.plan import PRETRAIN, TOWERS, Comparison, Foils, Retrieval, Shares, Stage
from mmbert.compare.rows import Row
from mmbert.errors import UsageError
from mmbert.model.initialization import FUSION_KEYS, STARTS_ANEW
from mmbert.model.options import KEYS, Architecture
from mmbert.training.assembly import Parts, tokenizer_checksum
from mmbert.training.checkpoints import file_sha256
from mmbert.training.config_files import explicit_options
from mmbert.training.run_options import to_arguments

log = logging.getLogger("mmbert")


def tower_comparison(comparison: Comparison) -> Comparison:
    """The training of the towers as a comparison of its own: one strategy, no tasks and no evaluations.

    Raises:
        UsageError: The run is a fine-tuning.
    """
    stage = comparison.towers
    options = explicit_options(to_arguments(stage.run, stage.options))
    task = options.get("model.task")
    if task is not None:
        raise UsageError(f"towers.run={stage.run} fine-tunes for the task {task}: expected a pretraining.")
    return replace(
        comparison,
        strategies={TOWERS: {"model.fusion": options.get("model.fusion", Architecture().fusion)}},
        towers=Stage(),
        pretrain=stage,
        match="steps",
        reference=None,
        finetune={},
        retrieval=Retrieval(),
        foils=Foils(),
        shares=Shares(),
        primary=[],
    )


def model_folder(arm: Path) -> Path:
    """Folder of the pretrained model in an arm's folder."""
    return arm / PRETRAIN / "model"


def start_options(towers: Path) -> dict[str, Any]:
    """Options of `fit` with which an arm starts from the towers in an arm's folder."""
    return {
        "model.pretrained": str(model_folder(towers)),
        "model.pretrained_parts": "encoders",
        "model.text_pretrained": None,  # the towers have started from them
        "model.image_pretrained": None,
    }


def check_start(strategy: str, arm: Parts, towers: Parts) -> None:
    """Raise if a strategy can't start from the towers.

    Args:
        strategy: Name of the strategy.
        arm: As built without the towers.
        towers: The towers, trained or not.

    Raises:
        UsageError: Encoders of another architecture, or another tokenizer.
    """
    config, other = arm.model.config, towers.model.config
    for key in KEYS:
        own, of_towers = getattr(config, key), getattr(other, key)
        if own != of_towers and key not in (*STARTS_ANEW, *FUSION_KEYS):
            raise UsageError(
                f"towers: '{strategy}' can't start from them, as its model.{key} is {own!r} and theirs {of_towers!r}; "
                f"set towers.options.model.{key} or that of the strategy."
            )
    if tokenizer_checksum(arm.processor.tokenizer) != tokenizer_checksum(towers.processor.tokenizer):
        raise UsageError(f"towers: '{strategy}' can't start from them, as they have another data.tokenizer.")


def weights_sha256(towers: Path) -> dict[str, str]:
    """File of weights -> its SHA-256, of the model in an arm's folder."""
    return {file.name: file_sha256(file) for file in sorted(model_folder(towers).glob("*.safetensors"))}


def towers_in_use(specs: Mapping[str, Mapping[str, Any]], rows: Mapping[str, Row]) -> set[str]:
    """Names of the towers that an arm without a row starts from.

    Args:
        specs: Arm -> specification.
        rows: Arm -> row, of the finished and the failed ones.
    """
    return {spec[TOWERS] for name, spec in specs.items() if name not in rows and TOWERS in spec}


def restore_towers(specs: Mapping[str, Mapping[str, Any]], rows: dict[str, Row], source: Path | None) -> None:
    """Give the finished towers that are in use their model, or remove their row, so that they are trained again.

    A model is missing if its row was imported from another comparison, or if somebody removed it.

    Args:
        specs: Arm -> specification.
        rows: Arm -> row; changed.
        source: Folder of another comparison that has the model.
    """
    for name in sorted(towers_in_use(specs, rows)):
        folder = Path(specs[name]["folder"])
        if rows.get(name, {}).get("status") != "done" or weights_sha256(folder):
            continue
        if source is not None and weights_sha256(source / "arms" / name):
            temporary = model_folder(folder).with_suffix(".tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.copytree(model_folder(source / "arms" / name), temporary)
            temporary.replace(model_folder(folder))
            continue
        log.warning("%s is trained again, as %s is missing", name, model_folder(folder))
        del rows[name]
        for file in (folder / "row.json", folder / PRETRAIN / "metrics.json"):
            file.unlink(missing_ok=True)
