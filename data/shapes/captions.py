"""Captions: builders that propose true meanings of a scene, and frames (format strings) that word them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from meaning import PLACES, RELATIONS, Meaning, Thing, holds, is_at, is_related, say
from scenes import Object, Scene

NUM_CAPTIONS = 5

# {a}..{d} are things, {n} is the total, {rest} all but one, {rel} a relation and {its} the same said of "it".
FRAMES = {
    "single": (
        "only {a}",
        "just {a}",
        "nothing but {a}",
        "there is only {a}",
        "{a} and nothing else",
        "one object: {a}",
        "a single shape, {a}",
        "the only object is {a}",
        "the picture shows just {a}",
    ),
    "relation": (
        "{a} {rel} {b}",
        "there is {a} {rel} {b}",
        "{a} is {rel} {b}",
        "the picture shows {a} {rel} {b}",
        "{b} with {a} {its}",
    ),
    "relation of total": (
        "{n} objects with {a} {rel} {b}",
        "{n} shapes, among them {a} {rel} {b}",
        "in a group of {n} shapes, {a} is {rel} {b}",
    ),
    "chain": ("{a} {rel} {b} and {rel2} {c}", "{a} that is {rel} {b} and {rel2} {c}"),
    "list": (
        "{n} objects: {list}",
        "{n} shapes: {list}",
        "exactly {n} shapes, {list}",
        "only {list}",
        "{list} and nothing else",
    ),
    "one of": (
        "{n} shapes, one of them {a}",
        "{n} objects including {a}",
        "one of the {n} objects is {a}",
        "among {n} shapes there is {a}",
        "{a} and {rest}",
        "{a} together with {rest}",
    ),
    "places": ("{a} and {b}", "there is {a} and {b}", "the picture has {a} and {b}", "{a}, and {b}"),
    "group": ("there are {a} and {b}", "{a} and {b}", "{b} and {a}", "the picture shows {a} and {b}"),
    "only group": ("only {a}", "just {a}", "{a} and nothing else", "nothing but {a}", "there are only {a}"),
    "same shape": ("{c}, one {a.color} and one {b.color}", "{c}: one is {a.color} and one is {b.color}"),
    "same color": ("{c}, a {a.shape} and a {b.shape}", "a {a.shape} and a {b.shape}, the only {c}"),
}


@dataclass(frozen=True, slots=True)
class Caption:
    """A caption and what it was made from."""

    kind: str
    frame: str
    meaning: Meaning

    @property
    def text(self) -> str:
        """The caption in words."""
        return say(self.frame, self.meaning)


# Each builder proposes a meaning about a focus object, or returns None where its kind does not fit.


def _name(obj: Object, rng: random.Random, *, full: bool = False, place: bool = False) -> Thing | None:
    """A phrase with color and shape, perhaps size; None if a place is asked for and none is clear."""
    thing = Thing(obj.size if full or rng.random() < 0.6 else None, obj.color, obj.shape)
    if not place:
        return thing
    places = [name for name in PLACES if is_at(obj, name, strict=True)]
    return replace(thing, place=rng.choice(places)) if places else None


def _other(scene: Scene, focus: Object, rng: random.Random) -> Object | None:
    """Another object with another color-shape pair."""
    others = [obj for obj in scene.objects if obj.pair != focus.pair]
    return rng.choice(others) if others else None


def _relation_between(first: Object, second: Object, rng: random.Random) -> str | None:
    """A relation that clearly holds."""
    clear = [name for name in RELATIONS if is_related(first, name, second, strict=True)]
    return rng.choice(clear) if clear else None


def _single(scene: Scene, focus: Object, rng: random.Random) -> Meaning | None:
    thing = _name(focus, rng, full=True, place=rng.random() < 0.8)
    return Meaning((thing,), total=1) if len(scene.objects) == 1 and thing else None


def _relation(scene: Scene, focus: Object, rng: random.Random) -> Meaning | None:
    other = _other(scene, focus, rng)
    if other is None:
        return None
    first, second = rng.sample((focus, other), 2)
    relation = _relation_between(first, second, rng)
    return Meaning((_name(first, rng), _name(second, rng)), ((0, relation, 1),)) if relation else None


def _relation_of_total(scene: Scene, focus: Object, rng: random.Random) -> Meaning | None:
    meaning = _relation(scene, focus, rng)
    return replace(meaning, total=len(scene.objects)) if meaning else None


def _chain(scene: Scene, focus: Object, rng: random.Random) -> Meaning | None:
    if len({obj.pair for obj in scene.objects}) < 3:
        return None
    second, third = rng.sample([obj for obj in scene.objects if obj.pair != focus.pair], 2)
    relations = [_relation_between(focus, obj, rng) for obj in (second, third)]
    if second.pair == third.pair or None in relations:
        return None
    things = tuple(Thing(None, obj.color, obj.shape) for obj in (focus, second, third))
    return Meaning(things, ((0, relations[0], 1), (0, relations[1], 2)))


def _list(scene: Scene, focus: Object, rng: random.Random) -> Meaning | None:
    objects = rng.sample(scene.objects, len(scene.objects))
    if len(objects) < 2 or len({obj.pair for obj in objects}) < len(objects):
        return None
    with_size = len(objects) < 4
    things = tuple(_name(obj, rng) if with_size else Thing(None, obj.color, obj.shape) for obj in objects)
    return Meaning(things, total=len(objects))


def _one_of(scene: Scene, focus: Object, rng: random.Random) -> Meaning | None:
    thing = _name(focus, rng, full=True, place=True)
    return Meaning((thing,), total=len(scene.objects)) if len(scene.objects) > 1 and thing else None


def _places(scene: Scene, focus: Object, rng: random.Random) -> Meaning | None:
    other = _other(scene, focus, rng)
    if other is None:
        return None
    things = tuple(_name(obj, rng, place=True) for obj in rng.sample((focus, other), 2))
    return None if None in things else Meaning(things)


def _group(scene: Scene, focus: Object, rng: random.Random) -> Meaning | None:
    pair, count = Counter(obj.pair for obj in scene.objects).most_common(1)[0]
    others = [obj for obj in scene.objects if obj.pair != pair]
    if count < 2 or not others:
        return None
    other = focus if focus in others else rng.choice(others)
    return Meaning((Thing(None, *pair, count=count), _name(other, rng, full=True)))


def _only_group(scene: Scene, focus: Object, rng: random.Random) -> Meaning | None:
    count = len(scene.objects)
    if count < 2 or len({obj.pair for obj in scene.objects}) > 1:
        return None
    size = focus.size if len({obj.size for obj in scene.objects}) == 1 else None
    return Meaning((Thing(size, *focus.pair, count=count),), total=count)


def _same(attribute: str) -> Callable[[Scene, Object, random.Random], Meaning | None]:
    """Builds the builder for two objects that share a shape but not the color, or the other way round."""

    def build(scene: Scene, focus: Object, rng: random.Random) -> Meaning | None:
        value = getattr(focus, attribute)
        objects = [obj for obj in scene.objects if getattr(obj, attribute) == value]
        if len(objects) != 2 or objects[0].pair == objects[1].pair:
            return None
        things = tuple(Thing(None, obj.color, obj.shape) for obj in rng.sample(objects, 2))
        return Meaning((*things, Thing(count=2, **{attribute: value})))

    return build


# kind: (builder, how often it is tried)
BUILDERS = {
    "single": (_single, 5),
    "relation": (_relation, 5),
    "relation of total": (_relation_of_total, 3),
    "chain": (_chain, 2),
    "list": (_list, 4),
    "one of": (_one_of, 4),
    "places": (_places, 3),
    "group": (_group, 4),
    "only group": (_only_group, 4),
    "same shape": (_same("shape"), 2),
    "same color": (_same("color"), 2),
}
_KINDS, _WEIGHTS = list(BUILDERS), [weight for _, weight in BUILDERS.values()]


def write_captions(scene: Scene, rng: random.Random) -> list[Caption]:
    """Five different captions that are strictly true; each names the held-out pair, if the scene has one."""
    held_out = scene.held_out
    captions: dict[str, Caption] = {}
    while len(captions) < NUM_CAPTIONS:
        kind = rng.choices(_KINDS, _WEIGHTS)[0]
        meaning = BUILDERS[kind][0](scene, held_out or rng.choice(scene.objects), rng)
        if meaning is None:
            continue
        # A lone shape has few other things to say.
        if rng.random() < (0.4 if len(scene.objects) == 1 else 0.12):
            meaning = replace(meaning, background=scene.background)
        caption = Caption(kind, rng.choice(FRAMES[kind]), meaning)
        named = held_out is None or f"{held_out.color} {held_out.shape}" in caption.text
        if named and holds(meaning, scene, strict=True):
            captions[caption.text] = caption
    return list(captions.values())
