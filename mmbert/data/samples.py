"""Base class of the data sets: augmentation, and replacing unreadable images."""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as transforms

from mmbert.data.image_processor import ImageSettings
from mmbert.data.images import BadImageError
from mmbert.data.processor import MMBertProcessor
from mmbert.data.sampling import Index
from mmbert.errors import DataError
from mmbert.runtime.randomness import mix, numpy_generator

MAX_REPLACEMENTS = 100  # attempts to find a readable image
LEFT_OR_RIGHT = re.compile(r"\b(left|right)(most|wards?|hand(ed)?)?\b", re.IGNORECASE)

Skipped = tuple[tuple[int, str], ...]
"""Positions of skipped samples, each with its reason."""


class Augmentation(NamedTuple):
    """Random changes to training images."""

    crop: float = 1.0
    """Smallest fraction of the area that a random crop keeps; 1 = no crop."""
    flip: bool = False
    """Mirror half of the images, but none whose texts mention left or right."""


class Placement(NamedTuple):
    """Part of an image that augmentation keeps, as fractions of its sides, and whether it is mirrored then."""

    left: float = 0.0
    top: float = 0.0
    width: float = 1.0
    height: float = 1.0
    is_mirrored: bool = False


class View(NamedTuple):
    """One of several augmented views of an image that the encoder cache holds."""

    number: int
    may_mirror: bool
    """Whether the texts allow that the image is mirrored."""


class ImageStates(Protocol):
    """Protocol of `mmbert.data.encoder_cache.EncoderCache`, which samples read instead of decoding images."""

    def hidden_states(self, file: Path, view: View | None = None) -> Tensor:
        """Read the (P, W) hidden states of an image."""
        ...


class KeptImages(Protocol):
    """Protocol of `mmbert.data.decoded_images.DecodedImages`."""

    def load(self, file: Path, decode: Callable[[Path], Tensor]) -> Tensor:
        """Return a kept image as (3, S, S) uint8, or decode it."""
        ...


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
        self.cache: ImageStates | None = None
        """Holds the images' hidden states, so that none is decoded."""
        self.decoded: KeptImages | None = None
        """Keeps decoded images without augmentation."""
        self.views = 0
        """Augmented views of each image in the cache; one is chosen by (seed, epoch, sample)."""

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

    def cache_requests(self) -> Iterator[tuple[Path, "View | None"]]:
        """List the images that the encoder cache has to hold, with their augmented views (see `cache`)."""
        augmented = self.augmentation not in (None, Augmentation())
        for example in self.examples:
            for file in self._image_files(example):
                if augmented:
                    mirrors = {self._may_mirror(texts) for texts in self._texts(example)}
                    yield from ((file, View(n, mirror)) for n in range(self.views) for mirror in sorted(mirrors))
                else:
                    yield file, None

    def cached_views(self, texts: str) -> "list[View | None]":
        """List what the encoder cache, or without one the file, has of an image with these texts; None: the image."""
        if self.cache is None or self.augmentation in (None, Augmentation()):
            return [None]
        return [View(number, self._may_mirror(texts)) for number in range(self.views)]

    def _image(self, epoch: int, i: int, file: Path, texts: str) -> Tensor:
        """Load an image as (3, S, S) uint8 with the epoch's augmentation, or its (P, W) hidden states from the cache.

        Args:
            epoch: Chooses the augmentation, with the sample.
            i: The sample.
            file: The image.
            texts: May forbid mirroring it.
        """
        return self._placed_image(epoch, i, file, texts)[0]

    def _placed_image(self, epoch: int, i: int, file: Path, texts: str) -> tuple[Tensor, Placement]:
        """Load an image as `_image` does, with its placement; that of a view in the cache is not known."""
        augmentation = self.augmentation
        if augmentation in (None, Augmentation()):
            return self._plain_image(file), Placement()
        assert augmentation is not None
        if self.cache is not None:
            number = int(mix(self.seed, "view", epoch, i) % np.uint64(self.views))
            return self.cache.hidden_states(file, View(number, self._may_mirror(texts))), Placement()
        rng = numpy_generator(self.seed, "augment", epoch, i)
        image = self.processor.load(file)
        return augment(image, augmentation, self.processor.image_settings, rng, may_mirror=self._may_mirror(texts))

    def _plain_image(self, file: Path) -> Tensor:
        """Load an image without augmentation as (3, S, S) uint8, or its (P, W) hidden states from the cache."""
        if self.cache is not None:
            return self.cache.hidden_states(file)
        decode = self.processor.pixel_values
        return decode(file) if self.decoded is None else self.decoded.load(file, decode)

    def _may_mirror(self, texts: str) -> bool:
        assert self.augmentation is not None
        return self.augmentation.flip and not LEFT_OR_RIGHT.search(texts)

    def _image_files(self, example: Any) -> tuple[Path, ...]:
        """Return the image files of an example."""
        raise NotImplementedError

    def _texts(self, example: Any) -> tuple[str, ...]:
        """Return the texts of an example that may go with its image; each may forbid mirroring it."""
        raise NotImplementedError


def augment(
    image: Tensor, augmentation: Augmentation, settings: ImageSettings, rng: np.random.Generator, *, may_mirror: bool
) -> tuple[Tensor, Placement]:
    """Crop, resize and mirror a (3, H, W) uint8 image at random: (3, S, S), and its placement."""
    placement = Placement()
    if augmentation.crop < 1:
        height, width = image.shape[-2:]
        side = rng.uniform(augmentation.crop, 1) ** 0.5
        h, w = max(1, round(height * side)), max(1, round(width * side))
        top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
        image = image[:, top : top + h, left : left + w]
        placement = Placement(left / width, top / height, w / width, h / height)
    image = settings.resize(image)
    if augmentation.flip and rng.random() < 0.5 and may_mirror:
        image, placement = transforms.horizontal_flip(image), placement._replace(is_mirrored=True)
    return image, placement


def stack_images(images: Sequence[Tensor], prefix: str = "", *, with_digest: bool = False) -> dict[str, Tensor]:
    """Stack images of samples to entries of a batch.

    Args:
        images: (3, S, S) uint8 or (P, W) hidden states each.
        prefix: Of the keys.
        with_digest: Add `image_digest` (B,) int64, equal for equal images only, so that an evaluation encodes each
            once.

    Returns:
        `pixel_values` (B, 3, S, S) uint8, or `image_hidden_states` (B, P, W) of the encoder cache.
    """
    stacked = torch.stack([*images])
    entries = {f"{prefix}{'pixel_values' if stacked.dtype == torch.uint8 else 'image_hidden_states'}": stacked}
    if with_digest:
        entries[f"{prefix}image_digest"] = image_digests(stacked)
    return entries


def image_digests(images: Tensor) -> Tensor:
    """Hash each of (B, ...) images to 63 bits: (B,) int64 on the CPU."""
    contents = images.detach().cpu().contiguous().view(len(images), -1).view(torch.uint8).numpy()
    digests = [hashlib.blake2b(content, digest_size=8).digest() for content in contents]
    return torch.tensor([int.from_bytes(digest) >> 1 for digest in digests], dtype=torch.int64)


def collate_skipped(skipped: Sequence[tuple[int, str]]) -> dict[str, Any]:
    """Collate skipped samples to `skipped` (S,) int64 positions and `skip_reasons`, a list of S texts."""
    if not skipped:
        return {}
    return {"skipped": torch.tensor([i for i, _ in skipped]), "skip_reasons": [why for _, why in skipped]}
