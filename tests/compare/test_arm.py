"""Results and per-item outcomes of a row, read from the folders of its runs."""

import json
from pathlib import Path

from mmbert.compare.arm import read_stage_results
from mmbert.metrics.outcomes import ItemOutcomes, write_outcomes


def test_results_are_named_by_stage_split_and_ablation(tmp_path: Path) -> None:
    metrics = {
        "test/vqa_accuracy": 0.5,
        "test/vqa_accuracy/yes/no": 0.6,
        "test/vqa_accuracy_no_text": 0.1,
        "test/vqa_prior_text": 0.3,
        "test_unseen/vqa_accuracy_blank": 0.2,
        "val/vqa_accuracy": 0.9,
        "test/vqa_ceiling": 1.0,
        "run/seed": 0,
        "run/fusion": "late",
    }
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    write_outcomes(tmp_path / "items_test_unseen.npz", {"vqa_accuracy_blank": ItemOutcomes([1.0, 0.0], [0, 1])})
    results, items, _ = read_stage_results(tmp_path, "vqa")
    assert results == {
        "vqa/accuracy": 0.5,
        "vqa/accuracy/yes-no": 0.6,
        "vqa/accuracy/no_text": 0.1,
        "vqa/prior_text": 0.3,
        "vqa/unseen/accuracy/blank": 0.2,
    }
    assert list(items) == ["vqa/unseen/accuracy/blank"]


def test_results_of_further_pretraining_have_the_name_of_their_stage(tmp_path: Path) -> None:
    measured = {"itm_accuracy": 0.8, "mlm_accuracy": 0.3, "image_to_text/R@1": 0.1}
    (tmp_path / "metrics.json").write_text(json.dumps({f"test/{name}": value for name, value in measured.items()}))
    assert read_stage_results(tmp_path, "adapt")[0] == {f"adapt/{name}": value for name, value in measured.items()}


def test_pretraining_names_ablations_in_the_same_way(tmp_path: Path) -> None:
    metrics = {"test/mlm_accuracy_shuffled": 0.5, "test_seen/image_to_text/R@1": 0.2, "test/retrieval_chance_R@1": 0.01}
    (tmp_path / "metrics.json").write_text(json.dumps({**metrics, "test/itm_left_out": 3.0}))
    assert read_stage_results(tmp_path, "pretrain")[0] == {
        "pretrain/mlm_accuracy/shuffled": 0.5,
        "pretrain/seen/image_to_text/R@1": 0.2,
        "pretrain/chance_R@1": 0.01,
    }
