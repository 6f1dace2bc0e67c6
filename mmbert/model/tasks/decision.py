"""A decision about a text and its images: entailment (SNLI-VE), NLVR2, hateful memes, any labels of your own."""

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor

from mmbert.errors import UsageError
from mmbert.metrics.ranking import auroc
from mmbert.model.tasks.base import Labelled, Predictions, Task


class Decision(Task):
    """Chooses one of a few labels: cross-entropy, accuracy; consistency where statements come several times."""

    monitors = ("accuracy", "auroc", "consistency")

    @classmethod
    def labels_of(cls, examples: Sequence[Labelled], *, min_count: int) -> list[str]:
        """All labels of the training examples, by the alphabet, however rare.

        Raises:
            UsageError: Fewer than two.
        """
        labels = sorted({answer for example in examples for answer in example.answers})
        if len(labels) < 2:
            raise UsageError(f"the training examples have the labels {labels}; a decision needs at least two.")
        return labels

    @classmethod
    def scores(cls, answers: Sequence[str], number: Mapping[str, int]) -> dict[int, float]:
        """1 for the label."""
        return {number[answer]: 1.0 for answer in answers if answer in number}

    def example_losses(self, logits: Tensor, label_scores: Tensor) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(logits, label_scores, reduction="none")

    def probabilities(self, logits: Tensor) -> Tensor:
        """Softmax: the probability of each label."""
        return logits.softmax(dim=-1)

    def rights(self, labels: Sequence[int], examples: Sequence[Labelled]) -> list[float]:
        """1 for the label, 0 for any other."""
        return [float(self.labels[label] in e.answers) for label, e in zip(labels, examples, strict=True)]

    def metrics(self, said: Predictions, examples: Sequence[Labelled]) -> dict[str, float]:
        """Accuracy; AUROC of the second of two labels; share of statements with all examples right."""
        right = self.rights(said.labels, examples)
        out = {"accuracy": sum(right) / len(right)}
        truth = [e.answers == (self.labels[1],) for e in examples]
        if len(self.labels) == 2 and said.probabilities and len(set(truth)) == 2:
            out["auroc"] = auroc(said.probabilities, [int(t) for t in truth])
        groups: dict[str, bool] = {}
        for example, hit in zip(examples, right, strict=True):
            if example.group:
                groups[example.group] = groups.get(example.group, True) and hit == 1
        if groups and len(groups) < len(examples):
            out["consistency"] = sum(groups.values()) / len(groups)
        return out
