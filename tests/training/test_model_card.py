"""The model card of a run."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny import tiny_config

from mmbert.metrics.outcomes import ItemOutcomes
from mmbert.model.options import ModelOptions
from mmbert.training.model_card import confidence_interval, write_model_card


def test_interval_counts_items_of_one_image_as_one_cluster() -> None:
    # Deviations from the mean 0.5 sum to 1 and -1 by image: sqrt(2 * 2 / 1) / 4 = 0.5.
    assert confidence_interval(ItemOutcomes([1, 1, 0, 0], [7, 7, 9, 9])) == pytest.approx((0.5 - 0.98, 0.5 + 0.98))
    alone = confidence_interval(ItemOutcomes([1, 1, 0, 0], [1, 2, 3, 4]))
    error = np.std([1, 1, 0, 0], ddof=1) / 2  # the textbook's, where every item has an image of its own
    assert alone == pytest.approx((0.5 - 1.96 * error, 0.5 + 1.96 * error))
    assert confidence_interval(ItemOutcomes([1, 0], [3, 3])) is None


def test_card_names_strategy_start_data_metrics_and_limits(tmp_path: Path) -> None:
    def card(**changes: object) -> str:
        arguments: dict = {
            "name": "my run",
            "config": tiny_config(fusion="late"),
            "options": ModelOptions(text_pretrained="/home/me/bert-base", fusion="late"),
            "data": {"annotations": {"train": "/secret/captions.json"}, "prepare": None},
            "seed": 3,
            "metrics": {"test/itm_accuracy": 0.75, "run/steps": 1200, "run/precision": "32-true"},
            "outcomes": {"test": {"itm_accuracy": ItemOutcomes([1, 1, 1, 0], [0, 1, 2, 3])}},
        }
        write_model_card(tmp_path, **{**arguments, **changes})
        return (tmp_path / "README.md").read_text()

    text = card()
    header = yaml.safe_load(text.split("---")[1])
    assert header == {
        "library_name": "mmbert", "tags": ["mmbert", "image-text"], "pipeline_tag": "zero-shot-image-classification",
    }  # fmt: skip
    assert "# my run" in text and "`late` fusion" in text and "Text encoder: `bert-base`" in text
    assert "annotations: train: `captions.json`" in text and "/secret" not in text and "/home" not in text
    assert "| test/itm_accuracy | 0.75 | 0.26 to 1 |" in text
    assert "seed: 3" in text and "optimizer steps: 1,200" in text and "precision: 32-true" in text
    assert "## Limits" in text and "## Out-of-scope uses" in text
    assert "Not tested yet." in card(metrics={}, outcomes={})
    task = card(config=tiny_config(task="vqa", labels=["no", "yes"]))
    assert "heads: vqa over 2 labels" in task and "pipeline_tag: visual-question-answering" in task
