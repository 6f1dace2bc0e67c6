"""Annotation files to training, validation and test batches: of pairs for pretraining, labelled ones for a task."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import lightning as L
import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from mmbert.data.examples import Example, read_examples
from mmbert.data.labelled import LabelledExample, read_labelled
from mmbert.data.labelled_samples import CollateLabelled, LabelledSamples
from mmbert.data.masking import Masking
from mmbert.data.options import DataOptions, check_options, reader_options
from mmbert.data.pairs import Collate, Pairs
from mmbert.data.processor import MMBertProcessor
from mmbert.data.samples import Augmentation, Samples
from mmbert.data.sampling import TrainBatches, TrainLoader
from mmbert.errors import DataError, UsageError
from mmbert.model.tasks import Priors, task_class
from mmbert.runtime.distributed import rank, world_size
from mmbert.runtime.randomness import permutation
from mmbert.runtime.signals import StopSignals

log = logging.getLogger("mmbert")


class SplitsDataModule(L.LightningDataModule):
    """Training, validation and test splits as loaders; a subclass says what a sample is (`_samples`, `collate`).

    Args:
        options: Where the data is.
        examples: split -> what a reader found.
        processor: Tokenizer and image settings.
        seed: The run's seed.

    Raises:
        UsageError: No training split, or one that fills no batch.
    """

    collate: Callable[[list[Any]], dict[str, Any]]

    def __init__(
        self, options: DataOptions, examples: Mapping[str, Sequence[Any]], processor: MMBertProcessor, *, seed: int
    ):
        super().__init__()
        if options.train_fraction < 1 and examples.get("train"):
            examples = {**examples, "train": _take_fraction(examples["train"], options.train_fraction, seed)}
        self.options, self.examples, self.processor, self.seed = options, examples, processor, seed
        self.eval_seed = seed if options.eval_seed is None else options.eval_seed
        self.loader_state: dict[str, int] | None = None
        """Where the training loader starts, as `TrainLoader.state_dict` tells it; None: at the beginning."""
        if not examples.get("train"):
            raise UsageError(f"data.annotations={options.annotations!r} has no split 'train', only {sorted(examples)}.")
        self.train_samples = self._samples(examples["train"], Augmentation(options.crop, options.flip))
        self._check_batch_size()
        self.val_samples = (
            self._samples(self._validation_subset(examples["val"], "val")) if examples.get("val") else None
        )
        self.test_splits = sorted(name for name in examples if name.startswith("test"))
        self.test_samples = {
            name: self._samples(self._expand_test_captions(examples[name])) for name in self.test_splits
        }

    def _samples(self, examples: Sequence[Any], augmentation: Augmentation | None = None) -> Samples:
        """The samples of a split, for evaluation where there is no augmentation."""
        raise NotImplementedError

    def _expand_test_captions(self, examples: Sequence[Any]) -> Sequence[Any]:
        """What of a test split is tested."""
        return examples

    def _validation_subset(self, examples: Sequence[Any], split: str) -> Sequence[Any]:
        size = self.options.val_size
        if size is None or size >= len(examples):
            return examples
        return [examples[i] for i in sorted(permutation(self.eval_seed, f"sample {split}", 0, len(examples))[:size])]

    def training_texts(self, chosen: Sequence[int]) -> list[str]:
        """The texts of training samples in the first epoch."""
        raise NotImplementedError

    @property
    def skip_unreadable(self) -> bool:
        """Whether images that can't be read are left out."""
        return self.options.on_bad_sample == "skip"

    def _check_batch_size(self) -> None:
        if self.steps_per_epoch() == 0:
            pairs, processes = len(self.train_samples), world_size()
            raise UsageError(
                f"data.batch_size={self.options.batch_size} times {processes} processes is more than the "
                f"{pairs} training pairs; choose at most {pairs // processes}."
            )

    def steps_per_epoch(self) -> int:
        """Training batches an epoch, for each process."""
        return len(self.train_samples) // (self.options.batch_size * world_size())

    def sizes(self) -> dict[str, int]:
        """Pairs in each split that is used."""
        val = {} if self.val_samples is None else {"val": len(self.val_samples)}
        return {"train": len(self.train_samples), **val, **{k: len(v) for k, v in self.test_samples.items()}}

    def truncated_fraction(self, *, at_most: int = 1000) -> float:
        """Fraction of training texts that `max_text_length` cuts, from a fixed sample."""
        chosen = permutation(self.seed, "cut captions", 0, len(self.train_samples))[:at_most]
        return self.processor.truncated_fraction(self.training_texts(chosen.tolist()))

    def train_dataloader(self) -> DataLoader:
        """Batches in the order of (seed, epoch).

        Raises:
            UsageError: Fewer pairs than fill one batch of all processes.
        """
        options, pairs = self.options, self.train_samples
        self._check_batch_size()
        batches = TrainBatches(
            pairs.text_lengths,
            len(pairs),
            batch_size=options.batch_size,
            seed=self.seed,
            rank=rank(),
            world_size=world_size(),
            pool=options.length_pool,
        )
        loader = self._loader(pairs, batch_sampler=batches, kind=TrainLoader)
        if self.loader_state is not None:
            assert isinstance(loader, TrainLoader)
            loader.load_state_dict(self.loader_state)
        return loader

    def val_dataloader(self) -> DataLoader | list:
        """The fixed validation samples; none if there is no split "val"."""
        return [] if self.val_samples is None else self._evaluation(self.val_samples)

    def test_dataloader(self) -> list[DataLoader]:
        """One loader for each split in `test_splits`."""
        return [self._evaluation(pairs) for pairs in self.test_samples.values()]

    def _evaluation(self, pairs: Samples) -> DataLoader:
        by_length = np.argsort(pairs.text_lengths(0), kind="stable")
        # A process without a pair of its own would leave the others waiting: it repeats one, which counts once.
        by_length = by_length[rank() % len(by_length) :: world_size()].tolist()
        size = self.options.eval_batch_size
        return self._loader(pairs, batch_sampler=[by_length[i : i + size] for i in range(0, len(by_length), size)])

    def _loader(
        self, pairs: Samples, *, batch_sampler: TrainBatches | list[list[int]], kind: type[DataLoader] = DataLoader
    ) -> DataLoader:
        return kind(
            pairs,
            batch_sampler=batch_sampler,
            num_workers=self.options.num_workers,
            collate_fn=self.collate,
            worker_init_fn=StopSignals.worker_init_fn(),
            persistent_workers=False,
            pin_memory=False,
        )

    def on_after_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        """Normalises the images where the model is: bytes travel, floats don't."""
        for key in ("pixel_values", "wrong_pixel_values"):
            if key in batch:
                batch[key] = self.processor.image_settings.normalize(batch[key])
        return batch


class PairsDataModule(SplitsDataModule):
    """Image-caption pairs; reads the annotations on construction, so that a mistake is told before anything happens."""

    train_samples: Pairs
    val_samples: Pairs | None
    test_samples: dict[str, Pairs]

    def __init__(self, options: DataOptions, processor: MMBertProcessor, *, seed: int):
        check_options(options)
        reading = reader_options(options)
        examples = read_examples(options.format, options.annotations, options.images, **reading)
        tokenizer = processor.tokenizer
        special = frozenset(int(i) for i in tokenizer.all_special_ids)
        ordinary = np.array([i for i in range(len(tokenizer)) if i not in special], dtype=np.int64)
        self.masking = Masking(
            mask_token_id=int(tokenizer.mask_token_id),  # pyright: ignore[reportArgumentType]
            ordinary_ids=ordinary,
            special_ids=special,
            probability=options.mlm_probability,
            whole_word=options.whole_word,
        )
        self.collate = Collate(processor.pad_token_id)
        super().__init__(options, examples, processor, seed=seed)

    def _samples(self, examples: Sequence[Example], augmentation: Augmentation | None = None) -> Pairs:
        return Pairs(
            examples, self.processor, self.masking, seed=self.seed if augmentation is not None else self.eval_seed,
            augmentation=augmentation, skip_unreadable=self.skip_unreadable,
        )  # fmt: skip

    def _expand_test_captions(self, examples: Sequence[Example]) -> Sequence[Example]:
        captions = self.options.test_captions
        if captions == 1:
            return examples
        return [  # evaluation shows the first caption, so each goes first once
            replace(e, captions=e.captions[i:] + e.captions[:i])
            for e in examples
            for i in range(min(captions, len(e.captions)))
        ]

    def training_texts(self, chosen: Sequence[int]) -> list[str]:
        """The captions that images show in the first epoch."""
        numbers = self.train_samples.caption_numbers(0)
        return [self.train_samples.examples[i].captions[numbers[i]] for i in chosen]


class LabelledDataModule(SplitsDataModule):
    """Labelled texts with their images, for the task that has these labels.

    Args:
        options: Where the data is.
        examples: What `read_task_data` gave.
        labels: What the task chooses from.
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
        self.task, self._number = task_class(task), {label: i for i, label in enumerate(labels)}
        self.collate = CollateLabelled(processor.pad_token_id, len(labels))
        usable = [e for e in examples["train"] if self.task.scores(e.answers, self._number)]
        if len(usable) < len(examples["train"]):
            log.info("%d of %d training examples have no answer in the vocabulary of %d and are left out",
                     len(examples["train"]) - len(usable), len(examples["train"]), len(labels))  # fmt: skip
        super().__init__(options, {**examples, "train": usable}, processor, seed=seed)

    def _samples(
        self, examples: Sequence[LabelledExample], augmentation: Augmentation | None = None
    ) -> LabelledSamples:
        scores = [self.task.scores(e.answers, self._number) for e in examples]
        return LabelledSamples(
            examples, scores, self.processor, seed=self.seed if augmentation is not None else self.eval_seed,
            augmentation=augmentation, skip_unreadable=self.skip_unreadable,
        )  # fmt: skip

    def training_texts(self, chosen: Sequence[int]) -> list[str]:
        """The texts of training examples."""
        return [self.train_samples.examples[i].text for i in chosen]

    @cached_property
    def priors(self) -> Priors:
        """What the training examples say without looking."""
        return self.task.priors(self.train_samples.examples, self.train_samples.scores)


def read_task_data(options: DataOptions, task: str) -> tuple[dict[str, list[LabelledExample]], list[str]]:
    """Reads a task's examples, and the labels that their training split gives.

    Raises:
        DataError: Something is wrong with the files, or an example has no answer or another number of images.
        UsageError: Options that can't be meant.
    """
    check_options(options, task=task)
    examples = read_labelled(
        options.format, options.annotations, options.images, questions=options.questions or "",
        image_names=options.image_names, **reader_options(options, task),
    )  # fmt: skip
    if not examples.get("train"):
        raise UsageError(f"data.annotations={options.annotations!r} has no split 'train', only {sorted(examples)}.")
    images = len(examples["train"][0].images)
    for listed in examples.values():
        for example in listed:
            if not example.answers:
                raise DataError(example.place, "no answer", "one: `mmbert predict` is for examples without")
            if len(example.images) != images:
                raise DataError(example.place, f"{len(example.images)} images", f"{images}, as the first example")
    return examples, task_class(task).labels_of(examples["train"], min_count=options.min_answer_count)


def _take_fraction(examples: Sequence[Any], fraction: float, seed: int) -> list[Any]:
    """A sample of at least one, in the order of the file."""
    count = max(1, round(fraction * len(examples)))
    return [examples[i] for i in sorted(permutation(seed, "fraction", 0, len(examples))[:count].tolist())]
