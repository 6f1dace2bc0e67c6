"""Inputs of the report besides rows and items: comparison.json, and examples on which strategies disagree."""

import itertools
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmbert.compare.budget import RULES
from mmbert.compare.folder import previous_primary
from mmbert.compare.plan import TOWERS, Arm, Comparison, list_arms
from mmbert.compare.rows import QUERIES, Row, read_all_outcomes
from mmbert.compare.specs import Settings
from mmbert.data.readers.base import ImageFolder
from mmbert.data.readers.foils import read_foils
from mmbert.errors import DataError
from mmbert.evaluation.foils import OVERALL
from mmbert.runtime.files import atomic_write_text

log = logging.getLogger("mmbert")


def write_report_inputs(comparison: Comparison, settings: Settings, rows: Mapping[str, Row]) -> None:
    """Write comparison.json and examples.json, which the report is made from besides the rows."""
    reference = comparison.reference or comparison.names[0]
    before = previous_primary(comparison, settings.out, rows)
    length = ", ".join(f"{stage.steps:,} steps of {name}" for name, stage in comparison.stages.items())
    if comparison.has_towers:
        length += f"; after {comparison.towers.steps:,} steps of common towers, which no budget contains"
    arms = list_arms(comparison)
    content = {
        "name": comparison.name,
        "strategies": comparison.names,
        "seeds": comparison.seeds,
        "arms": [arm.name for arm in arms if arm.strategy != TOWERS],
        **({TOWERS: [arm.name for arm in arms if arm.strategy == TOWERS]} if comparison.has_towers else {}),
        "exploratory": settings.exploratory or comparison.min_seeds < 2,
        "budget_rule": f"{RULES[comparison.match]} as {reference} with {length}",
        "reference": reference,
        "primary": comparison.primary,
        **({"primary_before": before} if before else {}),
        "dataset": comparison.about,
        "command": settings.command,
    }
    atomic_write_text(settings.out / "comparison.json", json.dumps(content, indent=2) + "\n")
    try:
        examples = choose_examples(comparison, settings.out, rows)
    except DataError as error:  # the report keeps the examples that it has
        log.warning("examples are not updated: %s", error)
        return
    atomic_write_text(settings.out / "examples.json", json.dumps(examples, indent=2) + "\n")


def choose_examples(
    comparison: Comparison, out: Path, rows: Mapping[str, Row], count: int = 12
) -> list[dict[str, Any]]:
    """Choose foils, or captions if there are none, on which the first seeds of strategies disagree.

    At most `count`, alternating between categories.

    Raises:
        DataError: The foils, or the folders of the arms with their captions, are missing.
    """
    arms = {name: Arm(name, comparison.seeds_of(name)[0], max(comparison.fractions)).name for name in comparison.names}
    arms = {name: arm for name, arm in arms.items() if rows.get(arm, {}).get("status") == "done"}
    if len(arms) < 2:
        return []
    if comparison.foils.files:
        candidates, measure = _foil_items(comparison), f"foils/{OVERALL}"
    elif comparison.retrieval.images:
        candidates, measure = _caption_items(out / "arms" / next(iter(arms.values()))), "retrieval/text_to_image/R@1"
    else:
        return []
    found = read_all_outcomes(out, arms.values())
    outcomes = {name: found[arm][measure].values for name, arm in arms.items() if arm in found}
    by_category: dict[str, list[dict[str, Any]]] = {}
    for i, (category, example) in enumerate(candidates):
        right = {name: bool(hits[i]) for name, hits in outcomes.items()}
        if len(set(right.values())) > 1:
            by_category.setdefault(category, []).append({**example, "outcomes": right})
    turns = itertools.zip_longest(*by_category.values())
    return [example for turn in turns for example in turn if example is not None][:count]


def _foil_items(comparison: Comparison) -> list[tuple[str, dict[str, str]]]:
    """Category and content of every foil, in the order of the item files."""
    files = [Path(file) for file in comparison.foils.files]
    return [
        (
            foil.category,
            {
                "image": str(foil.image),
                "caption": foil.caption,
                "foil": foil.foil,
                "category": foil.category,
            },
        )
        for foil in read_foils(files, ImageFolder(comparison.foils.images))
    ]


def _caption_items(arm: Path) -> list[tuple[str, dict[str, str]]]:
    """Every query of text-to-image retrieval, in the order of the item files; the category is empty."""
    file = arm / QUERIES
    if not file.is_file():
        raise DataError(str(file), "no such file", "the folder of the arm, which holds its captions")
    return [
        ("", {"image": image, "caption": caption}) for image, caption in json.loads(file.read_text(encoding="utf-8"))
    ]
