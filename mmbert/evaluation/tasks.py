"""What a fine-tuned model can do, beside what it would do with no picture, a wrong one, or none of the model at all.

Results are kept per example and put in the order of the data set before they are summed, as in `pairs.py`.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmbert.data.labelled_samples import LabelledSamples
from mmbert.distributed import everywhere
from mmbert.modeling import MMBertForTask
from mmbert.objectives.base import no_autocast
from mmbert.tasks import Priors, Said
from mmbert.tokens import Tokens


class LabelledResult(NamedTuple):
    """What the model said of one example."""

    index: int
    loss: float
    label: int
    probability: float  # of label 1
    blank: int  # label with a grey picture
    shuffled: int | None  # label with another example's pictures; None: there are no others


@dataclass
class TaskEvaluation:
    """Collects the results of one split.

    Args:
        model: The model, in evaluation mode.
        samples: The split.
        priors: What the training split says without looking.
    """

    model: MMBertForTask
    samples: LabelledSamples
    priors: Priors
    results: list[LabelledResult] = field(default_factory=list)

    @torch.no_grad()
    def step(self, batch: dict[str, Any]) -> None:
        """Evaluates one batch, with the true pictures, blank ones and those of other examples."""
        if len(batch["index"]) == 0:
            return
        model, task = self.model.mmbert, self.model.task
        text = model.encode_text(batch["input_ids"], batch["attention_mask"])
        image = model.encode_image(batch["pixel_values"]) if task.pictures else None
        logits = task.logits(task.pooled(model, text, image))
        with no_autocast(logits):
            losses = task.row_losses(logits, batch["label_scores"].to(logits.dtype)).tolist()
        labels, chances = (
            logits.argmax(dim=-1).tolist(),
            logits.double().softmax(dim=-1)[:, min(1, logits.shape[1] - 1)],
        )
        blank, shuffled = labels, [None] * len(labels)
        if image is not None:
            blank = self._labels(text, self._blank(batch["pixel_values"]))
            if "wrong_pixel_values" in batch:
                found = self._labels(text, model.encode_image(batch["wrong_pixel_values"]))
                shuffled = [x if valid else None for x, valid in zip(found, batch["has_wrong"].tolist(), strict=True)]
        rows = zip(batch["index"].tolist(), losses, labels, chances.tolist(), blank, shuffled, strict=True)
        self.results += [LabelledResult(*row) for row in rows]

    def _labels(self, text: Tokens, image: Tokens) -> list[int]:
        task = self.model.task
        return task.logits(task.pooled(self.model.mmbert, text, image)).argmax(dim=-1).tolist()

    def _blank(self, pixel_values: Tensor) -> Tokens:
        """Encodes one picture in the mean color of the encoder's pictures, and gives it to every row."""
        one = self.model.mmbert.encode_image(torch.zeros_like(pixel_values[:1]))
        return one.rows(torch.zeros(len(pixel_values), dtype=torch.int64, device=pixel_values.device))

    def in_order(self) -> list[LabelledResult]:
        """The results of all processes, each example once, in the order of the data set."""
        return sorted({r.index: r for r in everywhere(self.results)}.values())

    def metrics(self) -> dict[str, float]:
        """The flat results of the split, `vqa_accuracy` and so on; fractions, nats for the loss."""
        results = self.in_order()
        if not results:
            return {}
        task, name = self.model.task, self.model.config.task
        examples = [self.samples.examples[r.index] for r in results]
        found = task.metrics(Said([r.label for r in results], [r.probability for r in results]), examples)
        out = {"loss": sum(r.loss for r in results) / len(results), **found}
        if task.pictures:
            out["accuracy_blank"] = task.metrics(Said([r.blank for r in results], []), examples)["accuracy"]
            both = [(r.shuffled, e) for r, e in zip(results, examples, strict=True) if r.shuffled is not None]
            if both:
                said = Said([label for label, _ in both], [])
                out["accuracy_shuffled"] = task.metrics(said, [e for _, e in both])["accuracy"]
        priors = {"majority": [self.priors.majority] * len(results), "text": [self.priors.of(e.text) for e in examples]}
        for kind, labels in priors.items():
            out[f"prior_{kind}"] = task.metrics(Said(labels, []), examples)["accuracy"]
        best = [self.samples.scores[r.index] for r in results]
        ceiling = [max(scores, key=lambda label, s=scores: s[label]) if scores else 0 for scores in best]
        out["ceiling"] = task.metrics(Said(ceiling, []), examples)["accuracy"]
        return {f"{name}_{key}": value for key, value in out.items()}

    def predictions(self) -> list[dict[str, Any]]:
        """One row an example, as VQA's server takes them: {"question_id", "answer"}."""
        labels = self.model.task.labels
        return [{"question_id": self.samples.examples[r.index].key, "answer": labels[r.label]} for r in self.in_order()]
