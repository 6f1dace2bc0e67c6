"""What captions mean: `Meaning` says it in data, `say` in words, and `holds` checks it against a scene."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from scenes import Object, Scene

NUMBERS = ("no", "one", "two", "three", "four")

# phrase: (axis, sign of the first object's offset, opposite, the same said of "it")
RELATIONS = {
    "to the left of": ("x", -1, "to the right of", "to its left"),
    "to the right of": ("x", 1, "to the left of", "to its right"),
    "left of": ("x", -1, "right of", "on its left"),
    "right of": ("x", 1, "left of", "on its right"),
    "above": ("y", -1, "below", "above it"),
    "below": ("y", 1, "above", "below it"),
    "over": ("y", -1, "under", "over it"),
    "under": ("y", 1, "over", "under it"),
}
# phrase: (x, y) with -1 for left or top, 1 for right or bottom, 0 for the middle, None for anywhere
PLACES = {
    "on the left": (-1, None),
    "on the right": (1, None),
    "at the top": (None, -1),
    "at the bottom": (None, 1),
    "in the middle": (0, 0),
    "in the top left corner": (-1, -1),
    "in the top right corner": (1, -1),
    "in the bottom left corner": (-1, 1),
    "in the bottom right corner": (1, 1),
}


@dataclass(frozen=True, slots=True)
class Thing:
    """What a noun phrase says of an object; None means not said.

    `count` None reads "at least one"; a number reads "exactly so many".
    """

    size: str | None = None
    color: str | None = None
    shape: str | None = None
    place: str | None = None
    count: int | None = None

    def matches(self, obj: Object, *, strict: bool = False) -> bool:
        """Whether the phrase is true of this object."""
        return (
            (self.shape is None or self.shape == obj.shape)
            and (self.color is None or self.color == obj.color)
            and (self.size is None or self.size == obj.size)
            and (self.place is None or is_at(obj, self.place, strict=strict))
        )

    def noun(self) -> str:
        """The words without article or place: "small red circle"."""
        return " ".join(word for word in (self.size, self.color, self.shape or "shape") if word)

    def nouns(self) -> str:
        """The plural: "small red crosses"."""
        return self.noun() + ("es" if self.shape == "cross" else "s")

    def __str__(self) -> str:
        """The phrase: "an orange cross at the top", "two red circles"."""
        noun = self.noun()
        article = "an" if noun[0] in "aeiou" else "a"
        phrase = f"{NUMBERS[self.count]} {self.nouns()}" if self.count else f"{article} {noun}"
        return f"{phrase} {self.place}" if self.place else phrase


@dataclass(frozen=True, slots=True)
class Meaning:
    """All that a caption claims; `relations` holds (first thing, relation phrase, second thing)."""

    things: tuple[Thing, ...]
    relations: tuple[tuple[int, str, int], ...] = ()
    total: int | None = None
    background: str | None = None


def is_at(obj: Object, place: str, *, strict: bool = False) -> bool:
    """Whether an object is at a place; `strict` asks for a clear case, else doubtful ones count as true."""
    for value, band in zip((obj.x, obj.y), PLACES[place], strict=True):
        if band == 0 and abs(value - 0.5) > (0.1 if strict else 0.2):
            return False
        if band in (-1, 1) and (value - 0.5) * band < (0.16 if strict else 0.0):
            return False
    return True


def is_related(first: Object, relation: str, second: Object, *, strict: bool = False) -> bool:
    """Whether a relation holds; `strict` also asks for a clear distance, longer than along the other axis."""
    axis, sign, _, _ = RELATIONS[relation]
    dx, dy = first.x - second.x, first.y - second.y
    along, across = (dx * sign, dy) if axis == "x" else (dy * sign, dx)
    return along >= max(0.125, abs(across)) if strict else along > 0


def holds(meaning: Meaning, scene: Scene, *, strict: bool = False) -> bool:
    """Whether a meaning is true of a scene, reading "a" as "at least one" and numbers as exact.

    Args:
        meaning: The claims; distinct things must be distinct objects.
        scene: The scene to look at.
        strict: Doubtful places and relations count as false, else as true. Captions must be strictly true;
            foils must be false even without `strict`.
    """
    if meaning.total not in (None, len(scene.objects)) or meaning.background not in (None, scene.background):
        return False
    candidates: list[list[Object | None]] = []
    for thing in meaning.things:
        found = [obj for obj in scene.objects if thing.matches(obj, strict=strict)]
        if len(found) != thing.count if thing.count else not found:
            return False
        candidates.append([None] if thing.count else found)
    for chosen in product(*candidates):
        objects = [obj for obj in chosen if obj is not None]
        if len({id(obj) for obj in objects}) == len(objects) and all(
            is_related(chosen[i], relation, chosen[j], strict=strict) for i, relation, j in meaning.relations
        ):
            return True
    return False


def say(frame: str, meaning: Meaning) -> str:
    """Fills a frame with a meaning."""
    things = meaning.things
    phrases = [str(thing) for thing in things]
    fields = dict(zip("abcd", things, strict=False))
    fields["list"] = ", ".join(phrases[:-1]) + " and " + phrases[-1]
    if meaning.total:
        others = meaning.total - 1
        fields["n"] = NUMBERS[meaning.total]
        fields["rest"] = f"{NUMBERS[others]} other shape{'s' if others > 1 else ''}"
    for suffix, (_, relation, _) in zip(("", "2"), meaning.relations, strict=False):
        fields["rel" + suffix], fields["its" + suffix] = relation, RELATIONS[relation][3]
    ending = f" on a {meaning.background} background" if meaning.background else ""
    return frame.format(**fields) + ending
