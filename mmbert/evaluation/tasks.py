"""What a fine-tuned model can do, beside what it would do with no image, a wrong one, no text, or without any model.

Results are kept per example and put in the order of the data set before they are summed, as in `pairs.py`.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmbert.data.labelled_samples import LabelledSamples
from mmbert.metrics.outcomes import ItemOutcomes
from mmbert.model.modeling import MMBertForTask
from mmbert.model.objectives.base import no_autocast
from mmbert.model.tasks import Predictions, Priors
from mmbert.model.tokens import Tokens
from mmbert.runtime.distributed import all_gather_list


class LabelledResult(NamedTuple):
    """What the model said of one example."""

    index: int
    loss: float
    label: int
    probability: float  # of label 1
    blank: int  # label with a grey image
    shuffled: int | None  # label with another example's images; None: there are no others
    no_text: int  # label with an empty text


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
        """Evaluates one batch: with the true images, blank ones, those of other examples, and without the texts."""
        if len(batch["index"]) == 0:
            return
        model, task = self.model.mmbert, self.model.task
        text = model.encode_text(batch["input_ids"], batch["attention_mask"])
        image = model.encode_image(batch["pixel_values"]) if task.num_images else None
        logits = task.logits(task.pooled(model, text, image))
        with no_autocast(logits):
            losses = task.example_losses(logits, batch["label_scores"].to(logits.dtype)).tolist()
        labels, chances = (
            logits.argmax(dim=-1).tolist(),
            logits.double().softmax(dim=-1)[:, min(1, logits.shape[1] - 1)],
        )
        blank, shuffled, no_text = labels, [None] * len(labels), labels
        if image is not None:
            no_text = self._labels(self._empty(batch), image)
            blank = self._labels(text, self._blank(batch["pixel_values"]))
            if "wrong_pixel_values" in batch:
                found = self._labels(text, model.encode_image(batch["wrong_pixel_values"]))
                shuffled = [x if valid else None for x, valid in zip(found, batch["has_wrong"].tolist(), strict=True)]
        rows = zip(batch["index"].tolist(), losses, labels, chances.tolist(), blank, shuffled, no_text, strict=True)
        self.results += [LabelledResult(*row) for row in rows]

    def _labels(self, text: Tokens, image: Tokens) -> list[int]:
        task = self.model.task
        return task.logits(task.pooled(self.model.mmbert, text, image)).argmax(dim=-1).tolist()

    def _blank(self, pixel_values: Tensor) -> Tokens:
        """Encodes one image in the mean color of the encoder's images, and gives it to every row."""
        one = self.model.mmbert.encode_image(torch.zeros_like(pixel_values[:1]))
        return one.rows(torch.zeros(len(pixel_values), dtype=torch.int64, device=pixel_values.device))

    def _empty(self, batch: dict[str, Any]) -> Tokens:
        """Encodes a text of its first and last token alone, [CLS] and [SEP], and gives it to every row."""
        last = int(batch["attention_mask"][0].sum()) - 1
        one = self.model.mmbert.encode_text(batch["input_ids"][:1, [0, last]])
        return one.rows(torch.zeros(len(batch["input_ids"]), dtype=torch.int64, device=one.mask.device))

    def merged_results(self) -> list[LabelledResult]:
        """The results of all processes, each example once, in the order of the data set."""
        return sorted({r.index: r for r in all_gather_list(self.results)}.values())

    def metrics(self) -> dict[str, float]:
        """The flat results of the split, `vqa_accuracy` and so on; fractions, nats for the loss."""
        results = self.merged_results()
        if not results:
            return {}
        task, name = self.model.task, self.model.config.task
        examples = [self.samples.examples[r.index] for r in results]
        found = task.metrics(Predictions([r.label for r in results], [r.probability for r in results]), examples)
        out = {"loss": sum(r.loss for r in results) / len(results), **found}
        items = self._rights(results)
        out |= {key: sum(rights) / len(rights) for key, (rights, _) in items.items() if key != "accuracy"}
        priors = {"majority": [self.priors.majority] * len(results), "text": [self.priors.of(e.text) for e in examples]}
        for kind, labels in priors.items():
            out[f"prior_{kind}"] = task.metrics(Predictions(labels, []), examples)["accuracy"]
        best = [self.samples.scores[r.index] for r in results]
        ceiling = [max(scores, key=lambda label, s=scores: s[label]) if scores else 0 for scores in best]
        out["ceiling"] = task.metrics(Predictions(ceiling, []), examples)["accuracy"]
        return {f"{name}_{key}": value for key, value in out.items()}

    def _rights(self, results: list[LabelledResult]) -> dict[str, tuple[list[float], list[LabelledResult]]]:
        """Kind of input -> how right each answer was, and the results that have one."""
        task = self.model.task
        kinds = {"accuracy": "label"}
        if task.num_images:
            kinds |= {f"accuracy_{kind}": kind for kind in ("blank", "shuffled", "no_text")}
        out = {}
        for name, kind in kinds.items():
            rows = [r for r in results if getattr(r, kind) is not None]
            if rows:
                labels = [getattr(r, kind) for r in rows]
                out[name] = (task.rights(labels, [self.samples.examples[r.index] for r in rows]), rows)
        return out

    def outcomes(self) -> dict[str, ItemOutcomes]:
        """How right the model was on each example, under the name of the result that is their mean."""
        images: dict[Any, int] = {}
        examples = self.samples.examples
        return {
            f"{self.model.config.task}_{name}": ItemOutcomes(
                rights, [images.setdefault(examples[r.index].images or r.index, len(images)) for r in rows]
            )
            for name, (rights, rows) in self._rights(self.merged_results()).items()
        }

    def predictions(self) -> list[dict[str, Any]]:
        """One row an example, as VQA's server takes them: {"question_id", "answer"}."""
        labels = self.model.task.labels
        return [
            {"question_id": self.samples.examples[r.index].key, "answer": labels[r.label]}
            for r in self.merged_results()
        ]
