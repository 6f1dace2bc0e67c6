"""Questions with one right answer, in the three answer types of VQAv2."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, replace

from meaning import Thing, is_related
from scenes import COLORS, HELD_OUT, SHAPES, SIZES, Object, Scene

# Leading words as VQAv2 counts them; a longer one comes before its own beginning.
QUESTION_TYPES = (
    "how many",
    "is there a",
    "is the",
    "are there",
    "what color is the",
    "what color are the",
    "what shape is the",
    "what shape is",
    "what size is the",
)
EXTREMES = {"leftmost": ("x", -1), "rightmost": ("x", 1), "highest": ("y", -1), "lowest": ("y", 1)}
RELATIONS = ("to the left of", "to the right of", "above", "below")


@dataclass(frozen=True, slots=True)
class Question:
    """A question, its only right answer and its VQAv2 answer type ("yes/no", "number" or "other")."""

    text: str
    answer: str
    answer_type: str

    @property
    def question_type(self) -> str:
        """The leading words, for example "how many"."""
        return next(words for words in QUESTION_TYPES if self.text.lower().startswith(words))


def write_questions(scene: Scene, rng: random.Random) -> list[Question]:
    """Up to three questions: one of each answer type that the scene permits."""
    return [q for q in (_yes_no(scene, rng), _number(scene, rng), _other(scene, rng)) if q]


def _count(thing: Thing, scene: Scene) -> int:
    return sum(thing.matches(obj) for obj in scene.objects)


def _names(obj: Object, scene: Scene, *attributes: str) -> Thing | None:
    """A phrase of these attributes, if it names this object only."""
    thing = Thing(**{name: getattr(obj, name) for name in attributes})
    return thing if _count(thing, scene) == 1 else None


def _may_name(color: str | None, shape: str | None, scene: Scene) -> bool:
    """Whether a question may name this pair: in a scene without one, a held-out pair would mean "no"."""
    return (color, shape) not in HELD_OUT or scene.held_out is not None


def _yes_no(scene: Scene, rng: random.Random) -> Question | None:
    """Draws the answer first, then a kind, then a question: so no kind of question favors an answer."""
    is_yes = rng.random() < 0.5
    kinds = [_is_there, _is_there, _is_related, _is_color, _is_size, _are_there_more]
    for kind in rng.sample(kinds, len(kinds)):
        text = kind(scene, rng, is_yes)
        if text:
            return Question(text, "yes" if is_yes else "no", "yes/no")
    return None


def _is_there(scene: Scene, rng: random.Random, is_yes: bool) -> str | None:
    obj = rng.choice(scene.objects)
    said = rng.choice((("color", "shape"), ("size", "shape"), ("size", "color"), ("size", "color", "shape")))
    thing = Thing(**{name: getattr(obj, name) for name in said})
    if not is_yes:
        values = {"size": SIZES, "color": tuple(COLORS), "shape": SHAPES}
        changes = [replace(thing, **{name: value}) for name in said for value in values[name]]
        changes = [t for t in changes if not _count(t, scene) and _may_name(t.color, t.shape, scene)]
        if not changes:
            return None
        thing = rng.choice(changes)
    return f"Is there {thing}?"


def _is_related(scene: Scene, rng: random.Random, is_yes: bool) -> str | None:
    named = [(obj, thing) for obj in scene.objects if (thing := _names(obj, scene, "color", "shape"))]
    if len(named) < 2:
        return None
    (first, first_thing), (second, second_thing) = rng.sample(named, 2)
    for relation in RELATIONS:
        true_of = (first, second) if is_yes else (second, first)
        if is_related(true_of[0], relation, true_of[1], strict=True):
            return f"Is the {first_thing.noun()} {relation} the {second_thing.noun()}?"
    return None


def _is_color(scene: Scene, rng: random.Random, is_yes: bool) -> str | None:
    obj = rng.choice(scene.objects)
    thing = _names(obj, scene, "shape")
    color = obj.color if is_yes else rng.choice([color for color in COLORS if color != obj.color])
    return f"Is the {thing.noun()} {color}?" if thing and _may_name(color, obj.shape, scene) else None


def _is_size(scene: Scene, rng: random.Random, is_yes: bool) -> str | None:
    obj = rng.choice(scene.objects)
    thing = _names(obj, scene, "color", "shape")
    size = next(size for size in SIZES if (size == obj.size) == is_yes)
    return f"Is the {thing.noun()} {size}?" if thing else None


def _are_there_more(scene: Scene, rng: random.Random, is_yes: bool) -> str | None:
    name = rng.choice(("color", "shape"))
    things = [Thing(**{name: value}) for value in sorted({getattr(obj, name) for obj in scene.objects})]
    pairs = [(a, b) for a in things for b in things if _count(a, scene) > _count(b, scene)]
    if not pairs:
        return None
    more, fewer = rng.choice(pairs)
    first, second = (more, fewer) if is_yes else (fewer, more)
    return f"Are there more {first.nouns()} than {second.nouns()}?"


def _number(scene: Scene, rng: random.Random) -> Question:
    """Draws the answer first, so that the many things that occur no times or once do not prevail."""
    things = [Thing()]
    things += [Thing(shape=shape) for shape in SHAPES]
    things += [Thing(color=color) for color in COLORS]
    things += [Thing(size=size) for size in SIZES]
    by_answer: dict[int, list[Thing]] = defaultdict(list)
    for thing in things:
        by_answer[_count(thing, scene)].append(thing)
    answers = sorted(by_answer)
    answer = rng.choices(answers, [1 if number < 2 else 2 for number in answers])[0]
    return Question(f"How many {rng.choice(by_answer[answer]).nouns()} are there?", str(answer), "number")


def _other(scene: Scene, rng: random.Random) -> Question | None:
    """Draws a kind of question among those the scene permits, then one of that kind."""
    by_kind: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for obj in scene.objects:
        for said in (("shape",), ("size", "shape")):
            if thing := _names(obj, scene, *said):
                by_kind["color"].append((f"What color is the {thing.noun()}?", obj.color))
        for said in (("color",), ("size", "color")):
            if thing := _names(obj, scene, *said):
                by_kind["shape"].append((f"What shape is the {thing.noun().removesuffix(' shape')} object?", obj.shape))
        if thing := _names(obj, scene, "color", "shape"):
            by_kind["size"].append((f"What size is the {thing.noun()}?", obj.size))
            by_kind["relation"] += _what_is_related(obj, thing, scene)
    for word, (axis, sign) in EXTREMES.items():
        ranked = sorted(scene.objects, key=lambda obj: -sign * getattr(obj, axis))
        if len(ranked) > 1 and abs(getattr(ranked[0], axis) - getattr(ranked[1], axis)) >= 0.1:
            by_kind["extreme"].append((f"What color is the {word} object?", ranked[0].color))
            by_kind["extreme"].append((f"What shape is the {word} object?", ranked[0].shape))
    if len(scene.objects) > 1 and len({obj.color for obj in scene.objects}) == 1:
        by_kind["all"].append(("What color are the objects?", scene.objects[0].color))
    kinds = sorted(kind for kind, found in by_kind.items() if found)
    if not kinds:
        return None
    text, answer = rng.choice(by_kind[rng.choice(kinds)])
    return Question(text, answer, "other")


def _what_is_related(obj: Object, thing: Thing, scene: Scene) -> list[tuple[str, str]]:
    """Questions about the only object on one side of a named one."""
    found = []
    for relation in RELATIONS:
        others = [o for o in scene.objects if o is not obj and is_related(o, relation, obj)]
        if len(others) == 1 and is_related(others[0], relation, obj, strict=True):
            found.append((f"What shape is {relation} the {thing.noun()}?", others[0].shape))
    return found
