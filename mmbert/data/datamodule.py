"""Annotation files to training, validation and test batches: of pairs for pretraining, labelled ones for a task."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from mmbert.data.pairs import Collate, Pairs
from mmbert.data.samples import Augmentation, Samples
from mmbert.data.sampling import TrainBatches, TrainLoader
from mmbert.distributed import rank, world_size
from mmbert.errors import DataError, UsageError
from mmbert.processing import MMBertProcessor
from mmbert.randomness import permutation
from mmbert.signals import StopSignals
from mmbert.tasks import Priors, task_class

log = logging.getLogger("mmbert")


@dataclass(kw_only=True)
class DataOptions:
    """Where the pairs are and how they are read."""

    format: str = "coco"
    """Format of the annotations: a name in `mmbert.data.readers.FORMATS` (coco, karpathy, jsonl, csv); for a task one
    in `mmbert.data.labelled.LABELLED_FORMATS` (vqav2, easy_vqa, jsonl, nlvr, nlvr2)."""
    annotations: str | dict[str, str] = ""
    """One file that tells the splits itself, or a file for each: {train: ..., val: ..., test: ...}. Every split whose
    name starts with "test" is tested and reported under its own name."""
    images: str | dict[str, str] = ""
    """Folder that the annotations' picture paths start from, or one for each split. Empty: the texts of a task stand
    alone."""
    image_key: str | list[str] = "image"
    """Field of a JSONL or CSV record with the picture's path; for a task fields, where a text has several pictures."""
    caption_key: str | list[str] = "caption"
    """Field or fields with the caption (a string or a list of strings); every text that is not empty counts."""
    split_key: str | None = None
    """Field that tells the split of a JSONL or CSV record."""
    split_values: dict[str, list[str]] | None = None
    """Values of `split_key` that make up a split, {val: [...], test: [...]}; the others are for training."""
    text_key: str = "text"
    """Field of a task's JSONL record with the text."""
    label_key: str = "label"
    """Field of a task's JSONL record with the label."""
    id_key: str | None = None
    """Field of a task's JSONL record that names it in predictions. None: its number in the file."""
    questions: dict[str, str] | None = None
    """Question files of vqav2, one for each split."""
    image_names: str | dict[str, str] = ""
    """How an image_id becomes a file name: a template, COCO_val2014_{:012d}.jpg, or a JSON file with COCO's list of
    images; one for all or one for each split. For a task's JSONL what the field's value is put into, {}.jpg."""
    min_answer_count: int = 9
    """Training questions that an answer must be the commonest one of to be in the vocabulary of VQA."""
    tokenizer: str | None = None
    """Tokenizer: a name on the hub or a folder. None: that of `model.pretrained` or `model.text_pretrained`."""
    max_text_length: int = 64
    """Longer texts are cut, in tokens incl. [CLS] and [SEP]."""
    mlm_probability: float = 0.15
    """Fraction of tokens that masked language modelling predicts."""
    whole_word: bool = False
    """Mask all pieces of a word together."""
    crop: float = 1.0
    """Smallest fraction of a training picture's area that a random crop keeps; 1 = no crop."""
    flip: bool = False
    """Mirror half of the training pictures, never one whose caption says left or right."""
    batch_size: int = 64
    """Training pairs a step and process."""
    eval_batch_size: int = 128
    """Pairs a step in validation and test; changes no result."""
    num_workers: int = 1
    """Processes that decode pictures; changes no result."""
    length_pool: int = 50
    """Batches whose texts are sorted by length together; 1 = no grouping."""
    on_bad_sample: str = "stop"
    """What a picture that can't be read does: stop ends the run with its name; skip puts another sample in its place,
    counts it in metrics.json, and ends the run above `max_bad_fraction`."""
    max_bad_fraction: float = 0.01
    """Fraction of a split's pairs that may be skipped."""
    train_fraction: float = 1.0
    """Fraction of the training pictures or examples that is used: a sample that follows from the seed, the same for
    every model, and part of every larger one."""
    eval_seed: int | None = None
    """Seed of the masks, wrong pictures and samples of validation and test. None: the run's. Runs with the same one
    answer the same test items."""
    val_size: int | None = 1000
    """At most so many images, with their first caption, or examples of a task validate, a fixed sample; None = all."""
    test_captions: int = 1
    """Captions of each image that masked words and matching are tested on, at most; retrieval takes the first."""


class SplitsDataModule(L.LightningDataModule):
    """Training, validation and test splits as loaders; a subclass says what a sample is (`_samples`, `collate`).

    Args:
        options: Where the data is.
        examples: split -> what a reader found.
        processor: Tokenizer and picture settings.
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
            examples = {**examples, "train": _fraction(examples["train"], options.train_fraction, seed)}
        self.options, self.examples, self.processor, self.seed = options, examples, processor, seed
        self.eval_seed = seed if options.eval_seed is None else options.eval_seed
        self.position: dict[str, int] | None = None
        """Where the training loader starts, as `TrainLoader.state_dict` tells it; None: at the beginning."""
        if not examples.get("train"):
            raise UsageError(f"data.annotations={options.annotations!r} has no split 'train', only {sorted(examples)}.")
        self.train_pairs = self._samples(examples["train"], Augmentation(options.crop, options.flip))
        self._refuse_oversized_batch()
        self.val_pairs = self._samples(self._some(examples["val"], "val")) if examples.get("val") else None
        self.test_splits = sorted(name for name in examples if name.startswith("test"))
        self.test_pairs = {name: self._samples(self._tested(examples[name])) for name in self.test_splits}

    def _samples(self, examples: Sequence[Any], augmentation: Augmentation | None = None) -> Samples:
        """The samples of a split, for evaluation where there is no augmentation."""
        raise NotImplementedError

    def _tested(self, examples: Sequence[Any]) -> Sequence[Any]:
        """What of a test split is tested."""
        return examples

    def _some(self, examples: Sequence[Any], split: str) -> Sequence[Any]:
        size = self.options.val_size
        if size is None or size >= len(examples):
            return examples
        return [examples[i] for i in sorted(permutation(self.eval_seed, f"sample {split}", 0, len(examples))[:size])]

    def shown_texts(self, chosen: Sequence[int]) -> list[str]:
        """The texts of training samples in the first epoch."""
        raise NotImplementedError

    @property
    def skip_bad(self) -> bool:
        """Whether pictures that can't be read are left out."""
        return self.options.on_bad_sample == "skip"

    def _refuse_oversized_batch(self) -> None:
        if self.steps_per_epoch() == 0:
            pairs, processes = len(self.train_pairs), world_size()
            raise UsageError(
                f"data.batch_size={self.options.batch_size} times {processes} processes is more than the "
                f"{pairs} training pairs; choose at most {pairs // processes}."
            )

    def steps_per_epoch(self) -> int:
        """Training batches an epoch, for each process."""
        return len(self.train_pairs) // (self.options.batch_size * world_size())

    def sizes(self) -> dict[str, int]:
        """Pairs in each split that is used."""
        val = {} if self.val_pairs is None else {"val": len(self.val_pairs)}
        return {"train": len(self.train_pairs), **val, **{k: len(v) for k, v in self.test_pairs.items()}}

    def cut_share(self, *, at_most: int = 1000) -> float:
        """Fraction of training texts that `max_text_length` cuts, from a fixed sample."""
        chosen = permutation(self.seed, "cut captions", 0, len(self.train_pairs))[:at_most]
        return self.processor.cut_share(self.shown_texts(chosen.tolist()))

    def train_dataloader(self) -> DataLoader:
        """Batches in the order of (seed, epoch).

        Raises:
            UsageError: Fewer pairs than fill one batch of all processes.
        """
        options, pairs = self.options, self.train_pairs
        self._refuse_oversized_batch()
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
        if self.position is not None:
            assert isinstance(loader, TrainLoader)
            loader.load_state_dict(self.position)
        return loader

    def val_dataloader(self) -> DataLoader | list:
        """The fixed validation samples; none if there is no split "val"."""
        return [] if self.val_pairs is None else self._evaluation(self.val_pairs)

    def test_dataloader(self) -> list[DataLoader]:
        """One loader for each split in `test_splits`."""
        return [self._evaluation(pairs) for pairs in self.test_pairs.values()]

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
            worker_init_fn=StopSignals.for_loader(),
            persistent_workers=False,
            pin_memory=False,
        )

    def on_after_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        """Normalises the pictures where the model is: bytes travel, floats don't."""
        for key in ("pixel_values", "wrong_pixel_values"):
            if key in batch:
                batch[key] = self.processor.pictures.normalize(batch[key])
        return batch


class PairsDataModule(SplitsDataModule):
    """Image-caption pairs; reads the annotations on construction, so that a mistake is told before anything happens."""

    train_pairs: Pairs
    val_pairs: Pairs | None
    test_pairs: dict[str, Pairs]

    def __init__(self, options: DataOptions, processor: MMBertProcessor, *, seed: int):
        _check(options)
        keys: dict[str, Any] = {}
        if options.format in ("jsonl", "csv"):
            names = ("image_key", "caption_key", "split_key", "split_values")
            keys = {name: getattr(options, name) for name in names}
        examples = read_examples(options.format, options.annotations, options.images, **keys)
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
            augmentation=augmentation, skip_bad=self.skip_bad,
        )  # fmt: skip

    def _tested(self, examples: Sequence[Example]) -> Sequence[Example]:
        captions = self.options.test_captions
        if captions == 1:
            return examples
        return [  # evaluation shows the first caption, so each goes first once
            replace(e, captions=e.captions[i:] + e.captions[:i])
            for e in examples
            for i in range(min(captions, len(e.captions)))
        ]

    def shown_texts(self, chosen: Sequence[int]) -> list[str]:
        """The captions that images show in the first epoch."""
        numbers = self.train_pairs.caption_numbers(0)
        return [self.train_pairs.examples[i].captions[numbers[i]] for i in chosen]


class LabelledDataModule(SplitsDataModule):
    """Labelled texts with their pictures, for the task that has these labels.

    Args:
        options: Where the data is.
        examples: What `read_task_data` gave.
        labels: What the task chooses from.
        task: A name in `mmbert.tasks.TASKS`.
        processor: Tokenizer and picture settings.
        seed: The run's seed.
    """

    train_pairs: LabelledSamples
    val_pairs: LabelledSamples | None
    test_pairs: dict[str, LabelledSamples]

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
            augmentation=augmentation, skip_bad=self.skip_bad,
        )  # fmt: skip

    def shown_texts(self, chosen: Sequence[int]) -> list[str]:
        """The texts of training examples."""
        return [self.train_pairs.examples[i].text for i in chosen]

    @cached_property
    def priors(self) -> Priors:
        """What the training examples say without looking."""
        return self.task.priors(self.train_pairs.examples, self.train_pairs.scores)


def read_task_data(options: DataOptions, task: str) -> tuple[dict[str, list[LabelledExample]], list[str]]:
    """Reads a task's examples, and the labels that their training split gives.

    Raises:
        DataError: Something is wrong with the files, or an example has no answer or another number of pictures.
        UsageError: Options that can't be meant.
    """
    _check(options, needed=("annotations",) if options.format != "easy_vqa" else ())
    keys: dict[str, Any] = {}
    if options.format == "jsonl":
        names = ("image_key", "text_key", "label_key", "id_key", "split_key", "split_values")
        keys = {name: getattr(options, name) for name in names}
    examples = read_labelled(
        options.format, options.annotations, options.images, questions=options.questions or "",
        image_names=options.image_names, **keys,
    )  # fmt: skip
    if not examples.get("train"):
        raise UsageError(f"data.annotations={options.annotations!r} has no split 'train', only {sorted(examples)}.")
    pictures = len(examples["train"][0].images)
    for listed in examples.values():
        for example in listed:
            if not example.answers:
                raise DataError(example.place, "no answer", "one: `mmbert predict` is for examples without")
            if len(example.images) != pictures:
                raise DataError(example.place, f"{len(example.images)} pictures", f"{pictures}, as the first example")
    return examples, task_class(task).labels_of(examples["train"], min_count=options.min_answer_count)


def _fraction(examples: Sequence[Any], fraction: float, seed: int) -> list[Any]:
    """A sample of at least one, in the order of the file."""
    count = max(1, round(fraction * len(examples)))
    return [examples[i] for i in sorted(permutation(seed, "fraction", 0, len(examples))[:count].tolist())]


def _check(options: DataOptions, *, needed: Sequence[str] = ("annotations", "images")) -> None:
    for name in ("batch_size", "eval_batch_size", "length_pool", "test_captions", "min_answer_count"):
        if getattr(options, name) < 1:
            raise UsageError(f"data.{name}={getattr(options, name)}: must be 1 or more.")
    if options.num_workers < 0:
        raise UsageError(f"data.num_workers={options.num_workers}: must be 0 or more.")
    if options.max_text_length < 3:
        raise UsageError(f"data.max_text_length={options.max_text_length}: [CLS], one token and [SEP] need 3.")
    if options.on_bad_sample not in ("stop", "skip"):
        raise UsageError(f"data.on_bad_sample='{options.on_bad_sample}'; allowed are stop, skip.")
    if not 0 <= options.max_bad_fraction <= 1:
        raise UsageError(f"data.max_bad_fraction={options.max_bad_fraction}: a fraction from 0 to 1.")
    for name in ("mlm_probability", "crop", "train_fraction"):
        if not 0 < getattr(options, name) <= 1:
            raise UsageError(f"data.{name}={getattr(options, name)}: a fraction above 0, up to 1.")
    for name in needed:
        if not getattr(options, name):
            raise UsageError(f"data.{name} is missing: say where the data is, see configs/ for examples.")
