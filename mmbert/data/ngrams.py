"""Content words and n-grams of captions, found by comparing the captions of one image."""

import re
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from typing import TypeVar

from mmbert.data.examples import Example
from mmbert.errors import UsageError

WORD = re.compile(r"\w+")
MIN_LIFT = 1.4
"""Content words are in a further caption of the same image at least this many times as often as in any caption."""
MIN_CAPTIONS = 20
"""Captions that a content word occurs in, at least; fewer than 2,000 captions take 1 % of them, but at least 2."""
Unit = TypeVar("Unit", bound=Hashable)


def split_words(text: str) -> list[str]:
    """Split a text into lower-case words."""
    return WORD.findall(text.lower())


def content_units(images: Iterable[Sequence[Collection[Unit]]]) -> frozenset[Unit]:
    """Find the words (or tokens) that say something about the image.

    If a caption has a word that describes its image, further captions of the image have it more often than chance.

    Args:
        images: The captions of each image, each caption as its different words or tokens.

    Returns:
        Those with a lift of at least `MIN_LIFT` in enough captions, see `MIN_CAPTIONS`.
    """
    count: Counter[Unit] = Counter()
    repeated: Counter[Unit] = Counter()
    num_captions = 0
    for captions in images:
        if len(captions) < 2:
            continue
        num_captions += len(captions)
        in_image = Counter(unit for caption in captions for unit in caption)
        for unit, n in in_image.items():
            count[unit] += n
            repeated[unit] += n * (n - 1) / (len(captions) - 1)  # pyright: ignore[reportArgumentType]
    enough = min(MIN_CAPTIONS, max(2, num_captions // 100))
    return frozenset(
        unit for unit, n in count.items() if n >= enough and repeated[unit] / n >= MIN_LIFT * n / num_captions
    )


def find_ngrams(examples: Sequence[Example], *, longest: int, min_fraction: float) -> dict[str, float]:
    """Find the word sequences that describe images: content words at both ends, in enough images.

    Args:
        examples: Training images with their captions.
        longest: Words of the longest n-gram.
        min_fraction: Fraction of the images that an n-gram must describe.

    Returns:
        N-gram (words joined by spaces) -> fraction of the images of which a caption has it, the most frequent first.

    Raises:
        UsageError: The captions have no such n-gram.
    """
    images = [[split_words(caption) for caption in example.captions] for example in examples]
    content = content_units([[{*words} for words in captions] for captions in images])
    count = Counter(
        name
        for captions in images
        for name in {
            name
            for words in captions
            for name, first, last in word_sequences(words, longest)
            if first in content and last in content
        }
    )
    kept = sorted((name for name, n in count.items() if n >= min_fraction * len(images)), key=lambda x: (-count[x], x))
    if not kept:
        several = sum(len(example.captions) > 1 for example in examples)
        raise UsageError(
            f"objectives.ngrams: no n-gram of content words is in the captions of {min_fraction:.2%} of the "
            f"{len(examples):,} training images, of which {several:,} have several captions, which it takes to tell "
            "content words. Choose a smaller min_fraction, or leave the objective out."
        )
    return {name: count[name] / len(images) for name in kept}


def image_ngrams(examples: Sequence[Example], names: Sequence[str]) -> list[tuple[int, ...]]:
    """Return the numbers of the n-grams that the captions of each image have."""
    number = {name: i for i, name in enumerate(names)}
    longest = max((len(name.split()) for name in names), default=0)
    return [
        tuple(
            sorted(
                {
                    number[name]
                    for caption in example.captions
                    for name, _, _ in word_sequences(split_words(caption), longest)
                    if name in number
                }
            )
        )
        for example in examples
    ]


def word_sequences(words: Sequence[str], longest: int) -> Iterator[tuple[str, str, str]]:
    """Yield each sequence of up to `longest` words, joined by spaces, with its first and last word."""
    for n in range(1, longest + 1):
        for i in range(len(words) - n + 1):
            yield " ".join(words[i : i + n]), words[i], words[i + n - 1]
