"""Texts asked about images, in batches that hold each image once."""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmbert.data.images import BadImageError, ImageSource
from mmbert.data.processor import MMBertProcessor, pad
from mmbert.errors import DataError, UsageError, quote


class Query(NamedTuple):
    """A text, and the image it is about."""

    image: ImageSource | None
    text: str
    place: str = ""
    """Record of the file it comes from, for messages."""


class QueryBatch(NamedTuple):
    """Some texts with their images, ready for the model."""

    positions: list[int]  # in the sequence that was asked
    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) int64
    images: Tensor | None  # (U, 3, S, S) uint8, the distinct ones; None: texts alone
    image_of: Tensor  # (B,) int64


class QueryBatches(Dataset[QueryBatch | DataError]):
    """Whole batches; texts about one image stand in a row, so that it is decoded and encoded once or twice.

    An image that can't be read gives its error in place of the batch, to be raised: from a loader's process an error
    that is raised comes as text, and leaves processes behind.

    Args:
        processor: The model's.
        asked: All with images, or all without.
        encode: Text to token ids.
        size: Texts in a batch.
    """

    def __init__(
        self, processor: MMBertProcessor, asked: Sequence[Query], encode: Callable[[str], list[int]], size: int
    ):
        self.processor, self.asked, self.encode = processor, asked, encode
        first: dict[object, int] = {}
        group = [first.setdefault(_key(one.image), i) for i, one in enumerate(asked)]
        order = sorted(range(len(asked)), key=group.__getitem__)
        self.positions = [order[i : i + size] for i in range(0, len(order), size)]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> QueryBatch | DataError:
        """One batch, or what is wrong with it: a BadImageError, or a DataError where the record is known."""
        batch = [self.asked[i] for i in self.positions[index]]
        ids, mask = pad([self.encode(one.text) for one in batch], self.processor.pad_token_id)
        shown = {_key(one.image): one for one in reversed(batch)}  # the first one of each is named in messages
        numbers = {key: number for number, key in enumerate(shown)}
        image_of = torch.tensor([numbers[_key(one.image)] for one in batch])
        images: list[Tensor] = []
        for one in shown.values():
            try:
                images += [] if one.image is None else [self.processor.pixel_values(one.image)]
            except BadImageError as error:
                return DataError(one.place, f"the image {error}", "one that can be read") if one.place else error
        stacked = torch.stack(images) if images else None
        return QueryBatch(self.positions[index], ids, mask, stacked, image_of)


def _key(image: ImageSource | None) -> object:
    """Equal for one file, and for one object."""
    return os.fspath(image) if isinstance(image, str | os.PathLike) else id(image)


def pair_up(images: Any, texts: str | Sequence[str]) -> tuple[list[Query], bool]:
    """Gives each image its text; a single one of either meets all of the other.

    Args:
        images: What `load_image` takes or None, or a list of that.
        texts: A text, or a list.

    Returns:
        The pairs, and whether it is a single one that was not given in a list.

    Raises:
        UsageError: Lists of different length, or something else than texts.
    """
    one_image, one_text = not isinstance(images, list | tuple), isinstance(texts, str)
    image_list: list[Any] = [images] if one_image else [*images]
    text_list = listed(texts)
    if one_text:
        text_list *= len(image_list)
    elif one_image:
        image_list *= len(text_list)
    if len(image_list) != len(text_list):
        raise UsageError(
            f"{len(image_list)} images and {len(text_list)} texts: give as many of both, or a single one of either."
        )
    return [Query(*pair) for pair in zip(image_list, text_list, strict=True)], one_image and one_text


def listed(texts: str | Sequence[str]) -> list[str]:
    """One text or several, as a list.

    Raises:
        UsageError: Something else.
    """
    found: list[Any] = [*texts] if isinstance(texts, list | tuple) else [texts]
    for text in found:
        if not isinstance(text, str):
            raise UsageError(f"{quote(text)} is a {type(text).__name__}; expected a text, or a list of texts.")
    return found
