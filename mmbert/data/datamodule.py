"""Data modules: annotation files to training, validation and test batches; here the base and pretraining."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from mmbert.data.boxes import match_boxes, read_boxes
from mmbert.data.edits import CaptionEdits
from mmbert.data.examples import Example, read_examples
from mmbert.data.masking import Masking
from mmbert.data.ngrams import content_units
from mmbert.data.options import DataOptions, check_options, reader_options
from mmbert.data.pairs import Collate, Pairs
from mmbert.data.processor import MMBertProcessor
from mmbert.data.samples import Augmentation, Samples
from mmbert.data.sampling import TrainBatches, TrainLoader
from mmbert.errors import UsageError, quote
from mmbert.runtime.distributed import rank, world_size
from mmbert.runtime.randomness import permutation
from mmbert.runtime.signals import StopSignals

log = logging.getLogger("mmbert")
SAMPLED_TEXTS = 1000
"""Training texts, at most, that the tokenizer is checked on."""
MAX_UNKNOWN, WARN_UNKNOWN = 0.5, 0.1
"""Fractions of [UNK] among the tokens of training texts: above the first an error, above the second a warning."""


class SplitsDataModule(L.LightningDataModule):
    """Base data module with a loader for each split; a subclass builds samples (`_samples`) and batches (`collate`).

    Args:
        options: The section `data`.
        examples: split -> examples of a reader.
        processor: Tokenizer and image settings.
        seed: The run's seed.

    Raises:
        UsageError: No training split, one that fills no batch, or a tokenizer that knows hardly any of its words.
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
        """Position of the training loader, see `TrainLoader.state_dict`; None: the beginning."""
        if not examples.get("train"):
            raise UsageError(f"data.annotations={options.annotations!r} has no split 'train', only {sorted(examples)}.")
        self.train_samples = self._samples(examples["train"], Augmentation(options.crop, options.flip))
        self._check_batch_size()
        self._check_tokenizer()
        self.val_samples = (
            self._samples(self._validation_subset(examples["val"], "val")) if examples.get("val") else None
        )
        self.test_splits = sorted(name for name in examples if name.startswith("test"))
        self.test_samples = {
            name: self._samples(self._expand_test_captions(examples[name])) for name in self.test_splits
        }

    def _samples(self, examples: Sequence[Any], augmentation: Augmentation | None = None) -> Samples:
        """Build the samples of a split; those without augmentation are for evaluation."""
        raise NotImplementedError

    def _expand_test_captions(self, examples: Sequence[Any]) -> Sequence[Any]:
        """Expand or select the examples of a test split that are tested."""
        return examples

    def _validation_subset(self, examples: Sequence[Any], split: str) -> Sequence[Any]:
        """Draw a fixed sample of at most `val_size` examples, in the order of the file."""
        size = self.options.val_size
        if size is None or size >= len(examples):
            return examples
        return [examples[i] for i in sorted(permutation(self.eval_seed, f"sample {split}", 0, len(examples))[:size])]

    def training_texts(self, positions: Sequence[int]) -> list[str]:
        """Return the texts of training samples in the first epoch."""
        raise NotImplementedError

    @property
    def skip_unreadable(self) -> bool:
        """Whether unreadable images are skipped."""
        return self.options.on_bad_sample == "skip"

    def _check_batch_size(self) -> None:
        if self.steps_per_epoch() == 0:
            pairs, processes = len(self.train_samples), world_size()
            raise UsageError(
                f"data.batch_size={self.options.batch_size} times {processes} processes is more than the "
                f"{pairs} training pairs; choose at most {pairs // processes}."
            )

    def steps_per_epoch(self) -> int:
        """Compute the training batches of each process in an epoch."""
        return len(self.train_samples) // (self.options.batch_size * world_size())

    def set_batch_size(self, size: int) -> None:
        """Set `batch_size`, but at most to what the training samples fill once."""
        most = max(1, len(self.train_samples) // world_size())
        self.options = replace(self.options, batch_size=min(size, most))

    def sizes(self) -> dict[str, int]:
        """Return the number of samples of each split that is used."""
        val = {} if self.val_samples is None else {"val": len(self.val_samples)}
        return {"train": len(self.train_samples), **val, **{k: len(v) for k, v in self.test_samples.items()}}

    def truncated_fraction(self, *, at_most: int = SAMPLED_TEXTS) -> float:
        """Estimate the fraction of training texts that `max_text_length` truncates, from a fixed sample."""
        return self.processor.truncated_fraction(self._sampled_texts(at_most))

    def _sampled_texts(self, count: int) -> list[str]:
        """Draw a fixed random sample of at most `count` training texts."""
        positions = permutation(self.seed, "cut captions", 0, len(self.train_samples))[:count]
        return self.training_texts(positions.tolist())

    def _check_tokenizer(self) -> None:
        """Check on a sample of training texts that the tokenizer knows their words.

        Raises:
            UsageError: More than `MAX_UNKNOWN` of their tokens are [UNK].
        """
        texts = self._sampled_texts(SAMPLED_TEXTS)
        unknown = self.processor.unknown_fraction(texts)
        if unknown <= WARN_UNKNOWN:
            return
        tokenizer = self.processor.tokenizer
        found = (
            f"tokenizer '{tokenizer.name_or_path}' ({len(tokenizer):,} entries) turns {unknown:.0%} of the tokens of "
            f"{len(texts):,} training texts into {tokenizer.unk_token}, such as {quote(texts[0])}"
        )
        if unknown > MAX_UNKNOWN:
            raise UsageError(
                f"{found}; at most {MAX_UNKNOWN:.0%} are accepted. Set data.tokenizer to one for their language."
            )
        log.warning("%s; is data.tokenizer the one for their language?", found)

    def train_dataloader(self) -> DataLoader:
        """Return the training loader, whose order depends on (seed, epoch).

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
            limit=None if self.trainer is None else self.trainer.limit_train_batches,
        )
        loader = self._loader(pairs, batch_sampler=batches, kind=TrainLoader)
        if self.loader_state is not None:
            assert isinstance(loader, TrainLoader)
            loader.load_state_dict(self.loader_state)
        return loader

    def val_dataloader(self) -> DataLoader | list:
        """Return the loader of the fixed validation samples; an empty list if there is no split "val"."""
        return [] if self.val_samples is None else self._evaluation(self.val_samples)

    def test_dataloader(self) -> list[DataLoader]:
        """Return one loader for each split in `test_splits`."""
        return [self._evaluation(pairs) for pairs in self.test_samples.values()]

    def predict_dataloader(self) -> list[DataLoader]:
        """Return loaders of the test splits in the order of the files, or of validation where there are none.

        Raises:
            UsageError: There is no split to predict.
        """
        splits = [*self.test_samples.values()] or ([] if self.val_samples is None else [self.val_samples])
        if not splits:
            raise UsageError("predict: the data has no split 'test' or 'val'; pass dataloaders= of your own.")
        return [
            DataLoader(
                samples,
                batch_size=self.options.eval_batch_size,
                num_workers=self.options.num_workers,
                collate_fn=self.collate,
                worker_init_fn=StopSignals.worker_init_fn(),
            )
            for samples in splits
        ]

    def _evaluation(self, pairs: Samples) -> DataLoader:
        by_length = np.argsort(pairs.text_lengths(0), kind="stable")
        # A process without a sample would block the others: it repeats one, which counts once.
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
        """Normalize the images on the device, so that uint8 rather than float is transferred."""
        for key in ("pixel_values", "wrong_pixel_values"):
            if key in batch:
                batch[key] = self.processor.image_settings.normalize(batch[key])
        return batch

    def used_samples(self) -> list[Samples]:
        """Return the samples of all splits that a run reads."""
        val = [] if self.val_samples is None else [self.val_samples]
        return [self.train_samples, *val, *self.test_samples.values()]


class PairsDataModule(SplitsDataModule):
    """Data module of image-caption pairs for pretraining; reads the annotations on construction."""

    train_samples: Pairs
    val_samples: Pairs | None
    test_samples: dict[str, Pairs]

    def __init__(self, options: DataOptions, processor: MMBertProcessor, *, seed: int):
        check_options(options)
        reading = reader_options(options)
        examples = read_examples(options.format, options.annotations, options.images, **reading)
        tokenizer = processor.tokenizer
        if options.whole_word and not tokenizer.is_fast and not any(t.startswith("##") for t in tokenizer.get_vocab()):
            raise UsageError(
                f"data.whole_word=True: tokenizer '{tokenizer.name_or_path}' does not mark which tokens form a word; "
                "use one with a fast version (tokenizer.json), or leave the option out."
            )
        special = frozenset(int(i) for i in tokenizer.all_special_ids)
        ordinary = np.array([i for i in range(len(tokenizer)) if i not in special], dtype=np.int64)
        self.masking = Masking(
            mask_token_id=None if tokenizer.mask_token_id is None else int(tokenizer.mask_token_id),  # pyright: ignore
            ordinary_ids=ordinary,
            special_ids=special,
            probability=options.mlm_probability,
            whole_word=options.whole_word,
        )
        self.collate = Collate(processor.pad_token_id)
        super().__init__(options, examples, processor, seed=seed)
        self.opposites = self._opposite_tokens(options.opposites or {})
        if options.mask_content:
            content = self._content_tokens("data.mask_content") | {*self.opposites}
            self.train_samples.masking = replace(self.masking, content_ids=content)

    def use_edits(self, fraction: float) -> None:
        """Put edited captions into a fraction of the training samples, for the objective itm."""
        content = self._content_tokens("objectives.itm.edited")
        examples, encode = self.train_samples.examples, self.processor.encode
        captions = (encode(c) for e in examples for c in e.captions)
        self.train_samples.use_edits(CaptionEdits(captions, content, self.opposites), fraction)

    def use_boxes(self) -> dict[str, float]:
        """Put the boxes of `data.boxes` into the training samples, for the objective boxes.

        Returns:
            Class -> mean fraction of an image that its boxes cover.

        Raises:
            UsageError: The option is missing, or the images are augmented views of the encoder cache.
            DataError: See `read_boxes` and `match_boxes`.
        """
        files, options = self.options.boxes, self.options
        if not files:
            raise UsageError("objectives.boxes needs data.boxes: name the file with the boxes of the training images.")
        if options.views is not None:
            raise UsageError(
                f"data.views={options.views}: the cache does not know where its views have the boxes of data.boxes; "
                "leave data.views out, or the objective boxes."
            )
        files = [files] if isinstance(files, str) else files
        samples = self.train_samples
        samples.boxes, covered = match_boxes(
            samples.examples, read_boxes([Path(file) for file in files]), self.processor.load, place=", ".join(files)
        )
        return covered

    def _opposite_tokens(self, opposites: Mapping[str, str]) -> dict[int, int]:
        """Token -> token of the opposite meaning, both ways; warn if no training caption has one of them.

        Byte-level BPE has two tokens for a word, at the beginning of a text and behind a space, which are exchanged for
        the same kind.

        Raises:
            UsageError: A word that is not one known token, or that has two opposites.
        """
        found: dict[int, int] = {}
        for first, second in (pair for a, b in opposites.items() for pair in ((a, b), (b, a))):
            pairs = [(self._single_token(space + first), self._single_token(space + second)) for space in ("", " ")]
            known = [(a, b) for a, b in pairs if a is not None and b is not None]
            if not known:
                word = first if all(a is None for a, _ in pairs) else second
                raise UsageError(
                    f"data.opposites: '{word}' is not one token of the tokenizer and can't be exchanged; leave it out."
                )
            if first == second or any(found.setdefault(a, b) != b for a, b in known):
                raise UsageError(f"data.opposites: '{first}' must have one opposite, another word.")
        captions = (caption for example in self.train_samples.examples for caption in example.captions)
        if found and all(found.keys().isdisjoint(self.processor.encode(caption)) for caption in captions):
            words = ", ".join({**opposites, **{b: a for a, b in opposites.items()}})
            log.warning("data.opposites has no effect: no training caption has one of the words %s.", words)
        return found

    def _single_token(self, word: str) -> int | None:
        """Id of a word that is one known token, else None."""
        tokenizer = self.processor.tokenizer
        ids = tokenizer(word, add_special_tokens=False)["input_ids"]
        return int(ids[0]) if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else None

    def _content_tokens(self, option: str) -> frozenset[int]:
        """Find the tokens that say something about the image, see `mmbert.data.ngrams.content_units`.

        Raises:
            UsageError: There are none; with the option that needs them.
        """
        encode = self.processor.encode
        tokens = [[{*encode(c)} for c in e.captions] for e in self.train_samples.examples]
        found = content_units(tokens) - self.masking.special_ids
        if not found:
            raise UsageError(
                f"{option}: no token is shared by the captions of one training image more often than chance; it takes "
                "images with several captions, and several captions with the token. Leave the option out."
            )
        log.info("%s: %d tokens are content words", option, len(found))
        return found

    def _samples(self, examples: Sequence[Example], augmentation: Augmentation | None = None) -> Pairs:
        return Pairs(
            examples, self.processor, self.masking, seed=self.seed if augmentation is not None else self.eval_seed,
            augmentation=augmentation, skip_unreadable=self.skip_unreadable,
        )  # fmt: skip

    def _expand_test_captions(self, examples: Sequence[Example]) -> Sequence[Example]:
        captions = self.options.test_captions
        if captions == 1:
            return examples
        return [  # evaluation uses the first caption, so each caption is first once
            replace(e, captions=e.captions[i:] + e.captions[:i])
            for e in examples
            for i in range(min(captions, len(e.captions)))
        ]

    def training_texts(self, positions: Sequence[int]) -> list[str]:
        """Return the captions of training images in the first epoch."""
        numbers = self.train_samples.caption_numbers(0)
        return [self.train_samples.examples[i].captions[numbers[i]] for i in positions]


def _take_fraction(examples: Sequence[Any], fraction: float, seed: int) -> list[Any]:
    """Draw a fixed sample of at least one example, in the order of the file."""
    count = max(1, round(fraction * len(examples)))
    return [examples[i] for i in sorted(permutation(seed, "fraction", 0, len(examples))[:count].tolist())]
