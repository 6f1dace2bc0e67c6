"""Queries: any iterable of images or texts is a list, and each image is decoded once a batch."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_processor

from mmbert.data.images import BadImageError, as_image_list, load_image
from mmbert.data.queries import as_text_list, pair_up
from mmbert.errors import UsageError


class Column(Sequence[Any]):
    """A sequence that is no list, as a column of the library `datasets` is."""

    def __init__(self, items: list[Any]):
        self.items = items

    def __getitem__(self, index: Any) -> Any:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)


class Items:
    """A length and items, but no `__iter__`, as a map-style data set has them."""

    def __init__(self, items: list[Any]):
        self.items = items

    def __getitem__(self, index: int) -> Any:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)


def generate(items: list[Any]) -> Iterator[Any]:
    yield from items


@pytest.mark.parametrize("convert", [list, tuple, Column, Items, generate, np.array])
def test_iterables_of_names_and_texts_are_lists(convert: Any) -> None:
    assert as_image_list(convert(["a.png", "b.png"])) == (["a.png", "b.png"], False)
    assert as_text_list(convert(["a cat", "a dog"])) == ["a cat", "a dog"]
    pairs, is_single = pair_up(convert(["a.png", "b.png"]), convert(["a cat", "a dog"]))
    assert [(p.image, p.text) for p in pairs] == [("a.png", "a cat"), ("b.png", "a dog")] and not is_single
    assert [p.text for p in pair_up("a.png", convert(["a cat", "a dog"]))[0]] == ["a cat", "a dog"]


def test_a_batch_of_arrays_is_several_images_and_one_array_is_one() -> None:
    batch = np.zeros((2, 4, 4, 3), np.uint8)
    images, is_single = as_image_list(batch)
    assert len(images) == 2 and images[0].shape == (4, 4, 3) and not is_single
    contents = (b"bytes", bytearray(b"bytes"))
    for one in (batch[0], batch[0, :, :, 0], "a.png", Path("a.png"), *contents, Image.new("RGB", (2, 2)), None, 3):
        assert as_image_list(one) == ([one], True) or isinstance(one, np.ndarray)
    assert tiny_processor()(images=batch)["pixel_values"].shape == (2, 3, 16, 16)
    assert tiny_processor()(images=generate([*batch]), text=Column(["a cat"]))["input_ids"].shape == (1, 4)


def test_no_images_give_no_pixel_values() -> None:
    assert tiny_processor()(images=[])["pixel_values"].shape == (0, 3, 16, 16)


@pytest.mark.parametrize(
    ("image", "hint"),
    [
        (torch.zeros(3, 4, 4), "permute"),
        (torch.zeros(2, 3, 4, 4), "permute"),
        (["a.png"], "give one image"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"list\(array\)"),
    ],
)
def test_what_is_no_single_image_is_rejected_with_a_hint(image: Any, hint: str) -> None:
    with pytest.raises((TypeError, BadImageError), match=hint):
        load_image(image)


@pytest.mark.parametrize("texts", [3, None, b"a cat", {"a": 1}, ["a", 3], np.zeros(2)])
def test_what_is_no_text_is_an_error_with_its_type(texts: Any) -> None:
    with pytest.raises(UsageError, match="expected a text, or a list of texts"):
        as_text_list(texts)
