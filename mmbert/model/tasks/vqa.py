"""Visual question answering (VQAv2, arXiv:1612.00837) as classification over the frequent training answers."""

from collections import Counter
from collections.abc import Mapping, Sequence

from mmbert.errors import UsageError
from mmbert.metrics.vqa import normalize_answer, question_accuracy
from mmbert.model.configuration import MMBertConfig
from mmbert.model.tasks.base import Predictions, Task, TaskExample


class VisualQuestionAnswering(Task):
    """Classification over an answer vocabulary with soft targets (arXiv:1708.02711).

    A probability by sigmoid is the expected official accuracy of the answer. The vocabulary holds the answers that are
    the most frequent one of at least `min_count` training questions, in the normal form of the official metric.
    Questions whose answers are not in the vocabulary count in every metric.
    """

    monitors = ("accuracy",)

    def __init__(
        self,
        config: MMBertConfig,
        *,
        loss: str = "sigmoid",
        initial_bias: str = "prior",
        head: str = "gelu",
        head_norm_eps: float | None = None,
    ):
        """Build the head.

        Args:
            config: The model's configuration.
            loss: "sigmoid": binary cross-entropy of each answer; "softmax": cross-entropy over the answers, for small
                vocabularies.
            initial_bias: See `Task`.
            head: See `Task`.
            head_norm_eps: See `Task`.
        """
        super().__init__(config, loss=loss, initial_bias=initial_bias, head=head, head_norm_eps=head_norm_eps)

    @classmethod
    def collect_labels(cls, examples: Sequence[TaskExample], *, min_count: int) -> list[str]:
        """Build the answer vocabulary, by falling frequency, then alphabetically.

        Raises:
            UsageError: No answer is frequent enough.
        """
        counts: Counter[str] = Counter()
        for example in examples:
            if example.answers:
                answer = example.most_frequent_answer or Counter(example.answers).most_common(1)[0][0]
                counts[normalize_answer(answer)] += 1
        common = [answer for answer, count in counts.items() if count >= min_count]
        if not common:
            top = ", ".join(f"{answer!r} {count} times" for answer, count in counts.most_common(3))
            raise UsageError(
                f"data.min_answer_count={min_count}: no answer is that frequent; the most frequent are {top}."
            )
        return sorted(common, key=lambda answer: (-counts[answer], answer))

    @classmethod
    def scores(cls, answers: Sequence[str], number: Mapping[str, int]) -> dict[int, float]:
        """Compute the official accuracy of each label; of ten answers m equal ones give 0.3 m, at most 1."""
        counts = Counter(normalize_answer(answer) for answer in answers)
        total = len(answers)
        found = {}
        for answer, m in counts.items():
            if answer in number:
                score = (m * min(1.0, (m - 1) / 3) + (total - m) * min(1.0, m / 3)) / total
                if score > 0:
                    found[number[answer]] = score
        return found

    def accuracies(self, labels: Sequence[int], examples: Sequence[TaskExample]) -> list[float]:
        """Compute the official accuracy of each predicted answer."""
        return [
            question_accuracy(self.labels[label], [{"answer": a, "answer_id": i} for i, a in enumerate(e.answers)])
            for label, e in zip(labels, examples, strict=True)
        ]

    def metrics(self, predictions: Predictions, examples: Sequence[TaskExample]) -> dict[str, float]:
        """Compute the official accuracy as a fraction, over all questions and by answer type."""
        accuracies = self.accuracies(predictions.labels, examples)
        by_type: dict[str, list[float]] = {}
        for accuracy, example in zip(accuracies, examples, strict=True):
            if example.answer_type:
                by_type.setdefault(example.answer_type, []).append(accuracy)
        return {
            "accuracy": sum(accuracies) / len(accuracies),
            **{f"accuracy/{kind}": sum(values) / len(values) for kind, values in sorted(by_type.items())},
        }
