"""The interface of a task: labels, a head with its loss, a metric."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mmbert.errors import UsageError
from mmbert.model.configuration import MMBertConfig
from mmbert.model.objectives.base import (
    EncodedBatch,
    Objective,
    ObjectiveOutput,
    TextImageModel,
    full_precision,
    no_autocast,
)
from mmbert.model.tokens import Tokens
from mmbert.runtime.distributed import global_mean


class Labelled(Protocol):
    """What a task needs of an example; see `mmbert.data.readers.labelled.LabelledExample`."""

    @property
    def text(self) -> str:
        """The question or statement."""
        ...

    @property
    def answers(self) -> tuple[str, ...]:
        """The label, or what each person answered."""
        ...

    @property
    def most_frequent_answer(self) -> str:
        """Answer that most annotators gave; "" where the file has none."""
        ...

    @property
    def group(self) -> str:
        """What examples of one statement share."""
        ...

    @property
    def answer_type(self) -> str:
        """Answer type of VQAv2 ("yes/no", "number", "other"); "" where there is none."""
        ...


class Predictions(NamedTuple):
    """What a model says of the examples of one split, in their order, under one kind of image."""

    labels: list[int]  # (N,) the most probable label
    probabilities: list[float]  # (N,) of label 1, for tasks with two labels


class Priors(NamedTuple):
    """What can be said without looking: from the training split."""

    majority: int
    """The commonest label."""
    by_text: Mapping[str, int]
    """Text -> its commonest label."""

    def of(self, text: str) -> int:
        """The commonest label of a text; of all texts where it was never seen."""
        return self.by_text.get(plain(text), self.majority)


def plain(text: str) -> str:
    """A text without regard to case and spaces."""
    return " ".join(text.lower().split())


class Task(Objective):
    """A head on the joint vector, its loss, and what is measured. A task is one subclass in one file, in `TASKS`.

    The head is that of ViLT (arXiv:2102.03334): linear to twice the width, LayerNorm, GELU, linear to the labels. A
    text with several images is fused with each, and the joint vectors stand side by side (NLVR2 in ViLT and UNITER).
    """

    monitors: tuple[str, ...]
    """Results that can choose the best checkpoint; the first does where nothing else is asked for."""

    def __init__(self, config: MMBertConfig):
        super().__init__()
        if not config.labels:
            raise UsageError(f"task={config.task!r} has no labels; they are taken from the training data.")
        self.labels, self.num_images = list(config.labels), config.num_images
        width = config.hidden_size
        self.head = nn.Sequential(
            nn.Linear(max(1, self.num_images) * width, 2 * width),
            nn.LayerNorm(2 * width, eps=config.layer_norm_eps),
            nn.GELU(),
            nn.Linear(2 * width, len(self.labels)),
        )

    @classmethod
    def labels_of(cls, examples: Sequence[Labelled], *, min_count: int) -> list[str]:
        """The labels, from the training examples."""
        raise NotImplementedError

    @classmethod
    def scores(cls, answers: Sequence[str], number: Mapping[str, int]) -> dict[int, float]:
        """How right each label is, from 0 to 1, for the answers people gave; labels of score 0 are left out."""
        raise NotImplementedError

    def example_losses(self, logits: Tensor, label_scores: Tensor) -> Tensor:
        """(B, labels) logits and scores to (B,) losses, in nats."""
        raise NotImplementedError

    def probabilities(self, logits: Tensor) -> Tensor:
        """(B, labels) logits to (B, labels) numbers from 0 to 1, in the same order."""
        raise NotImplementedError

    def rights(self, labels: Sequence[int], examples: Sequence[Labelled]) -> list[float]:
        """How right each label is for its example, from 0 to 1; their mean is the accuracy."""
        raise NotImplementedError

    def metrics(self, said: Predictions, examples: Sequence[Labelled]) -> dict[str, float]:
        """Flat results, fractions; `accuracy` among them."""
        raise NotImplementedError

    @classmethod
    def priors(cls, examples: Sequence[Labelled], scores: Sequence[Mapping[int, float]]) -> Priors:
        """Counts the best label of each training example; the smaller number wins a tie."""
        overall: Counter[int] = Counter()
        by_text: dict[str, Counter[int]] = {}
        for example, labels in zip(examples, scores, strict=True):
            if labels:
                best = max(labels, key=lambda label: (labels[label], -label))
                overall[best] += 1
                by_text.setdefault(plain(example.text), Counter())[best] += 1
        commonest = {text: _commonest(counts) for text, counts in by_text.items()}
        return Priors(_commonest(overall) if overall else 0, commonest)

    def pooled(self, model: TextImageModel, text: Tokens, image: Tokens | None) -> Tensor:
        """Joint vectors of texts with their images.

        Args:
            model: Fuses.
            text: (B, T, D) encoded texts.
            image: (B * N, P, D) encoded images, those of a text in a row; None for text alone.

        Returns:
            (B, N * D).
        """
        count = len(text.mask)
        if image is None:
            return model.fuse(text, Tokens.absent(count, text.hidden_states.shape[-1], like=text.hidden_states)).pooled
        if self.num_images > 1:
            text = text.rows(torch.arange(count, device=text.mask.device).repeat_interleave(self.num_images))
        return model.fuse(text, image).pooled.reshape(count, -1)

    def logits(self, pooled: Tensor) -> Tensor:
        """(B, N * D) joint vectors to (B, labels) fp32 logits."""
        with no_autocast(pooled):
            return self.head(full_precision(pooled).to(next(self.head.parameters()).dtype))

    def forward(self, encoded: EncodedBatch) -> ObjectiveOutput:
        """Reads `label_scores` (B, labels)."""
        image = encoded.image if self.num_images else None
        logits = self.logits(self.pooled(encoded.model, encoded.text, image))
        scores = encoded.batch["label_scores"]
        with no_autocast(logits):
            total = self.example_losses(logits, scores.to(logits.dtype)).sum()
        count = torch.tensor(len(logits), device=logits.device)
        return ObjectiveOutput(
            global_mean(total, count), logits.detach(), scores.argmax(dim=-1), torch.zeros_like(count)
        )


def _commonest(counts: Counter[int]) -> int:
    return max(counts, key=lambda label: (counts[label], -label))
