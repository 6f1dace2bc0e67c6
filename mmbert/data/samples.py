"""Base class of the data sets: augmentation, and replacing unreadable images."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as transforms

from mmbert.data.images import BadImageError
from mmbert.data.processor import MMBertProcessor
from mmbert.data.sampling import Index
from mmbert.errors import DataError
from mmbert.runtime.randomness import mix, numpy_generator

MAX_REPLACEMENTS = 100  # attempts to find a readable image
LEFT_OR_RIGHT = re.compile(r"\b(left|right)\b", re.IGNORECASE)

Skipped = tuple[tuple[int, str], ...]
"""Positions of skipped samples, each with its reason."""


class Augmentation(NamedTuple):
    """Random changes to training images."""

    crop: float = 1.0
    """Smallest fraction of the area that a random crop keeps; 1 = no crop."""
    flip: bool = False
    """Mirror half of the images, but none whose texts mention left or right."""


class Samples(Dataset):
    """Data set of one split; a subclass builds samples (`_sample`) and empty ones for skipped images.

    Args:
        examples: Examples of a reader.
        processor: Tokenizer and image settings.
        seed: The run's seed.
        augmentation: Changes to the images; None for evaluation.
        skip_unreadable: Skip unreadable images instead of raising: in training another sample, a function of (seed,
            epoch, sample), replaces it; in evaluation it is dropped. `skipped` of the sample holds the reasons.
    """

    def __init__(
        self,
        examples: Sequence[Any],
        processor: MMBertProcessor,
        *,
        seed: int,
        augmentation: Augmentation | None,
        skip_unreadable: bool = False,
    ):
        self.examples, self.processor, self.seed = examples, processor, seed
        self.augmentation, self.skip_unreadable = augmentation, skip_unreadable

    def __len__(self) -> int:
        return len(self.examples)

    def text_lengths(self, epoch: int) -> np.ndarray:
        """Return the (N,) lengths of an epoch's texts in characters, close enough to tokens for grouping."""
        raise NotImplementedError

    def __getitem__(self, index: Index | int) -> Any:
        """Build one sample; with `skip_unreadable` possibly another one, or in evaluation one without images.

        Raises:
            BadImageError: An unreadable image, unless `skip_unreadable`; or no readable one after `MAX_REPLACEMENTS`.
        """
        epoch, first = index if isinstance(index, tuple) else (0, index)
        skipped: list[tuple[int, str]] = []
        i = first
        while True:
            try:
                return self._sample(epoch, i)._replace(requested_index=first, skipped=tuple(skipped))
            except BadImageError as error:
                if not self.skip_unreadable or len(skipped) == MAX_REPLACEMENTS:
                    raise
                skipped.append((i, error.reason))
                if self.augmentation is None:
                    return self._empty_sample(i)._replace(requested_index=first, skipped=tuple(skipped))
                i = int(mix(self.seed, "stand-in", epoch, first, len(skipped)) % np.uint64(len(self)))
            except DataError:
                raise
            except Exception as error:  # a bug here or in a library: the note names the sample, also across workers
                place, image = self.examples[i].place, self.examples[i].image
                error.add_note(f"mmbert: in sample {i} of epoch {epoch}: {place}, {image}")
                raise

    def _sample(self, epoch: int, i: int) -> Any:
        """Build the sample at position i: a NamedTuple with `requested_index` and `skipped`."""
        raise NotImplementedError

    def _empty_sample(self, i: int) -> Any:
        """Build the sample of an evaluation that replaces one with an unreadable image; it has no tokens."""
        raise NotImplementedError

    def _pixel_values(self, epoch: int, i: int, file: Path, texts: str) -> Tensor:
        """Load an image as (3, S, S) uint8 with the epoch's augmentation; `texts` may forbid mirroring it."""
        settings, augmentation = self.processor.image_settings, self.augmentation
        if augmentation in (None, Augmentation()):
            return self.processor.pixel_values(file)
        assert augmentation is not None
        rng = numpy_generator(self.seed, "augment", epoch, i)
        image = self.processor.load(file)
        if augmentation.crop < 1:
            height, width = image.shape[-2:]
            side = rng.uniform(augmentation.crop, 1) ** 0.5
            h, w = max(1, round(height * side)), max(1, round(width * side))
            top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
            image = image[:, top : top + h, left : left + w]
        image = settings.resize(image)
        if augmentation.flip and rng.random() < 0.5 and not LEFT_OR_RIGHT.search(texts):
            image = transforms.horizontal_flip(image)
        return image


def collate_skipped(skipped: Sequence[tuple[int, str]]) -> dict[str, Any]:
    """Collate skipped samples to `skipped` (S,) int64 positions and `skip_reasons`, a list of S texts."""
    if not skipped:
        return {}
    return {"skipped": torch.tensor([i for i, _ in skipped]), "skip_reasons": [why for _, why in skipped]}
