"""Data module of a task: labelled texts with images, and the labels that its training split defines."""

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property

from mmbert.data.datamodule import SplitsDataModule
from mmbert.data.labelled import LabelledExample, read_labelled
from mmbert.data.labelled_samples import CollateLabelled, LabelledSamples
from mmbert.data.options import DataOptions, check_options, is_used, reader_options
from mmbert.data.processor import MMBertProcessor
from mmbert.data.samples import Augmentation
from mmbert.errors import DataError, UsageError, did_you_mean, quote
from mmbert.model.tasks import Priors, task_class

log = logging.getLogger("mmbert")


class LabelledDataModule(SplitsDataModule):
    """Data module of labelled texts with images for a task.

    Training examples without a label or answer in the vocabulary are left out, and counted in the log. Validation and
    test keep theirs: no prediction is right for them, which a warning counts.

    Args:
        options: The section `data`.
        examples: Examples of `read_task_data`.
        labels: The task's labels or vocabulary answers.
        task: A name in `mmbert.model.tasks.TASKS`.
        processor: Tokenizer and image settings.
        seed: The run's seed.
    """

    train_samples: LabelledSamples
    val_samples: LabelledSamples | None
    test_samples: dict[str, LabelledSamples]

    def __init__(
        self,
        options: DataOptions,
        examples: Mapping[str, Sequence[LabelledExample]],
        labels: Sequence[str],
        processor: MMBertProcessor,
        *,
        task: str,
        seed: int,
    ):
        self.task, self._label_ids = task_class(task), {label: i for i, label in enumerate(labels)}
        self.collate = CollateLabelled(processor.pad_token_id, len(labels))
        usable = [e for e in examples["train"] if self.task.scores(e.answers, self._label_ids)]
        if len(usable) < len(examples["train"]):
            log.info("%d of %d training examples have no answer in the vocabulary of %d and are left out",
                     len(examples["train"]) - len(usable), len(examples["train"]), len(labels))  # fmt: skip
        for split, split_examples in examples.items():
            if split != "train" and is_used(split):
                self._check_labels(split, split_examples)
        super().__init__(options, {**examples, "train": usable}, processor, seed=seed)

    def _samples(
        self, examples: Sequence[LabelledExample], augmentation: Augmentation | None = None
    ) -> LabelledSamples:
        scores = [self.task.scores(e.answers, self._label_ids) for e in examples]
        return LabelledSamples(
            examples, scores, self.processor, seed=self.seed if augmentation is not None else self.eval_seed,
            augmentation=augmentation, skip_unreadable=self.skip_unreadable,
        )  # fmt: skip

    def _check_labels(self, split: str, examples: Sequence[LabelledExample]) -> None:
        """Warn of the examples of an evaluation split whose labels or answers are not among the task's.

        Raises:
            DataError: None of the split's examples has a known label.
        """
        unknown = [e for e in examples if not self.task.scores(e.answers, self._label_ids)]
        if not unknown:
            return
        first, known = unknown[0], ", ".join([*map(repr, [*self._label_ids][:5]), "..."][: len(self._label_ids)])
        answer = first.most_frequent_answer or first.answers[0]
        near = did_you_mean(answer, self._label_ids)
        if len(unknown) == len(examples):
            found = (
                f"the answer {quote(answer)}, and no answer of the {len(examples):,} examples of {split}, is a label"
            )
            raise DataError(first.place, found, f"one of the {len(self._label_ids):,} of training: {known}.{near}")
        log.warning(
            "%s of %s examples of %s have no answer among the %s labels of training (%s), so any prediction is "
            "wrong for them (first: %s, %s)%s",
            f"{len(unknown):,}", f"{len(examples):,}", split, f"{len(self._label_ids):,}", known, quote(answer),
            first.place, near,
        )  # fmt: skip

    def training_texts(self, positions: Sequence[int]) -> list[str]:
        """Return the texts of training examples."""
        return [self.train_samples.examples[i].text for i in positions]

    @cached_property
    def priors(self) -> Priors:
        """Most frequent labels of the training examples, overall and by text."""
        return self.task.priors(self.train_samples.examples, self.train_samples.scores)


def read_task_data(options: DataOptions, task: str) -> tuple[dict[str, list[LabelledExample]], list[str]]:
    """Read a task's examples, and derive its labels from the training split.

    Raises:
        DataError: Something is wrong with the files, or an example has no answer or another number of images.
        UsageError: Invalid options.
    """
    check_options(options, task=task)
    examples = read_labelled(
        options.format, options.annotations, options.images, questions=options.questions or "",
        image_names=options.image_names, **reader_options(options, task),
    )  # fmt: skip
    if not examples.get("train"):
        raise UsageError(f"data.annotations={options.annotations!r} has no split 'train', only {sorted(examples)}.")
    images = len(examples["train"][0].images)
    for split_examples in examples.values():
        for example in split_examples:
            if not example.answers:
                raise DataError(
                    example.place,
                    "no label or answer",
                    f"one; leave the split {example.split} out, and predict it with `mmbert predict {task} RUN/model`",
                )
            if len(example.images) != images:
                raise DataError(example.place, f"{len(example.images)} images", f"{images}, as the first example")
    return examples, task_class(task).collect_labels(examples["train"], min_count=options.min_answer_count)
