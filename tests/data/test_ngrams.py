"""Content words and n-grams of captions, against values worked out by hand."""

from pathlib import Path

import pytest

from mmbert.data.examples import Example
from mmbert.data.ngrams import content_units, find_ngrams, image_ngrams
from mmbert.errors import UsageError

RED = ("a red circle", "there is a red circle")
BLUE = ("a blue circle", "there is a blue circle")


def examples(*images: tuple[str, ...], copies: int = 10) -> list[Example]:
    return [
        Example(image=Path(f"{i}.png"), image_id=str(i), captions=captions, split="train", place="here")
        for i, captions in enumerate(images * copies)
    ]


def test_words_that_captions_of_one_image_share_are_content() -> None:
    """red: in 20 of 40 captions, and in the other caption of its image always: lift 1 / 0.5 = 2.

    circle, a: 1 / 1. there, is: in 20 of 40 captions, never in the other one: 0. shape: 2 / 0.25 = 4, in 10 captions.
    """
    images = [[{*c.split()} for c in e.captions] for e in examples(RED, BLUE)]
    assert content_units(images) == {"red", "blue"}
    many = images * 100  # 4,000 captions: a content word is in 20 or more
    for number, expected in ((9, {"red", "blue"}), (10, {"red", "blue", "shape"})):  # in two captions each
        with_rare = [
            [{*words, "shape"} for words in captions] if i < number else captions for i, captions in enumerate(many)
        ]
        assert content_units(with_rare) == expected
    assert content_units([[{"red"}]] * 100) == frozenset()  # nothing to compare with


def test_ngrams_begin_and_end_with_content_words() -> None:
    given = examples(("red circle on blue", "a red circle on blue"), ("green star on pink", "a green star on pink"))
    found = find_ngrams(given, longest=2, min_fraction=0.01)
    words = {"red", "circle", "blue", "green", "star", "pink"}
    assert {*found} == words | {"red circle", "green star"}  # "on" and "a" are in captions of both
    assert {*found.values()} == {0.5}
    names = [*found]
    for ids, example in zip(image_ngrams(given, names), given, strict=True):
        assert {names[i] for i in ids} == {name for name in names if name in example.captions[0]}
    longer = find_ngrams(given, longest=3, min_fraction=0.01)
    assert {*longer} - {*found} == {"circle on blue", "star on pink"}


def test_rare_ngrams_are_left_out_and_frequent_ones_come_first() -> None:
    given = examples(RED, RED, BLUE)
    assert [*find_ngrams(given, longest=1, min_fraction=0.01).items()] == [
        ("red", pytest.approx(2 / 3)),
        ("blue", pytest.approx(1 / 3)),
    ]
    assert [*find_ngrams(given, longest=1, min_fraction=0.5)] == ["red"]
    assert image_ngrams(given, ["red"])[:3] == [(0,), (0,), ()] and image_ngrams(given, [])[:2] == [(), ()]


def test_captions_without_content_words_are_an_error() -> None:
    with pytest.raises(
        UsageError, match=r"objectives.ngrams: .*1.00% of the 20 training images, of which 0 have several"
    ):
        find_ngrams(examples(("a red circle",), ("a blue circle",)), longest=3, min_fraction=0.01)
