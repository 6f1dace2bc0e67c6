"""`pipeline`: saved models by task names of transformers' pipelines, a thin layer over `mmbert.load`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mmbert.data.images import ImageSource
from mmbert.errors import UsageError, did_you_mean
from mmbert.inference.loaded import LoadedModel, load

Row = dict[str, Any]


def answer_question(model: LoadedModel, image: ImageSource, question: str, *, top_k: int = 5) -> list[Row]:
    """Answer a question about an image: rows with `score` and `answer`, best first; see `LoadedModel.answer`."""
    return [{"score": found.score, "answer": found.answer} for found in model.answer(image, question, top_k)]


def match_texts(model: LoadedModel, image: ImageSource, text: str | Sequence[str]) -> list[Row]:
    """Score texts with an image: rows with `score` and `text`, in the order given; see `LoadedModel.match`."""
    texts = [text] if isinstance(text, str) else [*text]
    return [{"score": score, "text": t} for score, t in zip(model.match(image, texts).scores, texts, strict=True)]


def fill_mask(
    model: LoadedModel, text: str, image: ImageSource | None = None, *, top_k: int = 5
) -> list[Row] | list[list[Row]]:
    """Predict the tokens at [MASK]: rows with `score` and `token_str`; a list of them for each of several masks."""
    found = [
        [{"score": word.probability, "token_str": word.token} for word in words]
        for words in model.fill_mask(image, text, top_k)
    ]
    return found[0] if len(found) == 1 else found


def extract_features(
    model: LoadedModel,
    *,
    image: ImageSource | Sequence[ImageSource] | None = None,
    text: str | Sequence[str] | None = None,
) -> Row:
    """Compute contrastive unit vectors: `image_embeds` and `text_embeds`, (N, E); see `LoadedModel.embed`."""
    found = model.embed(images=image, texts=text)
    vectors = {"image_embeds": found.images, "text_embeds": found.texts}
    return {name: vector for name, vector in vectors.items() if vector is not None}


def classify_image(
    model: LoadedModel,
    image: ImageSource,
    candidate_labels: str | Sequence[str],
    *,
    hypothesis_template: str = "This is a photo of {}.",
) -> list[Row]:
    """Classify an image without training: rows with `score` and `label`, best first.

    Scores are the softmax over the labels of the log-odds that the label's text matches, or with itc alone of the
    contrastive logits (CLIP, arXiv:2103.00020, Sec. 3.1.2). One text is split at its commas, as transformers does.

    Raises:
        UsageError: No labels, or a template without {}.
    """
    if isinstance(candidate_labels, str):
        candidate_labels = [label.strip() for label in candidate_labels.split(",") if label.strip()]
    if "{}" not in hypothesis_template or not candidate_labels:
        raise UsageError(
            f"candidate_labels={[*candidate_labels]}, hypothesis_template={hypothesis_template!r}: give at least one "
            "label, and a template with {} where it goes."
        )
    matches = model.match(image, [hypothesis_template.format(label) for label in candidate_labels])
    scores = torch.tensor(matches.scores, dtype=torch.float64)
    if matches.kind == "probability":
        logits = scores.logit(eps=1e-12)
    else:
        heads: Any = model.model
        logits = scores * float(heads.objectives["itc"].scale)
    rows = zip(logits.softmax(dim=0).tolist(), candidate_labels, strict=True)
    return [{"score": score, "label": label} for score, label in sorted(rows, key=lambda row: -row[0])]


TASKS: dict[str, Callable[..., Any]] = {
    "visual-question-answering": answer_question,
    "image-text-matching": match_texts,
    "fill-mask": fill_mask,
    "feature-extraction": extract_features,
    "zero-shot-image-classification": classify_image,
}


class Pipeline:
    """Callable for one task with one model, as `pipeline` returns it; its arguments are those of the task's function.

    Args:
        task: Name in `TASKS`.
        model: The model.
    """

    def __init__(self, task: str, model: LoadedModel):
        self.task, self.model = task, model

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """Run the task on one image, text or both; see the functions of this module."""
        return TASKS[self.task](self.model, *inputs, **options)


def pipeline(task: str, model: str | Path | LoadedModel, *, device: str | torch.device | None = None) -> Pipeline:
    """Load a saved model for a task of transformers' pipelines.

    Args:
        task: "visual-question-answering", "image-text-matching", "fill-mask", "feature-extraction" or
            "zero-shot-image-classification".
        model: Folder or hub name of a saved model, or the result of `mmbert.load`.
        device: "cpu", "cuda", "cuda:1" ...; None: the GPU if there is one.

    Raises:
        UsageError: An unknown task, or see `mmbert.load`; a head that the model lacks raises when it is called.
        DataError: See `mmbert.load`.
    """
    if task not in TASKS:
        raise UsageError(f"task={task!r}; allowed are {', '.join(TASKS)}.{did_you_mean(task, TASKS)}")
    return Pipeline(task, model if isinstance(model, LoadedModel) else load(model, device))
