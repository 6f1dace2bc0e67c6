"""Classification of a text with its images: entailment (SNLI-VE), NLVR2, hateful memes, or custom labels."""

from collections.abc import Mapping, Sequence

from mmbert.errors import UsageError
from mmbert.metrics.ranking import auroc
from mmbert.model.configuration import MMBertConfig
from mmbert.model.tasks.base import Predictions, Task, TaskExample


class Decision(Task):
    """Single-label classification: cross-entropy; accuracy, AUROC, and consistency over repeated statements."""

    monitors = ("accuracy", "auroc", "consistency")

    def __init__(
        self,
        config: MMBertConfig,
        *,
        initial_bias: str = "prior",
        head: str = "gelu",
        head_norm_eps: float | None = None,
    ):
        """Build the head; see `Task`."""
        super().__init__(config, loss="softmax", initial_bias=initial_bias, head=head, head_norm_eps=head_norm_eps)

    @classmethod
    def collect_labels(cls, examples: Sequence[TaskExample], *, min_count: int) -> list[str]:
        """Collect all labels of the training examples in alphabetical order, however rare.

        Raises:
            UsageError: There are fewer than two labels.
        """
        labels = sorted({answer for example in examples for answer in example.answers})
        if len(labels) < 2:
            raise UsageError(f"the training examples have the labels {labels}; a decision needs at least two.")
        return labels

    @classmethod
    def scores(cls, answers: Sequence[str], number: Mapping[str, int]) -> dict[int, float]:
        """Score the annotated label 1."""
        return {number[answer]: 1.0 for answer in answers if answer in number}

    def accuracies(self, labels: Sequence[int], examples: Sequence[TaskExample]) -> list[float]:
        """Return 1 for the annotated label, 0 for any other."""
        return [float(self.labels[label] in e.answers) for label, e in zip(labels, examples, strict=True)]

    def metrics(self, predictions: Predictions, examples: Sequence[TaskExample]) -> dict[str, float]:
        """Compute accuracy, AUROC of the second of two labels, and consistency: statements with all examples right."""
        correct = self.accuracies(predictions.labels, examples)
        out = {"accuracy": sum(correct) / len(correct)}
        truth = [e.answers == (self.labels[1],) for e in examples]
        if len(self.labels) == 2 and predictions.probabilities and len(set(truth)) == 2:
            out["auroc"] = auroc(predictions.probabilities, [int(t) for t in truth])
        groups: dict[str, bool] = {}
        for example, is_correct in zip(examples, correct, strict=True):
            if example.group:
                groups[example.group] = groups.get(example.group, True) and is_correct == 1
        if groups and len(groups) < len(examples):
            out["consistency"] = sum(groups.values()) / len(groups)
        return out
