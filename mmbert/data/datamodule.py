"""`PairsDataModule`: annotation files to training, validation and test batches."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import lightning as L
import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from mmbert.data.examples import Example, read_examples
from mmbert.data.masking import Masking
from mmbert.data.pairs import Augmentation, Collate, Pairs
from mmbert.data.sampling import TrainBatches, TrainLoader
from mmbert.distributed import rank, world_size
from mmbert.errors import UsageError
from mmbert.processing import MMBertProcessor
from mmbert.randomness import permutation
from mmbert.signals import StopSignals

log = logging.getLogger("mmbert")


@dataclass(kw_only=True)
class DataOptions:
    """Where the pairs are and how they are read."""

    format: str = "coco"
    """Format of the annotations: a name in `mmbert.data.readers.FORMATS` (coco, karpathy, jsonl, csv)."""
    annotations: str | dict[str, str] = ""
    """One file that tells the splits itself, or a file for each: {train: ..., val: ..., test: ...}. Every split whose
    name starts with "test" is tested and reported under its own name."""
    images: str = ""
    """Folder that the annotations' picture paths start from."""
    image_key: str = "image"
    """Field of a JSONL or CSV record with the picture's path."""
    caption_key: str | list[str] = "caption"
    """Field or fields with the caption (a string or a list of strings); every text that is not empty counts."""
    split_key: str | None = None
    """Field that tells the split of a JSONL or CSV record."""
    split_values: dict[str, list[str]] | None = None
    """Values of `split_key` that make up a split, {val: [...], test: [...]}; the others are for training."""
    tokenizer: str | None = None
    """Tokenizer: a name on the hub or a folder. None: that of `model.text_pretrained`."""
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
    val_size: int | None = 1000
    """At most so many images validate, a fixed sample, with their first caption; None = all."""
    test_captions: int = 1
    """Captions of each image that masked words and matching are tested on, at most; retrieval takes the first."""


class PairsDataModule(L.LightningDataModule):
    """Reads the annotations on construction, so that a mistake in them is told before anything else happens."""

    def __init__(self, options: DataOptions, processor: MMBertProcessor, *, seed: int):
        super().__init__()
        _check(options)
        self.options, self.processor, self.seed = options, processor, seed
        self.position: dict[str, int] | None = None
        """Where the training loader starts, as `TrainLoader.state_dict` tells it; None: at the beginning."""
        keys = {}
        if options.format in ("jsonl", "csv"):
            names = ("image_key", "caption_key", "split_key", "split_values")
            keys = {name: getattr(options, name) for name in names}
        self.examples = read_examples(options.format, options.annotations, options.images, **keys)
        if not self.examples.get("train"):
            raise UsageError(
                f"data.annotations={options.annotations!r} has no split 'train', only {sorted(self.examples)}."
            )
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
        self.train_pairs = self._pairs("train", Augmentation(options.crop, options.flip))
        self._refuse_oversized_batch()
        self.val_pairs = self._pairs("val", None, options.val_size) if self.examples.get("val") else None
        self.test_splits = sorted(name for name in self.examples if name.startswith("test"))
        self.test_pairs = {name: self._pairs(name, None, captions=options.test_captions) for name in self.test_splits}

    def _refuse_oversized_batch(self) -> None:
        if self.steps_per_epoch() == 0:
            pairs, processes = len(self.train_pairs), world_size()
            raise UsageError(
                f"data.batch_size={self.options.batch_size} times {processes} processes is more than the "
                f"{pairs} training pairs; choose at most {pairs // processes}."
            )

    def _pairs(
        self, split: str, augmentation: Augmentation | None, size: int | None = None, *, captions: int = 1
    ) -> Pairs:
        examples: Sequence[Example] = self.examples[split]
        if size is not None and size < len(examples):
            chosen = sorted(permutation(self.seed, f"sample {split}", 0, len(examples))[:size])
            examples = [examples[i] for i in chosen]
        if captions > 1:  # evaluation shows the first caption, so each goes first once
            examples = [
                replace(e, captions=e.captions[i:] + e.captions[:i])
                for e in examples
                for i in range(min(captions, len(e.captions)))
            ]
        skip = self.options.on_bad_sample == "skip"
        return Pairs(examples, self.processor, self.masking, seed=self.seed, augmentation=augmentation, skip_bad=skip)

    def steps_per_epoch(self) -> int:
        """Training batches an epoch, for each process."""
        return len(self.train_pairs) // (self.options.batch_size * world_size())

    def sizes(self) -> dict[str, int]:
        """Pairs in each split that is used."""
        val = {} if self.val_pairs is None else {"val": len(self.val_pairs)}
        return {"train": len(self.train_pairs), **val, **{k: len(v) for k, v in self.test_pairs.items()}}

    def cut_share(self, *, at_most: int = 1000) -> float:
        """Fraction of training captions that `max_text_length` cuts, from a fixed sample of one caption an image."""
        pairs = self.train_pairs
        chosen = permutation(self.seed, "cut captions", 0, len(pairs))[:at_most]
        numbers = pairs.caption_numbers(0)
        return self.processor.cut_share([pairs.examples[i].captions[numbers[i]] for i in chosen])

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
        """The fixed validation pairs; none if there is no split "val"."""
        return [] if self.val_pairs is None else self._evaluation(self.val_pairs)

    def test_dataloader(self) -> list[DataLoader]:
        """One loader for each split in `test_splits`."""
        return [self._evaluation(pairs) for pairs in self.test_pairs.values()]

    def _evaluation(self, pairs: Pairs) -> DataLoader:
        by_length = np.argsort(pairs.text_lengths(0), kind="stable")
        # A process without a pair of its own would leave the others waiting: it repeats one, which counts once.
        by_length = by_length[rank() % len(by_length) :: world_size()].tolist()
        size = self.options.eval_batch_size
        return self._loader(pairs, batch_sampler=[by_length[i : i + size] for i in range(0, len(by_length), size)])

    def _loader(
        self, pairs: Pairs, *, batch_sampler: TrainBatches | list[list[int]], kind: type[DataLoader] = DataLoader
    ) -> DataLoader:
        workers = self.options.num_workers
        return kind(
            pairs,
            batch_sampler=batch_sampler,
            num_workers=workers,
            collate_fn=Collate(self.processor.pad_token_id),
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


def _check(options: DataOptions) -> None:
    for name in ("batch_size", "eval_batch_size", "length_pool", "test_captions"):
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
    for name in ("mlm_probability", "crop"):
        if not 0 < getattr(options, name) <= 1:
            raise UsageError(f"data.{name}={getattr(options, name)}: a fraction above 0, up to 1.")
    for name in ("annotations", "images"):
        if not getattr(options, name):
            raise UsageError(f"data.{name} is missing: say where the data is, see configs/ for examples.")
