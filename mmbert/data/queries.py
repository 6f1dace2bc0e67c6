"""Queries for inference: texts paired with images, in batches that decode and encode each image once."""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmbert.data.images import BadImageError, ImageSource, as_image_list
from mmbert.data.processor import MMBertProcessor, as_text_list, pad
from mmbert.errors import DataError, UsageError

__all__ = ["Query", "QueryBatch", "QueryBatches", "as_text_list", "pair_up"]


class Query(NamedTuple):
    """A text with its image, or images."""

    image: ImageSource | tuple[ImageSource, ...] | None
    text: str
    place: str = ""
    """Record of the file it comes from, "FILE:RECORD", for messages."""

    @property
    def images(self) -> tuple[ImageSource, ...]:
        """All images of the text; none for a text alone."""
        if isinstance(self.image, tuple):
            return self.image
        return () if self.image is None else (self.image,)


class QueryBatch(NamedTuple):
    """A collated batch of queries with their distinct images."""

    positions: list[int]  # in the sequence of queries
    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) int64
    images: Tensor | None  # (U, 3, S, S) uint8, the distinct ones; None: texts alone
    image_of: Tensor  # (B * N,) int64 rows of `images` that belong to the texts, N for each


class QueryBatches(Dataset[QueryBatch | DataError]):
    """Data set of collated batches; texts of one image are adjacent, so that it is decoded once per batch.

    An unreadable image gives its error in place of the batch, to be raised by the caller: an error that is raised in
    a loader's worker arrives as text, and leaves workers behind.

    Args:
        processor: The model's.
        queries: All with equally many images.
        encode: Text to token ids.
        size: Texts in a batch.
    """

    def __init__(
        self, processor: MMBertProcessor, queries: Sequence[Query], encode: Callable[[str], list[int]], size: int
    ):
        self.processor, self.queries, self.encode = processor, queries, encode
        first: dict[object, int] = {}
        group = [first.setdefault(tuple(map(_image_identity, q.images)), i) for i, q in enumerate(queries)]
        order = sorted(range(len(queries)), key=group.__getitem__)
        self.positions = [order[i : i + size] for i in range(0, len(order), size)]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> QueryBatch | DataError:
        """Collate one batch.

        Returns:
            The batch; or the BadImageError of an unreadable image, as a DataError where its record is known.
        """
        batch = [self.queries[i] for i in self.positions[index]]
        ids, mask = pad([self.encode(query.text) for query in batch], self.processor.pad_token_id)
        all_images = [(image, query.place) for query in batch for image in query.images]
        distinct = {_image_identity(image): (image, place) for image, place in reversed(all_images)}  # the first place
        rows = {identity: row for row, identity in enumerate(distinct)}
        image_of = torch.tensor([rows[_image_identity(image)] for image, _ in all_images], dtype=torch.int64)
        images: list[Tensor] = []
        for image, place in distinct.values():
            try:
                images.append(self.processor.pixel_values(image))
            except BadImageError as error:
                return DataError(place, f"the image {error}", "one that can be read") if place else error
        stacked = torch.stack(images) if images else None
        return QueryBatch(self.positions[index], ids, mask, stacked, image_of)


def _image_identity(image: ImageSource) -> object:
    """Compute a key that is equal for one file, and for one object."""
    return os.fspath(image) if isinstance(image, str | os.PathLike) else id(image)


def pair_up(images: Any, texts: str | Iterable[str], *, num_images: int = 1) -> tuple[list[Query], bool]:
    """Pair each image with its text; a single one of either is paired with all of the other.

    Args:
        images: An image or None, or an iterable of these; see `as_image_list`. For several images per text a list of
            them counts as one, and an iterable holds such lists.
        texts: A text, or an iterable of texts.
        num_images: Images per text.

    Returns:
        The pairs, and whether it is a single one that was not given in a list.

    Raises:
        UsageError: Different numbers of images and texts, not `num_images` per text, or something else than texts.
    """
    image_list, is_one_image = as_image_list(images) if num_images == 1 else _groups(images, num_images)
    is_one_text, text_list = isinstance(texts, str), as_text_list(texts)
    if is_one_text:
        text_list *= len(image_list)
    elif is_one_image:
        image_list *= len(text_list)
    if len(image_list) != len(text_list):
        raise UsageError(
            f"{len(image_list)} images and {len(text_list)} texts: give as many of both, or a single one of either."
        )
    return [Query(*pair) for pair in zip(image_list, text_list, strict=True)], is_one_image and is_one_text


def _groups(images: Any, size: int) -> tuple[list[tuple[ImageSource, ...]], bool]:
    """Convert a list of `size` images, or an iterable of such lists, to a list of tuples, and whether it was one."""
    items, is_single = as_image_list(images)
    parts = [as_image_list(item) for item in items]
    is_one_group = is_single or all(single for _, single in parts)
    groups = [tuple(items)] if is_one_group and items else [tuple(group) for group, _ in parts]
    wrong = next((len(group) for group in groups if len(group) != size), None)
    if wrong is not None:
        raise UsageError(f"{wrong} image{'s' * (wrong != 1)} for a text; this model takes {size}: [image, image].")
    return groups, is_one_group and bool(items)
