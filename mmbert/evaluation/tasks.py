"""Evaluation of a fine-tuned model on a task: accuracy, image and text ablations, and priors of the training split.

Predictions are stored per example and sorted in the order of the data set before they are summed, as in `pairs.py`.
"""

import logging
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from mmbert.data.labelled_samples import LabelledSamples
from mmbert.evaluation.coverage import Coverage, log_partial_coverage
from mmbert.evaluation.encoded_images import EncodedImages
from mmbert.metrics.outcomes import ItemOutcomes
from mmbert.model.modeling import MMBertForTask
from mmbert.model.objectives.base import no_autocast
from mmbert.model.tasks import Predictions, Priors
from mmbert.model.tokens import Tokens
from mmbert.runtime.distributed import all_gather_list, rank

log = logging.getLogger("mmbert")


SAME_PREDICTIONS = 0.99
"""Fraction of predictions equal with the true and a blank image from which on a warning is logged."""


class ExamplePrediction(NamedTuple):
    """Predictions for one example: with its image, with ablated inputs, and the loss."""

    index: int
    loss: float
    label: int
    probability: float  # of label 1
    blank: int  # label with a blank image
    shuffled: int | None  # label with the images of another example; None: there are no others
    no_text: int  # label with an empty text


@dataclass
class TaskEvaluation:
    """Evaluation of one split, batch by batch.

    Args:
        model: In evaluation mode.
        samples: The split.
        priors: Most frequent labels of the training split; None: unknown, without the metrics that need them.
    """

    model: MMBertForTask
    samples: LabelledSamples
    priors: Priors | None
    rows: list[ExamplePrediction] = field(default_factory=list)
    skipped: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Start without encoded images."""
        self._images = EncodedImages(self.model.mmbert)
        self._blank_image: Tokens | None = None

    @torch.no_grad()
    def step(self, batch: dict[str, Any]) -> None:
        """Evaluate one batch with its images, blank images, images of other examples, and empty texts.

        Args:
            batch: As `mmbert.data.labelled_samples.CollateLabelled` makes it for evaluation.
        """
        if "skipped" in batch:
            self.skipped.update(batch["skipped"].tolist())
        if len(batch["index"]) == 0:
            return
        model, task = self.model.mmbert, self.model.task
        text = model.encode_text(batch["input_ids"], batch["attention_mask"])
        image = self._images.encode(batch) if task.num_images else None
        logits = task.logits(task.pooled(model, text, image))
        with no_autocast(logits):
            losses = task.example_losses(logits, batch["label_scores"].to(logits.dtype)).tolist()
        labels = logits.argmax(dim=-1).tolist()
        probabilities = logits.double().softmax(dim=-1)[:, min(1, logits.shape[1] - 1)].tolist()
        blank, shuffled, no_text = labels, [None] * len(labels), labels
        if image is not None:
            no_text = self._labels(self._empty(batch), image)
            blank = self._labels(text, self._blank(len(image.mask)))
            if "has_wrong" in batch and batch["has_wrong"].any():
                found = self._labels(text, self._images.encode(batch, prefix="wrong_"))
                shuffled = [x if valid else None for x, valid in zip(found, batch["has_wrong"].tolist(), strict=True)]
        rows = zip(batch["index"].tolist(), losses, labels, probabilities, blank, shuffled, no_text, strict=True)
        self.rows += [ExamplePrediction(*row) for row in rows]

    def _labels(self, text: Tokens, image: Tokens) -> list[int]:
        task = self.model.task
        return task.logits(task.pooled(self.model.mmbert, text, image)).argmax(dim=-1).tolist()

    def _blank(self, count: int) -> Tokens:
        """Encode one image of the mean color (zeros after normalization), repeated for every image of a batch."""
        model = self.model.mmbert
        if self._blank_image is None:
            side = model.config.image_size
            self._blank_image = model.encode_image(torch.zeros(1, 3, side, side, device=model.word_embeddings.device))
        one = self._blank_image
        return one.rows(torch.zeros(count, dtype=torch.int64, device=one.mask.device))

    def _empty(self, batch: dict[str, Any]) -> Tokens:
        """Encode an empty text, [CLS] and [SEP] alone, repeated for every row."""
        last = int(batch["attention_mask"][0].sum()) - 1
        one = self.model.mmbert.encode_text(batch["input_ids"][:1, [0, last]])
        return one.rows(torch.zeros(len(batch["input_ids"]), dtype=torch.int64, device=one.mask.device))

    def merged_predictions(self) -> list[ExamplePrediction]:
        """Predictions of all processes, each example once, in the order of the data set."""
        return sorted({r.index: r for r in all_gather_list(self.rows)}.values())

    def metrics(self) -> dict[str, float]:
        """Compute the metrics of the split over all processes, `vqa_accuracy` ...: fractions, and nats for the loss."""
        rows = self.merged_predictions()
        if not rows:
            return {}
        task, name = self.model.task, self.model.config.task
        examples = [self.samples.examples[r.index] for r in rows]
        found = task.metrics(Predictions([r.label for r in rows], [r.probability for r in rows]), examples)
        # Without a known label there is no target; the cross-entropy of a decision would be 0.
        losses = [r.loss for r in rows if task.has_target(self.samples.scores[r.index])]
        out = {**({"loss": sum(losses) / len(losses)} if losses else {}), **found}
        by_input = self._scores(rows)
        out |= {key: sum(scores) / len(scores) for key, (scores, _) in by_input.items() if key != "accuracy"}
        if self.priors is not None:
            by_text = [self.priors.predict(example.text) for example in examples]
            priors = {"majority": [self.priors.majority] * len(rows), "text": by_text}
            for kind, labels in priors.items():
                out[f"prior_{kind}"] = task.metrics(Predictions(labels, []), examples)["accuracy"]
        best = [self.samples.scores[r.index] for r in rows]
        ceiling = [max(scores, key=lambda label, s=scores: s[label]) if scores else 0 for scores in best]
        out["ceiling"] = task.metrics(Predictions(ceiling, []), examples)["accuracy"]
        return {f"{name}_{key}": value for key, value in out.items()}

    def coverage(self) -> Coverage:
        """Count the examples that all processes have seen, and those of the split."""
        seen = {r.index for r in self.merged_predictions()} | set(all_gather_list([*self.skipped]))
        return Coverage(len(seen), len(self.samples))

    def log_warnings(self, split: str) -> None:
        """Log `warnings` and partial coverage of a split; a collective call."""
        log_partial_coverage(self.coverage(), split)
        for warning in self.warnings():
            if rank() == 0:
                log.warning("%s: %s", split, warning)

    def warnings(self) -> list[str]:
        """Describe metrics that show a model that has not learned the task, one sentence each; a collective call."""
        metrics, rows, name = self.metrics(), self.merged_predictions(), self.model.config.task
        if not rows:
            return []
        found = []
        accuracy = metrics[f"{name}_accuracy"]
        for kind, prior in (("text", "of each text"), ("majority", "of all")):
            value = metrics.get(f"{name}_prior_{kind}", 0.0)
            if accuracy < value:
                found.append(
                    f"{name}_accuracy {100 * accuracy:.1f} % is below {name}_prior_{kind} {100 * value:.1f} %, the "
                    f"accuracy of the most frequent training answer {prior}, on {len(rows):,} examples: the model has "
                    "not learned the task"
                )
        same = sum(r.blank == r.label for r in rows) / len(rows)
        if self.model.task.num_images and same >= SAME_PREDICTIONS:
            found.append(
                f"the predictions with a blank image equal those with the true image for {100 * same:.1f} % of "
                f"{len(rows):,} examples: the model does not use the image"
            )
        return found

    def _scores(self, predictions: list[ExamplePrediction]) -> dict[str, tuple[list[float], list[ExamplePrediction]]]:
        """Scores by kind of input: metric -> score of each prediction, from 0 to 1, and the predictions."""
        task = self.model.task
        kinds = {"accuracy": "label"}
        if task.num_images:
            kinds |= {f"accuracy_{kind}": kind for kind in ("blank", "shuffled", "no_text")}
        out = {}
        for name, kind in kinds.items():
            rows = [r for r in predictions if getattr(r, kind) is not None]
            if rows:
                labels = [getattr(r, kind) for r in rows]
                out[name] = (task.accuracies(labels, [self.samples.examples[r.index] for r in rows]), rows)
        return out

    def outcomes(self) -> dict[str, ItemOutcomes]:
        """Per-item outcomes by metric: the score of each example, from 0 to 1."""
        images: dict[Any, int] = {}
        examples = self.samples.examples
        return {
            f"{self.model.config.task}_{name}": ItemOutcomes(
                scores, [images.setdefault(examples[r.index].images or r.index, len(images)) for r in rows]
            )
            for name, (scores, rows) in self._scores(self.merged_predictions()).items()
        }

    def predictions(self) -> list[dict[str, Any]]:
        """Predictions in the format of the VQA evaluation server: {"question_id", "answer"} for each example."""
        labels = self.model.task.labels
        return [
            {"question_id": self.samples.examples[r.index].key, "answer": labels[r.label]}
            for r in self.merged_predictions()
        ]
