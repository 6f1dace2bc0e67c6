"""Losses over the labels of a task: independent sigmoids, or one softmax."""

import torch
import torch.nn.functional as F
from torch import Tensor


class LabelLoss:
    """Base class of the losses over labels, listed in `LABEL_LOSSES`; all label scores are from 0 to 1."""

    needs_known_label: bool
    """Whether an example without any scored label has no loss."""

    def targets(self, label_scores: Tensor, totals: Tensor) -> Tensor:
        """Convert label scores to targets.

        Args:
            label_scores: Scores of labels.
            totals: Sum of the scores of the same example; broadcasts to `label_scores`.
        """
        raise NotImplementedError

    def losses(self, logits: Tensor, label_scores: Tensor) -> Tensor:
        """Compute (B,) losses, in nats, from (B, labels) logits and scores; 0 for a row without a target."""
        raise NotImplementedError

    def probabilities(self, logits: Tensor) -> Tensor:
        """Convert (B, labels) logits to values from 0 to 1, in the same order."""
        raise NotImplementedError

    def prior_logits(self, frequencies: Tensor) -> Tensor:
        """Compute the logits whose probabilities are the (labels,) mean targets, each between 0 and 1."""
        raise NotImplementedError


class SigmoidLoss(LabelLoss):
    """Binary cross-entropy of each label against its score, summed over the labels (arXiv:1708.02711)."""

    needs_known_label = False

    def targets(self, label_scores: Tensor, totals: Tensor) -> Tensor:
        """Return the scores themselves."""
        return label_scores

    def losses(self, logits: Tensor, label_scores: Tensor) -> Tensor:
        """Compute the binary cross-entropy, summed over the labels."""
        return F.binary_cross_entropy_with_logits(logits, label_scores, reduction="none").sum(dim=-1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Sigmoid of each label; they do not sum to 1."""
        return logits.sigmoid()

    def prior_logits(self, frequencies: Tensor) -> Tensor:
        """Log-odds."""
        return frequencies.logit()


class SoftmaxLoss(LabelLoss):
    """Cross-entropy against the scores of an example, divided by their sum."""

    needs_known_label = True

    def targets(self, label_scores: Tensor, totals: Tensor) -> Tensor:
        """Divide by the sum; the targets of an example without any score are 0."""
        return label_scores / totals.clamp(min=torch.finfo(totals.dtype).tiny)

    def losses(self, logits: Tensor, label_scores: Tensor) -> Tensor:
        """Compute the cross-entropy."""
        targets = self.targets(label_scores, label_scores.sum(dim=-1, keepdim=True))
        return F.cross_entropy(logits, targets, reduction="none")

    def probabilities(self, logits: Tensor) -> Tensor:
        """Softmax over the labels."""
        return logits.softmax(dim=-1)

    def prior_logits(self, frequencies: Tensor) -> Tensor:
        """Log-frequencies."""
        return frequencies.log()


LABEL_LOSSES: dict[str, LabelLoss] = {"sigmoid": SigmoidLoss(), "softmax": SoftmaxLoss()}
