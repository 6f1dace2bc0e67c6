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


def task(*labels: str, **options: str) -> VisualQuestionAnswering:
    torch.manual_seed(0)
    return VisualQuestionAnswering(tiny_config(task="vqa", labels=list(labels)), **options)


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


def test_softmax_loss_divides_the_scores_by_their_sum() -> None:
    logits, scores = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]), torch.tensor([[0.9, 0.3, 0.0], [0.0, 0.0, 0.0]])
    by_hand = math.log(math.e + 2) - 0.75  # targets 0.75, 0.25, 0; the second question has no target
    losses = task("a", "b", "c", loss="softmax").example_losses(logits, scores)
    assert losses.tolist() == [pytest.approx(by_hand, rel=1e-6), 0.0]


def entropy(p: float) -> float:
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


QUESTIONS = [{0: 1.0}, {0: 1.0}, {0: 0.6, 1: 0.3}, {1: 0.9}]
"""Label scores of four questions; no question has the answer c."""


def test_sigmoids_start_at_the_log_odds_of_the_mean_scores() -> None:
    head = task("a", "b", "c")
    loss = head.start_at_prior(QUESTIONS)
    by_hand = [0.65, 0.3, 0.125]  # the means; c counts as half of four questions
    assert head.get_parameter("head.3.bias").tolist() == pytest.approx(
        [math.log(p / (1 - p)) for p in by_hand], rel=1e-6
    )
    assert loss == pytest.approx(entropy(0.65) + entropy(0.3) - math.log(1 - 0.125), rel=1e-9)


def test_softmax_starts_at_the_log_of_the_mean_targets() -> None:
    head = task("a", "b", "c", loss="softmax")
    loss = head.start_at_prior(QUESTIONS)
    assert head.get_parameter("head.3.bias").tolist() == pytest.approx(
        [math.log(2 / 3), math.log(1 / 3), math.log(1 / 8)], rel=1e-6
    )
    # Entropy of 2/3 and 1/3, and what c takes: the exponentials of the logits sum to 9/8.
    assert loss == pytest.approx(entropy(1 / 3) + math.log(9 / 8), rel=1e-9)


def test_prior_of_an_answer_to_every_question_is_finite() -> None:
    head = task("a", "b")
    loss = head.start_at_prior([{0: 1.0}, {0: 1.0}])
    assert head.get_parameter("head.3.bias").tolist() == pytest.approx([math.log(3), -math.log(3)], rel=1e-6)
    assert loss == pytest.approx(2 * math.log(4 / 3), rel=1e-9)


def test_358_answers_have_a_first_loss_of_a_few_nats() -> None:
    """With bias 0 it is 358 ln 2 = 248; each answer once among 358 questions has an entropy of about (ln 358 + 1)."""
    head = task(*map(str, range(358)))
    loss = head.start_at_prior([{label: 1.0} for label in range(358)])
    assert loss == pytest.approx(358 * entropy(1 / 358), rel=1e-9) and 6.8 < loss < 6.9


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
