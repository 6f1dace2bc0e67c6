"""Edited captions against edits worked out by hand."""

from collections import Counter

import numpy as np
import pytest

from mmbert.data.edits import CaptionEdits
from mmbert.runtime.randomness import numpy_generator

CLS, SEP = 2, 3
A, AND, RED, BLUE, GREEN, STAR, SQUARE = range(10, 17)
CONTENT = {RED, BLUE, GREEN, STAR, SQUARE}


def caption(*tokens: int) -> list[int]:
    return [CLS, *tokens, SEP]


TRAINING = [
    caption(A, color, shape, AND, A, other, second)
    for color in (RED, BLUE)
    for other in (RED, BLUE)
    for shape in (STAR, SQUARE)
    for second in (STAR, SQUARE)
]


def edited(text: list[int], own: tuple[list[int], ...] = (), training: list[list[int]] = TRAINING) -> Counter:
    edits = CaptionEdits(training, CONTENT)
    known = {tuple(x) for x in (text, *own)}
    found = [edits(text, known, numpy_generator(seed, "edited caption")) for seed in range(200)]
    return Counter(None if x is None else tuple(x) for x in found)


def test_one_word_is_replaced_or_two_are_swapped() -> None:
    text = caption(A, RED, STAR, AND, A, BLUE, SQUARE)
    found = edited(text)
    replaced = [
        caption(A, BLUE, STAR, AND, A, BLUE, SQUARE),
        caption(A, RED, SQUARE, AND, A, BLUE, SQUARE),
        caption(A, RED, STAR, AND, A, RED, SQUARE),
        caption(A, RED, STAR, AND, A, BLUE, STAR),
    ]
    swapped = [caption(A, BLUE, STAR, AND, A, RED, SQUARE), caption(A, RED, SQUARE, AND, A, BLUE, STAR)]
    assert {*found} == {tuple(x) for x in (*replaced, *swapped)}
    assert sum(found[tuple(x)] for x in swapped) == pytest.approx(0.4 * 200, abs=25)


def test_edits_keep_to_the_sequences_of_training_captions() -> None:
    """A color is never put where a shape stands, and green, which no training caption has there, never comes."""
    for text in edited(caption(A, RED, STAR, AND, A, BLUE, SQUARE)):
        assert text is not None
        assert {text[2], text[6]} <= {RED, BLUE} and {text[3], text[7]} <= {STAR, SQUARE}
    with_green = [*TRAINING, caption(GREEN, STAR)]  # another neighbour on the left
    assert all(
        GREEN not in (text or ()) for text in edited(caption(A, RED, STAR, AND, A, BLUE, SQUARE), (), with_green)
    )


def test_captions_of_the_image_are_no_edits() -> None:
    text, other = caption(A, RED, STAR, AND, A, BLUE, SQUARE), caption(A, BLUE, STAR, AND, A, BLUE, SQUARE)
    found = edited(text, (other,))
    assert tuple(other) not in found and None in found


@pytest.mark.parametrize("tokens", [(), (A,), (A, RED), (A, AND, A)])
def test_captions_with_fewer_than_two_content_words_are_not_edited(tokens: tuple[int, ...]) -> None:
    assert edited(caption(*tokens)) == {None: 200}


def test_edit_depends_on_the_generator_only() -> None:
    edits = CaptionEdits(TRAINING, CONTENT)
    text = caption(A, RED, STAR, AND, A, BLUE, SQUARE)
    assert edits(text, (), np.random.default_rng(3)) == edits(text, (), np.random.default_rng(3))
