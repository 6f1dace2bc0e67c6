"""Scenes of one to four colored shapes: sampling them and drawing them.

Coordinates are fractions of the image's side, x to the right and y down: a scene is the same at any size.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

SPLITS = ("train", "val", "test")
SHAPES = ("circle", "square", "triangle", "diamond", "cross")
SIZES = ("small", "large")
BACKGROUNDS = ("light", "dark")
COLORS = {
    "red": (222, 30, 36),
    "orange": (250, 140, 10),
    "yellow": (240, 215, 20),
    "green": (30, 155, 50),
    "cyan": (20, 200, 215),
    "blue": (40, 70, 225),
    "purple": (130, 40, 175),
    "pink": (250, 130, 195),
}
# Never drawn in train and val. A color is held out with at most one shape, a shape with at most two colors.
HELD_OUT = (
    ("red", "cross"),
    ("yellow", "square"),
    ("green", "circle"),
    ("cyan", "circle"),
    ("blue", "diamond"),
    ("purple", "triangle"),
)
SEEN_PAIRS = tuple((color, shape) for color in COLORS for shape in SHAPES if (color, shape) not in HELD_OUT)

NUM_OBJECTS_WEIGHTS = {1: 12, 2: 30, 3: 30, 4: 28}
HALF_EXTENT = {"small": 6 / 64, "large": 11 / 64}  # of 64 pixels: about 12 and 22 pixels across
BORDER = 1.5 / 64
GAP = 2.5 / 64
SUPERSAMPLING = 4

# Outlines in units of the half extent. The diamond is stretched so that it looks as large as the others.
OUTLINES = {
    "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    "triangle": ((0.0, -1.0), (1.05, 0.95), (-1.05, 0.95)),
    "diamond": ((0.0, -1.15), (1.15, 0.0), (0.0, 1.15), (-1.15, 0.0)),
    "cross": tuple(
        (x, y)
        for x, y in (
            *((-0.36, -1.0), (0.36, -1.0), (0.36, -0.36), (1.0, -0.36), (1.0, 0.36), (0.36, 0.36)),
            *((0.36, 1.0), (-0.36, 1.0), (-0.36, 0.36), (-1.0, 0.36), (-1.0, -0.36), (-0.36, -0.36)),
        )
    ),
}


@dataclass(frozen=True, slots=True)
class Object:
    """One shape: its names, its center and its half extent, as fractions of the image's side."""

    shape: str
    color: str
    size: str
    x: float
    y: float
    half: float

    @property
    def pair(self) -> tuple[str, str]:
        """The color-shape pair, the unit that is held out."""
        return self.color, self.shape


def bounding_box(shape: str, x: float, y: float, half: float) -> tuple[float, float, float, float]:
    """Left, top, width and height of a shape as it is drawn, as fractions of the image's side."""
    xs, ys = zip(*OUTLINES.get(shape, ((-1.0, -1.0), (1.0, 1.0))), strict=True)
    left, top = x + min(xs) * half, y + min(ys) * half
    return left, top, (max(xs) - min(xs)) * half, (max(ys) - min(ys)) * half


@dataclass(frozen=True, slots=True)
class Scene:
    """What one image shows."""

    objects: tuple[Object, ...]
    background: str

    @property
    def held_out(self) -> Object | None:
        """An object with a held-out color-shape pair, or None if the scene has none."""
        return next((obj for obj in self.objects if obj.pair in HELD_OUT), None)


def generator(seed: int, split: str, index: int, part: str) -> random.Random:
    """A random generator that depends on these four values only, not on how many scenes or jobs there are."""
    return random.Random(f"{seed}/{split}/{index}/{part}")


def sample_scene(seed: int, split: str, index: int) -> Scene:
    """The scene of one index; in the test split, every even index holds a held-out pair."""
    rng = generator(seed, split, index, "scene")
    unseen = split == "test" and index % 2 == 0
    num_objects = rng.choices(*zip(*NUM_OBJECTS_WEIGHTS.items(), strict=True))[0]
    pairs = [rng.choice(HELD_OUT if unseen else SEEN_PAIRS)]
    while len(pairs) < num_objects:
        pairs.append(_next_pair(pairs, rng))
    rng.shuffle(pairs)
    sizes = [rng.choice(SIZES) for _ in pairs]
    return Scene(_place_objects(pairs, sizes, rng), rng.choice(BACKGROUNDS))


def _next_pair(pairs: list[tuple[str, str]], rng: random.Random) -> tuple[str, str]:
    """A pair that often repeats something, so that counts and colors shared by two shapes occur."""
    color, shape = rng.choice(pairs)
    draw = rng.random()
    if draw < 0.22:
        return color, shape
    if draw < 0.37:
        return rng.choice([pair for pair in SEEN_PAIRS if pair[0] == color])
    return rng.choice(SEEN_PAIRS)


def _place_objects(pairs: list[tuple[str, str]], sizes: list[str], rng: random.Random) -> tuple[Object, ...]:
    """Objects at random places that do not overlap."""
    while True:
        objects: list[Object] = []
        for (color, shape), size in zip(pairs, sizes, strict=True):
            half = HALF_EXTENT[size] * rng.uniform(0.93, 1.07)
            for _ in range(20):
                low = half * 1.15 + BORDER
                x, y = rng.uniform(low, 1 - low), rng.uniform(low, 1 - low)
                if all(max(abs(x - o.x), abs(y - o.y)) > half + o.half + GAP for o in objects):
                    objects.append(Object(shape, color, size, round(x, 4), round(y, 4), round(half, 4)))
                    break
        if len(objects) == len(pairs):
            return tuple(objects)


def draw_scene(scene: Scene, size: int, rng: random.Random) -> Image.Image:
    """Draws a scene.

    Args:
        scene: What to draw.
        size: Side of the image in pixels.
        rng: Draws the tint of the background and of each object, which no caption speaks about.
    """
    side = size * SUPERSAMPLING
    level = rng.randint(228, 246) if scene.background == "light" else rng.randint(18, 44)
    image = Image.new("RGB", (side, side), tuple(level + rng.randint(-6, 6) for _ in range(3)))
    pen = ImageDraw.Draw(image)
    for obj in scene.objects:
        fill = tuple(min(255, max(0, value + rng.randint(-12, 12))) for value in COLORS[obj.color])
        x, y, half = obj.x * side, obj.y * side, obj.half * side
        if obj.shape == "circle":
            pen.ellipse((x - half, y - half, x + half, y + half), fill=fill)
        else:
            pen.polygon([(x + u * half, y + v * half) for u, v in OUTLINES[obj.shape]], fill=fill)
    return image.reduce(SUPERSAMPLING)
