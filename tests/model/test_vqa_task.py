"""The VQA task: vocabulary, soft targets, loss and metric by hand-computed values."""

import math
from pathlib import Path

import pytest
import torch
from tiny import tiny_config

from mmbert.data.readers.labelled import LabelledExample
from mmbert.errors import UsageError
from mmbert.metrics.vqa import question_accuracy
from mmbert.model.tasks import Predictions
from mmbert.model.tasks.vqa import VisualQuestionAnswering


def example(text: str, *answers: str, most_frequent_answer: str = "", kind: str = "other") -> LabelledExample:
    return LabelledExample(
        (Path("a.png"),),
        text,
        answers,
        0,
        "train",
        "here",
        question_type="what",
        answer_type=kind,
        most_frequent_answer=most_frequent_answer,
    )


def task(*labels: str) -> VisualQuestionAnswering:
    torch.manual_seed(0)
    return VisualQuestionAnswering(tiny_config(task="vqa", labels=list(labels)))


def test_vocabulary_counts_the_commonest_answer_of_each_question_in_its_normal_form() -> None:
    examples = [
        example("q", "Two", most_frequent_answer="Two"),
        example("q", "2", "2", "3", most_frequent_answer=""),
        example("q", "a dog"),
    ]
    examples += [
        example("q", "the dog", most_frequent_answer="the dog"),
        example("q", "cat", most_frequent_answer="cat"),
    ]
    assert VisualQuestionAnswering.collect_labels(examples, min_count=2) == ["2", "dog"]
    assert VisualQuestionAnswering.collect_labels(examples, min_count=1) == ["2", "dog", "cat"]
    with pytest.raises(
        UsageError, match=r"min_answer_count=3: no answer is that frequent; the most frequent are '2' 2 times"
    ):
        VisualQuestionAnswering.collect_labels(examples, min_count=3)


@pytest.mark.parametrize(("matches", "score"), [(1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0), (10, 1.0)])
def test_soft_score_is_the_official_accuracy(matches: int, score: float) -> None:
    answers = ["Red"] * matches + [f"other{i}" for i in range(10 - matches)]
    found = VisualQuestionAnswering.scores(answers, {"red": 3})
    assert found == {3: pytest.approx(score)}
    records = [{"answer": a.lower(), "answer_id": i} for i, a in enumerate(answers)]
    assert found[3] == pytest.approx(question_accuracy("red", records))


def test_answers_are_looked_up_as_they_were_counted() -> None:
    assert VisualQuestionAnswering.scores(["Two", "two", "2", "two."], {"2": 0}) == {0: 1.0}
    assert VisualQuestionAnswering.scores(["purple"] * 10, {"red": 0}) == {}


def test_loss_sums_over_the_answers() -> None:
    logits, scores = torch.tensor([[0.0, 2.0, -1.0]]), torch.tensor([[0.3, 1.0, 0.0]])
    by_hand = math.log(2) + math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1))
    assert task("a", "b", "c").example_losses(logits, scores).item() == pytest.approx(by_hand, rel=1e-6)


def test_question_out_of_the_vocabulary_stays_in_the_denominator() -> None:
    red, purple = example("q", *["red"] * 10), example("q", *["purple"] * 10)
    found = task("red", "blue").metrics(Predictions([0, 0], []), [red, purple])
    assert found["accuracy"] == 0.5


def test_accuracy_by_answer_type() -> None:
    rows = [example("q", *["yes"] * 10, kind="yes/no"), example("q", *["red"] * 10), example("q", *["no"] * 10)]
    found = task("yes", "red").metrics(Predictions([0, 1, 0], []), rows)
    assert found == {"accuracy": 2 / 3, "accuracy/other": 0.5, "accuracy/yes/no": 1.0}


def test_priors_are_the_commonest_labels_and_the_smaller_wins_a_tie() -> None:
    rows = [example("What  colour?"), example("what colour?"), example("is it?"), example("is it?"), example("none")]
    scores = [{0: 1.0}, {2: 0.6, 1: 0.9}, {1: 1.0}, {1: 1.0}, {}]
    priors = VisualQuestionAnswering.priors(rows, scores)
    assert priors.majority == 1
    assert (priors.predict("what colour?"), priors.predict("IS IT?"), priors.predict("never seen")) == (0, 1, 1)
