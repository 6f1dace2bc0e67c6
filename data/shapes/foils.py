"""Foils: a true caption with one part of its meaning changed, in the same frame, so that it is false.

Their words are balanced: what stands in true captions only stands about as often in foils only, so that a model
that prefers some words scores 0.5. Changes at random are not: as scenes of two shapes are more frequent than those
of four, a preference for "two" told 61 to 63 % of the foils of counts without an image. cf. the adversarial
refinement of SugarCrepe (arXiv:2306.14610).
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations, pairwise

from captions import Caption
from meaning import PLACES, RELATIONS, Meaning, Thing, holds
from scenes import COLORS, HELD_OUT, SHAPES, SIZES, Scene


def _with_thing(meaning: Meaning, index: int, thing: Thing) -> Meaning:
    return replace(meaning, things=(*meaning.things[:index], thing, *meaning.things[index + 1 :]))


def _replace_attribute(caption: Caption) -> Iterator[Meaning]:
    for index, thing in enumerate(caption.meaning.things):
        for color in COLORS:
            yield _with_thing(caption.meaning, index, replace(thing, color=color))
        # Twice, so that sizes are not lost among the many colors.
        for size in SIZES * 2 if thing.size else ():
            yield _with_thing(caption.meaning, index, replace(thing, size=size))


def _replace_object(caption: Caption) -> Iterator[Meaning]:
    for index, thing in enumerate(caption.meaning.things):
        for shape in SHAPES:
            yield _with_thing(caption.meaning, index, replace(thing, shape=shape))


def _replace_relation(caption: Caption) -> Iterator[Meaning]:
    meaning = caption.meaning
    for k, (i, relation, j) in enumerate(meaning.relations):
        changed = (i, RELATIONS[relation][2], j)
        yield replace(meaning, relations=(*meaning.relations[:k], changed, *meaning.relations[k + 1 :]))
    for index, thing in enumerate(meaning.things):
        if thing.place and thing.place != "in the middle":
            mirrored = tuple(band and -band for band in PLACES[thing.place])
            opposite = next(name for name, bands in PLACES.items() if bands == mirrored)
            yield _with_thing(meaning, index, replace(thing, place=opposite))


def _swap_attribute(caption: Caption) -> Iterator[Meaning]:
    things = caption.meaning.things
    for i, j in combinations(range(len(things)), 2):
        swapped = _with_thing(caption.meaning, i, replace(things[i], color=things[j].color))
        yield _with_thing(swapped, j, replace(things[j], color=things[i].color))


def _replace_count(caption: Caption) -> Iterator[Meaning]:
    meaning = caption.meaning
    if caption.kind in ("one of", "relation of total"):
        yield from (replace(meaning, total=total) for total in (2, 3, 4))
    elif caption.kind in ("group", "only group"):
        for count in (2, 3, 4):
            total = count if caption.kind == "only group" else None
            yield replace(_with_thing(meaning, 0, replace(meaning.things[0], count=count)), total=total)


FOILS = {
    "replace_attribute": _replace_attribute,
    "replace_object": _replace_object,
    "replace_relation": _replace_relation,
    "swap_attribute": _swap_attribute,
    "replace_count": _replace_count,
}


# Lone shapes permit neither a swap nor a count, so the other scenes draw these more often.
CATEGORY_WEIGHTS = {
    "replace_attribute": 1.0,
    "replace_object": 1.0,
    "replace_relation": 1.4,
    "swap_attribute": 3.0,
    "replace_count": 1.4,
}


@dataclass(frozen=True, slots=True)
class Foil:
    """A true caption and its false twin."""

    category: str
    caption: Caption
    negative: Caption


def propose_foils(scene: Scene, captions: list[Caption], rng: random.Random) -> list[Foil]:
    """All foils of a random category, or of the next one that the captions permit, in random order."""
    order = sorted(FOILS, key=lambda category: rng.random() ** (1 / CATEGORY_WEIGHTS[category]), reverse=True)
    for category in order:
        foils = [
            Foil(category, caption, replace(caption, meaning=meaning))
            for caption in captions
            if not caption.kind.startswith("same")  # their things share words: changing one changes two
            for meaning in FOILS[category](caption)
            if _is_plausible(meaning, scene) and not holds(meaning, scene)
        ]
        if foils:
            assert all(foil.caption.text != foil.negative.text for foil in foils)
            return rng.sample(foils, len(foils))
    return []


class WordBalance:
    """Chooses foils so that no word or pair of adjacent words is more frequent in true captions than in foils.

    That holds within each category, for scenes with and without a held-out pair on their own.
    """

    def __init__(self) -> None:
        # term -> occurrences in true captions minus those in foils
        self.surplus: dict[tuple[str, bool], Counter[str]] = defaultdict(Counter)

    def choose(self, category: str, unseen: bool, pairs: list[tuple[str, str]]) -> int:
        """Index of the pair of caption and foil that leaves the smallest sum of squared surpluses; counts it."""
        surplus = self.surplus[category, unseen]
        changes = [word_changes(caption, negative) for caption, negative in pairs]
        costs = [sum(change * (2 * surplus[term] + change) for term, change in c.items()) for c in changes]
        chosen = costs.index(min(costs))
        for term, change in changes[chosen].items():
            surplus[term] += change
        return chosen


def word_changes(caption: str, negative: str) -> dict[str, int]:
    """Words and pairs of adjacent words -> occurrences in the caption minus those in its foil, without zeros."""
    changes: Counter[str] = Counter()
    for text, sign in ((caption, 1), (negative, -1)):
        words = text.replace(",", " ,").split()
        for term in (*words, *map(" ".join, pairwise(words))):
            changes[term] += sign
    return {term: change for term, change in changes.items() if change}


def _is_plausible(meaning: Meaning, scene: Scene) -> bool:
    """Whether the words alone do not tell that this is a foil.

    True captions never name the same pair twice ("a red circle and a red circle"), and in a scene without a
    held-out pair they name none.
    """
    pairs = [(thing.color, thing.shape) for thing in meaning.things]
    names_held_out = any(pair in HELD_OUT for pair in pairs)
    return len(set(pairs)) == len(pairs) and not (names_held_out and scene.held_out is None)
