"""Evaluate a saved task model on a new annotation file: the function behind `mmbert evaluate task`."""

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from torch.utils.data import DataLoader

from mmbert.data.labelled import read_labelled
from mmbert.data.labelled_samples import CollateLabelled, LabelledSamples
from mmbert.data.readers.labelled import LabelledExample
from mmbert.errors import DataError, UsageError, printable
from mmbert.evaluation.tasks import TaskEvaluation
from mmbert.inference.cached_images import cached_images, evaluation_computation
from mmbert.inference.evaluate.source import check_sizes, split_name
from mmbert.inference.loaded import LoadedModel, load
from mmbert.model.modeling import MMBertForTask
from mmbert.runtime.signals import StopSignals


class TaskReport(dict[str, float]):
    """Metrics of a task by name, such as "vqa_accuracy"; printed as a table."""

    def __repr__(self) -> str:
        """Format one row for each metric."""
        width = max(map(len, self), default=0)
        return "\n".join(f"{printable(name).ljust(width)}  {value:.4f}" for name, value in self.items())


def evaluate_task(
    model: LoadedModel | str | Path,
    annotations: str | Path,
    images: str | Path | None = None,
    *,
    format: str,
    split: str | None = None,
    questions: str | Path | None = None,
    image_names: str | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    seed: int = 0,
    device: str | None = None,
    cache: str | Path | None = None,
    precision: str | None = None,
    **keys: Any,
) -> TaskReport:
    """Compute the metrics of a fine-tuned model on the examples of a file.

    They are those of a run's test split, with a blank image, another image and an empty text, but for the accuracy of
    the most frequent training labels: a saved model does not hold its training data.

    Args:
        model: Folder of a saved model, or result of `mmbert.load`.
        annotations: Annotation file; for vqav2 the answers.
        images: Folder of the images; none for a task on text alone.
        format: A name in `mmbert.data.labelled.LABELLED_FORMATS`.
        split: Split to evaluate (default "test") of a file that holds several; else the file is one split.
        questions: Question file of vqav2.
        image_names: How an image_id becomes a file name (vqav2, jsonl).
        batch_size: Examples per forward pass.
        num_workers: Processes that decode images.
        seed: Seed of the other images.
        device: "cpu", "cuda" ... for a folder; None: the GPU if there is one.
        cache: Folder of the encoder cache (`data.cache` of a run), from which images are read; missing ones are added.
        precision: 32-true, bf16-mixed or 16-mixed. None: that of the run whose folder holds the model, else 32-true.
        **keys: Options of the format's reader, such as `label_key`.

    Raises:
        UsageError: The model was not fine-tuned for a task, or an option that the format lacks.
        DataError: Something is wrong with the files, or no label of an example is one of the model's.
    """
    check_sizes(batch_size, num_workers)
    loaded = model if isinstance(model, LoadedModel) else load(model, device)
    if not isinstance(loaded.model, MMBertForTask):
        raise UsageError(f"'{loaded.name}' has no task's head; evaluate a model that was fine-tuned with model.task.")
    task = loaded.model.task
    examples = read_labelled_split(
        annotations, images, format=format, split=split, questions=questions, image_names=image_names, **keys
    )
    label_ids = {label: i for i, label in enumerate(task.labels)}
    for example in examples:
        if len(example.images) != task.num_images:
            raise DataError(example.place, f"{len(example.images)} images", f"{task.num_images}, as the model takes")
        if not example.answers:
            raise DataError(example.place, "no label or answer", "one, or `mmbert predict` for unlabelled examples")
    scores = [task.scores(example.answers, label_ids) for example in examples]
    if not any(scores):
        known = ", ".join(map(repr, task.labels[:5]))
        raise DataError(examples[0].place, f"the label {examples[0].answers[0]!r}", f"one of the model's: {known} ...")
    samples = LabelledSamples(examples, scores, loaded.processor, seed=seed, augmentation=None)
    evaluation = TaskEvaluation(loaded.model, samples, priors=None)
    normalize = loaded.processor.image_settings.normalize
    console = Console(stderr=True)
    computation = evaluation_computation(precision, loaded.core, loaded.name)
    files = [file for file, _ in samples.cache_requests()]
    opening = cached_images(
        loaded.core, loaded.processor, cache, files, computation, batch_size=batch_size, num_workers=num_workers
    )
    with computation.context(), opening as samples.cache:
        loader = DataLoader(
            samples,
            batch_size=batch_size,
            collate_fn=CollateLabelled(loaded.processor.pad_token_id, len(task.labels)),
            num_workers=num_workers,
            worker_init_fn=StopSignals.worker_init_fn(),
        )
        for batch in track(loader, "examples", console=console, disable=not sys.stderr.isatty(), transient=True):
            moved = {key: value.to(loaded.device) for key, value in batch.items()}
            images_of = {key: normalize(moved[key]) for key in ("pixel_values", "wrong_pixel_values") if key in moved}
            evaluation.step({**moved, **images_of})
        return TaskReport(evaluation.metrics())


def read_labelled_split(
    annotations: str | Path,
    images: str | Path | None,
    *,
    format: str,
    split: str | None = None,
    questions: str | Path | None = None,
    image_names: str | None = None,
    **keys: Any,
) -> list[LabelledExample]:
    """Read the examples of one split; see `evaluate_task` for the arguments and errors."""
    has_splits = "split_key" in keys or format == "easy_vqa"
    name = split_name(split, has_splits=has_splits, format=format)
    file = str(annotations) if has_splits else {name: str(annotations)}
    found = read_labelled(
        format,
        file,
        "" if images is None else str(images),
        questions={name: str(questions)} if questions is not None else "",
        image_names=image_names or "",
        **keys,
    )
    if not found.get(name):
        raise DataError(str(annotations), f"no example in the split {name!r}", f"one of {', '.join(found) or 'none'}")
    return found[name]
