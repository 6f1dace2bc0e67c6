"""What every data set of images and texts shares: images that can't be read, and augmentation."""

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

MAX_REPLACEMENTS = 100  # tries to find an image that can be read
SIDES = re.compile(r"\b(left|right)\b", re.IGNORECASE)

Skipped = tuple[tuple[int, str], ...]
"""Positions and why they were skipped."""


class Augmentation(NamedTuple):
    """Random changes to training images."""

    crop: float = 1.0
    """Smallest fraction of the area that a random crop keeps; 1 = no crop."""
    flip: bool = False
    """Mirrors half of the images, never one whose text says left or right."""


class Samples(Dataset):
    """Samples of one split: a subclass says what one is made of (`_sample`) and what stands for a skipped one.

    Args:
        examples: What a reader found.
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
        """(N,) characters of the texts shown in an epoch; close enough to tokens for grouping."""
        raise NotImplementedError

    def __getitem__(self, index: Index | int) -> Any:
        """One sample; with `skip_unreadable` maybe another one, or in evaluation one without images.

        Raises:
            BadImageError: An image that can't be read, unless `skip_unreadable`; or hardly any that can.
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
            except Exception as error:  # a mistake of ours or of a library: say at least where; survives the loader
                place, image = self.examples[i].place, self.examples[i].image
                error.add_note(f"mmbert: in sample {i} of epoch {epoch}: {place}, {image}")
                raise

    def _sample(self, epoch: int, i: int) -> Any:
        """The sample at position i: a NamedTuple with `requested_index` and `skipped`."""
        raise NotImplementedError

    def _empty_sample(self, i: int) -> Any:
        """What stands for a sample of an evaluation whose image can't be read."""
        raise NotImplementedError

    def _pixel_values(self, epoch: int, i: int, file: Path, text: str) -> Tensor:
        """(3, S, S) uint8, the image with this epoch's random changes, if there are any."""
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
        if augmentation.flip and rng.random() < 0.5 and not SIDES.search(text):
            image = transforms.horizontal_flip(image)
        return image


def collate_skipped(skipped: Sequence[tuple[int, str]]) -> dict[str, Any]:
    """The keys of a batch that tell what was skipped: `skipped` (S,) int64 positions, `skip_reasons` S texts."""
    if not skipped:
        return {}
    return {"skipped": torch.tensor([i for i, _ in skipped]), "skip_reasons": [why for _, why in skipped]}
