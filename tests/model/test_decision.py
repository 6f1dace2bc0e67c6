"""The decision task: labels, loss, accuracy, AUROC and consistency by hand-computed values."""

import math
from pathlib import Path

import pytest
import torch
from tiny import tiny_config

from mmbert.data.readers.labelled import LabelledExample
from mmbert.errors import UsageError
from mmbert.model.tasks import Predictions
from mmbert.model.tasks.decision import Decision


def example(label: str, group: str = "") -> LabelledExample:
    return LabelledExample((Path("a.png"),), "text", (label,), 0, "train", "here", group=group)


def task(*labels: str) -> Decision:
    torch.manual_seed(0)
    return Decision(tiny_config(task="decision", labels=list(labels)))


def test_labels_are_all_of_training_by_the_alphabet() -> None:
    rows = [example("neutral"), example("entailment"), example("neutral"), example("contradiction")]
    assert Decision.collect_labels(rows, min_count=9) == ["contradiction", "entailment", "neutral"]
    with pytest.raises(UsageError, match="needs at least two"):
        Decision.collect_labels([example("yes")], min_count=1)


def test_loss_is_cross_entropy() -> None:
    logits, scores = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    by_hand = math.log(math.e + 2)
    assert task("a", "b", "c").example_losses(logits, scores).item() == pytest.approx(by_hand, rel=1e-6)


def test_head_starts_at_the_log_frequencies_of_the_labels() -> None:
    head = task("a", "b", "c")
    loss = head.start_at_prior([{1: 1.0}, {1: 1.0}, {0: 1.0}, {2: 1.0}])
    assert head.get_parameter("head.3.bias").tolist() == pytest.approx(
        [-2 * math.log(2), -math.log(2), -2 * math.log(2)], rel=1e-6
    )
    assert loss == pytest.approx(1.5 * math.log(2), rel=1e-9)


def test_consistency_is_the_share_of_statements_with_all_examples_right() -> None:
    rows = [example("true", "s1"), example("false", "s1"), example("true", "s2"), example("true", "s2")]
    found = task("false", "true").metrics(Predictions([1, 0, 1, 0], [0.9, 0.2, 0.8, 0.1]), rows)
    assert found["accuracy"] == 0.75 and found["consistency"] == 0.5
    # The positives score .9, .8, .1, the negative .2: two of three are above.
    assert found["auroc"] == pytest.approx(2 / 3)


def test_without_statements_that_repeat_there_is_no_consistency() -> None:
    found = task("a", "b").metrics(Predictions([0, 0], [0.1, 0.2]), [example("a", "s1"), example("b", "s2")])
    assert "consistency" not in found and found["auroc"] == 1.0


def test_label_unseen_in_training_counts_as_incorrect() -> None:
    found = task("a", "b").metrics(Predictions([0, 1], []), [example("a"), example("c")])
    assert found["accuracy"] == 0.5
