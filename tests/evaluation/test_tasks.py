"""Warnings of a task's evaluation, on hand-made predictions."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tiny import tiny_config, tiny_processor

from mmbert.data.labelled_samples import LabelledSamples
from mmbert.data.readers.labelled import LabelledExample
from mmbert.evaluation.coverage import Coverage
from mmbert.evaluation.tasks import ExamplePrediction, TaskEvaluation
from mmbert.model.modeling import MMBertForTask
from mmbert.model.tasks import TASKS, Priors

LABELS = ["no", "yes"]
NO, YES = 0, 1


def evaluation(
    true: Sequence[int], predicted: Sequence[int], blank: Sequence[int], *, num_images: int = 1
) -> TaskEvaluation:
    """Predictions for texts of which "a" is mostly no and "b" mostly yes in training; most labels are no."""
    examples = [
        LabelledExample((Path(f"{i}.png"),) * num_images, "ab"[label], (LABELS[label],), i, "test", f"f:{i}")
        for i, label in enumerate(true)
    ]
    scores = [TASKS["decision"].scores(e.answers, {"no": NO, "yes": YES}) for e in examples]
    samples = LabelledSamples(examples, scores, tiny_processor(), seed=0, augmentation=None)
    model = MMBertForTask(tiny_config(task="decision", labels=LABELS, num_images=num_images)).eval()
    found = TaskEvaluation(model, samples, Priors(majority=NO, by_text={"a": NO, "b": YES}))
    found.rows = [
        ExamplePrediction(i, 0.5, p, 0.5, b, None, p) for i, (p, b) in enumerate(zip(predicted, blank, strict=True))
    ]
    return found


def test_accuracy_below_the_priors_and_unused_images_log_warnings(caplog: pytest.LogCaptureFixture) -> None:
    """1 of 4 right; each text's training answer is right for all 4, the most frequent one for 2."""
    found = evaluation([NO, NO, YES, YES], [NO, YES, NO, NO], blank=[NO, YES, NO, NO])
    metrics = found.metrics()
    assert (metrics["decision_accuracy"], metrics["decision_prior_text"]) == (0.25, 1.0)
    found.log_warnings("test")
    assert caplog.messages == [
        "test: decision_accuracy 25.0 % is below decision_prior_text 100.0 %, the accuracy of the most frequent "
        "training answer of each text, on 4 examples: the model has not learned the task",
        "test: decision_accuracy 25.0 % is below decision_prior_majority 50.0 %, the accuracy of the most frequent "
        "training answer of all, on 4 examples: the model has not learned the task",
        "test: the predictions with a blank image equal those with the true image for 100.0 % of 4 examples: the model "
        "does not use the image",
    ]


def test_predictions_above_the_priors_that_depend_on_the_image_log_nothing(caplog: pytest.LogCaptureFixture) -> None:
    found = evaluation([NO, NO, YES, YES], [NO, NO, YES, YES], blank=[NO, NO, NO, NO])
    found.log_warnings("test")
    assert not caplog.messages


@pytest.mark.parametrize(("changed", "warns"), [(0, True), (2, True), (3, False)])
def test_one_percent_of_other_predictions_is_the_limit(changed: int, warns: bool) -> None:
    labels = [NO, YES] * 100
    blank = [1 - label if i < changed else label for i, label in enumerate(labels)]
    assert bool(evaluation(labels, labels, blank).warnings()) == warns


def test_task_without_images_has_no_blank_image() -> None:
    labels = [NO, YES]
    assert evaluation(labels, labels, blank=labels, num_images=0).warnings() == []


def test_part_of_the_split_and_skipped_images_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    found = evaluation([NO, YES, NO, YES], [NO, YES], blank=[YES, NO])
    found.step({"index": torch.zeros(0, dtype=torch.int64), "skipped": torch.tensor([3])})
    assert found.coverage() == Coverage(3, 4)
    found.log_warnings("test_unseen")
    assert caplog.messages == [
        "test_unseen: metrics are over 3 of 4 items (75.0 %), as trainer.limit_test_batches stops the evaluation early"
    ]


def test_evaluation_without_examples_has_neither_metrics_nor_warnings() -> None:
    found = evaluation([NO, YES], [], blank=[])
    assert found.metrics() == {} and found.warnings() == []


def test_examples_whose_label_training_does_not_have_are_wrong_and_have_no_loss() -> None:
    found = evaluation([NO, YES], [NO, YES], blank=[YES, NO])
    found.samples.examples[1] = dataclasses.replace(found.samples.examples[1], answers=("maybe",))  # pyright: ignore
    found.samples.scores[1] = {}  # pyright: ignore
    found.rows[1] = found.rows[1]._replace(loss=0.0)
    metrics = found.metrics()
    assert metrics["decision_loss"] == 0.5 and metrics["decision_accuracy"] == 0.5
