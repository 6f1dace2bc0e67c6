"""The interface of a task: labels, a head with its loss, and metrics."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mmbert.errors import UsageError, did_you_mean
from mmbert.model.configuration import MMBertConfig
from mmbert.model.fusion import joint_size
from mmbert.model.objectives.base import (
    EncodedBatch,
    Objective,
    ObjectiveOutput,
    TextImageModel,
    full_precision,
    no_autocast,
)
from mmbert.model.tasks.label_losses import LABEL_LOSSES
from mmbert.model.tokens import Reads, Tokens
from mmbert.runtime.distributed import global_mean


class TaskExample(Protocol):
    """Protocol of an example that tasks read; `mmbert.data.readers.labelled.LabelledExample` implements it."""

    @property
    def text(self) -> str:
        """Question or statement."""
        ...

    @property
    def answers(self) -> tuple[str, ...]:
        """The label, or the answer of each annotator."""
        ...

    @property
    def most_frequent_answer(self) -> str:
        """Answer that most annotators gave; "" where the file has none."""
        ...

    @property
    def group(self) -> str:
        """Key shared by the examples of one statement; "" where there is none."""
        ...

    @property
    def answer_type(self) -> str:
        """Answer type of VQAv2 ("yes/no", "number", "other"); "" where there is none."""
        ...


class Predictions(NamedTuple):
    """Predictions for the examples of a split, in their order."""

    labels: list[int]  # (N,) index of the most probable label
    probabilities: list[float]  # (N,) of label 1; empty unless the task has two labels


class Priors(NamedTuple):
    """Most frequent labels of the training split: a baseline that ignores the image."""

    majority: int
    """Index of the most frequent label."""
    by_text: Mapping[str, int]
    """Normalized text -> index of its most frequent label."""

    def predict(self, text: str) -> int:
        """Return the most frequent label of a text; of all texts where the text does not occur in training."""
        return self.by_text.get(normalize_text(text), self.majority)


def normalize_text(text: str) -> str:
    """Lower-case a text and collapse its white space."""
    return " ".join(text.lower().split())


INITIAL_BIASES = ("prior", "zero")


def _gelu_head(inputs: int, width: int, labels: int, eps: float) -> nn.Sequential:
    """Build the head of ViLT (arXiv:2102.03334): linear to twice the width, LayerNorm, GELU, linear to the labels."""
    return nn.Sequential(
        nn.Linear(inputs, 2 * width), nn.LayerNorm(2 * width, eps=eps), nn.GELU(), nn.Linear(2 * width, labels)
    )


def _relu_head(inputs: int, width: int, labels: int, eps: float) -> nn.Sequential:
    """Build the head of ALBEF for entailment (arXiv:2107.07651, Sec. 5): linear to the width, ReLU, linear."""
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, labels))


def _linear_head(inputs: int, width: int, labels: int, eps: float) -> nn.Sequential:
    """Build one linear layer, as in VisualBERT (arXiv:1908.03557)."""
    return nn.Sequential(nn.Linear(inputs, labels))


HEADS: dict[str, Callable[[int, int, int, float], nn.Sequential]] = {
    "gelu": _gelu_head,
    "relu": _relu_head,
    "linear": _linear_head,
}
"""Name -> function of the inputs, the width of the fusion, the number of labels and the LayerNorm's epsilon."""


class Task(Objective):
    """Base class of tasks: a head on the joint vector, its loss and its metrics, listed in `TASKS`.

    The head is one of `HEADS`, by default that of ViLT. A text with several images is fused with each, and the joint
    vectors are concatenated (NLVR2 in ViLT and UNITER).

    The constructor takes the model's configuration and the options of `config.task_options` as keyword arguments.
    """

    monitors: tuple[str, ...]
    """Metrics that can select the best checkpoint; the first is the default."""

    def __init__(
        self,
        config: MMBertConfig,
        *,
        loss: str,
        initial_bias: str = "prior",
        head: str = "gelu",
        head_norm_eps: float | None = None,
    ):
        """Build the head.

        Args:
            config: The model's configuration.
            loss: "sigmoid" or "softmax"; see `mmbert.model.tasks.label_losses`.
            initial_bias: "prior": a run starts a new head with `start_at_prior`; "zero": its bias is 0.
            head: Name in `HEADS`: "gelu", "relu" or "linear".
            head_norm_eps: Epsilon of the head's LayerNorm; None: `layer_norm_eps` of the configuration.

        Raises:
            UsageError: A value that is not allowed, or no labels.
        """
        super().__init__()
        self.check_options(loss=loss, initial_bias=initial_bias, head=head, head_norm_eps=head_norm_eps)
        if not config.labels:
            raise UsageError(f"task={config.task!r} has no labels; they are taken from the training data.")
        self.labels, self.num_images = list(config.labels), config.num_images
        self.label_loss, self.initial_bias = LABEL_LOSSES[loss], initial_bias
        inputs = max(1, self.num_images) * joint_size(config)
        eps = config.layer_norm_eps if head_norm_eps is None else head_norm_eps
        self.head = HEADS[head](inputs, config.hidden_size, len(self.labels), eps)

    @classmethod
    def check_options(cls, **options: Any) -> None:
        """Check the values of the constructor's options.

        Raises:
            UsageError: A value that is not allowed.
        """
        choices = {"loss": [*LABEL_LOSSES], "initial_bias": [*INITIAL_BIASES], "head": [*HEADS]}
        for name, allowed in choices.items():
            value = options.get(name, allowed[0])
            if value not in allowed:
                near = did_you_mean(str(value), allowed)
                raise UsageError(f"task_options.{name}={value!r}; allowed are {', '.join(allowed)}.{near}")
        eps = options.get("head_norm_eps")
        if eps is not None and (isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < 1):
            raise UsageError(f"task_options.head_norm_eps={eps!r}: must be a number above 0 and below 1, or null.")

    @classmethod
    def collect_labels(cls, examples: Sequence[TaskExample], *, min_count: int) -> list[str]:
        """Collect the labels of the head from the training examples."""
        raise NotImplementedError

    @classmethod
    def scores(cls, answers: Sequence[str], number: Mapping[str, int]) -> dict[int, float]:
        """Score labels, from 0 to 1, against the annotated answers; labels of score 0 are left out.

        Args:
            answers: Annotated answers of one example.
            number: Label -> its index.
        """
        raise NotImplementedError

    def has_target(self, scores: Mapping[int, float]) -> bool:
        """Whether an example with these label scores has a loss; sigmoids have one even if no label is known."""
        return bool(scores) or not self.label_loss.needs_known_label

    def example_losses(self, logits: Tensor, label_scores: Tensor) -> Tensor:
        """Compute (B,) losses, in nats, from (B, labels) logits and scores."""
        return self.label_loss.losses(logits, label_scores)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Convert (B, labels) logits to values from 0 to 1, in the same order."""
        return self.label_loss.probabilities(logits)

    @torch.no_grad()
    def start_at_prior(self, scores: Sequence[Mapping[int, float]]) -> float:
        """Start the bias of the head at the frequencies of the labels: their log-odds (sigmoid) or logs (softmax).

        The weights stay as drawn: their part of the logits is small, and weights of 0 would give the layers below no
        gradient in the first step. A label of no example, or of every example, counts as half an example, so that the
        bias is finite.

        Args:
            scores: Label scores of the training examples, at least one of which has a target.

        Returns:
            Mean loss of these examples by the bias alone, in nats; the first loss is near it.
        """
        entries = [(row, label, score) for row, found in enumerate(scores) for label, score in found.items()]
        rows, labels = torch.tensor([entry[:2] for entry in entries], dtype=torch.int64).reshape(-1, 2).T
        values = torch.tensor([score for _, _, score in entries], dtype=torch.float64)
        totals = torch.bincount(rows, values, minlength=len(scores))
        targets = self.label_loss.targets(values, totals[rows])
        count = sum(map(self.has_target, scores))
        frequencies = torch.bincount(labels, targets, minlength=len(self.labels)) / count
        prior = self.label_loss.prior_logits(frequencies.clamp(0.5 / count, 1 - 0.5 / count))
        last = self.head[-1]
        assert isinstance(last, nn.Linear)
        last.bias.copy_(prior)
        return self.example_losses(prior[None], frequencies[None]).item()  # both losses are linear in the targets

    def accuracies(self, labels: Sequence[int], examples: Sequence[TaskExample]) -> list[float]:
        """Compute the accuracy of each predicted label on its example, from 0 to 1."""
        raise NotImplementedError

    def metrics(self, predictions: Predictions, examples: Sequence[TaskExample]) -> dict[str, float]:
        """Compute the metrics of a split as fractions; `accuracy` is one of them."""
        raise NotImplementedError

    @classmethod
    def priors(cls, examples: Sequence[TaskExample], scores: Sequence[Mapping[int, float]]) -> Priors:
        """Find the most frequent labels of the training split; the smaller index wins a tie."""
        overall: Counter[int] = Counter()
        by_text: dict[str, Counter[int]] = {}
        for example, labels in zip(examples, scores, strict=True):
            if labels:
                best = max(labels, key=lambda label: (labels[label], -label))
                overall[best] += 1
                by_text.setdefault(normalize_text(example.text), Counter())[best] += 1
        most_frequent = {text: _most_frequent(counts) for text, counts in by_text.items()}
        return Priors(_most_frequent(overall) if overall else 0, most_frequent)

    def pooled(self, model: TextImageModel, text: Tokens, image: Tokens | None) -> Tensor:
        """Compute the joint vectors of texts with their images.

        Args:
            model: Fuses.
            text: (B, T, D) encoded texts.
            image: (B * N, P, D) encoded images, those of one text in sequence; None for text only.

        Returns:
            (B, N * D).
        """
        count = text.mask.shape[0]
        if image is None:
            image = Tokens.absent(count, text.hidden_states.shape[-1], like=text.hidden_states)
            return model.fuse(text, image, reads=Reads(pooled=True)).pooled
        if self.num_images > 1:
            text = text.rows(torch.arange(count, device=text.mask.device).repeat_interleave(self.num_images))
        return model.fuse(text, image, reads=Reads(pooled=True)).pooled.reshape(count, -1)

    def logits(self, pooled: Tensor) -> Tensor:
        """Classify (B, N * D) joint vectors: (B, labels) fp32 logits."""
        with no_autocast(pooled):
            return self.head(full_precision(pooled).to(next(self.head.parameters()).dtype))

    def batch_logits(self, encoded: EncodedBatch) -> Tensor:
        """Classify the texts of a batch with their images: (B, labels) fp32 logits."""
        image = encoded.image if self.num_images else None
        return self.logits(self.pooled(encoded.model, encoded.text, image))

    def label_scores(self, labels: Tensor) -> Tensor:
        """Convert (B,) classes, -1 for none of them, to (B, labels) scores; scores are returned as they are.

        Raises:
            UsageError: Another shape, or a class that the head does not have.
        """
        count = len(self.labels)
        if labels.ndim == 2 and labels.shape[1] == count:
            return labels
        if labels.ndim != 1 or labels.is_floating_point():
            raise UsageError(f"labels of shape {tuple(labels.shape)}; expected (B,) classes or (B, {count}) scores.")
        if bool(((labels < -1) | (labels >= count)).any()):
            raise UsageError(f"labels from {int(labels.min())} to {int(labels.max())}; allowed are -1 to {count - 1}.")
        return (labels[:, None] == torch.arange(count, device=labels.device)).float()

    def output(self, logits: Tensor, label_scores: Tensor) -> ObjectiveOutput:
        """Compute the loss from (B, labels) logits and scores."""
        scores = label_scores.to(logits.dtype)
        with no_autocast(logits):
            total = self.example_losses(logits, scores).sum()
        has_target = (scores > 0).any(dim=-1) | (not self.label_loss.needs_known_label)
        loss = global_mean(total, has_target.sum())
        return ObjectiveOutput(
            loss, logits.detach()[has_target], scores.argmax(dim=-1)[has_target], (~has_target).sum()
        )

    def forward(self, encoded: EncodedBatch) -> ObjectiveOutput:
        """Compute the loss; reads `label_scores` (B, labels)."""
        return self.output(self.batch_logits(encoded), encoded.batch["label_scores"])


def _most_frequent(counts: Counter[int]) -> int:
    return max(counts, key=lambda label: (counts[label], -label))
