"""Boxes of the objective boxes: read from COCO instances, joined with the training images, moved with augmentation."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from mmbert.data.examples import Example
from mmbert.data.images import BadImageError
from mmbert.data.readers.base import Problems
from mmbert.data.readers.coco import identifier
from mmbert.data.readers.strict import expect, load_json
from mmbert.data.readers.strict import field as required
from mmbert.data.samples import Placement
from mmbert.errors import DataError, quote
from mmbert.model.tokens import NOT_LABELLED

log = logging.getLogger("mmbert")

OUTSIDE = 1.0
"""Pixels that a box may lie outside of its image: COCO's are rounded."""
MEASURED_IMAGES = 20
"""Images whose size is compared with the one that the file gives."""
SIDES = "[left, top, width, height] in pixels"


class ImageBoxes(NamedTuple):
    """Boxes of one image, with a class each."""

    corners: np.ndarray  # (N, 4) fp32: left, top, right and bottom, as fractions of the image's sides
    classes: np.ndarray  # (N,) int64; `NOT_LABELLED` alone for an image that the files don't have


@dataclass(slots=True)
class BoxedImage:
    """Entry of one image in a file of boxes."""

    file_name: str
    width: int
    height: int
    place: str
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    """Left, top, right and bottom, as fractions of the sides."""
    names: list[str] = field(default_factory=list)
    """Category of each box."""


def read_boxes(files: Sequence[Path], problems: Problems | None = None) -> dict[str, BoxedImage]:
    """Read instances_train2017.json and its like.

    Args:
        files: With `images`, `annotations` and `categories` each; crowds are boxes as well.
        problems: Receives errors instead of raising them.

    Returns:
        Image id -> its boxes.

    Raises:
        DataError: A file cannot be read, or has records that are not right.
    """
    found: dict[str, BoxedImage] = {}
    for path in files:
        own = Problems() if problems is None else problems
        with own:
            _read_file(path, found, own)
        if problems is None:
            own.raise_if_any()
    return found


def _read_file(path: Path, found: dict[str, BoxedImage], problems: Problems) -> None:
    top = expect(load_json(path), dict, "the file", str(path))
    images, annotations, categories = (
        required(top, key, list, str(path)) for key in ("images", "annotations", "categories")
    )
    for index, record in enumerate(images):
        place = f"{path}:images[{index}]"
        with problems:
            record = expect(record, dict, "the image", place)
            key = str(identifier(record, "id", place))
            if key in found:
                raise DataError(place, f"id {quote(key)} is also the id of {found[key].place}", "each id once")
            width, height = (required(record, side, int, place) for side in ("width", "height"))
            if width < 1 or height < 1:
                raise DataError(place, f"a size of {width} x {height}", "the image's width and height in pixels")
            found[key] = BoxedImage(required(record, "file_name", str, place), width, height, place)
    names: dict[int, str] = {}
    for index, record in enumerate(categories):
        place = f"{path}:categories[{index}]"
        with problems:
            record = expect(record, dict, "the category", place)
            number, name = required(record, "id", int, place), required(record, "name", str, place)
            if number in names or name in names.values():
                raise DataError(place, f"category {number}, {quote(name)}, again", "each id and each name once")
            names[number] = name
    if problems.total:  # every box of such an image or category would be an error, too
        return
    for index, record in enumerate(annotations):
        place = f"{path}:annotations[{index}]"
        with problems:
            _add_box(expect(record, dict, "the annotation", place), place, found, names)


def _add_box(record: dict[str, Any], place: str, images: dict[str, BoxedImage], names: dict[int, str]) -> None:
    key, category = str(identifier(record, "image_id", place)), required(record, "category_id", int, place)
    if key not in images:
        raise DataError(place, f"image_id {quote(key)} is no image's id", "a known id")
    if category not in names:
        raise DataError(place, f"category_id {category} is no category's id", "a known id; see the file's categories")
    image, bbox = images[key], required(record, "bbox", list, place)
    if len(bbox) != 4 or any(isinstance(x, bool) or not isinstance(x, int | float) for x in bbox) or min(bbox[2:]) < 0:
        raise DataError(place, f"bbox {quote(str(bbox))}", f"{SIDES}, none of a size below 0")
    left, top, right, bottom = bbox[0], bbox[1], bbox[0] + bbox[2], bbox[1] + bbox[3]
    if min(left, top) < -OUTSIDE or right > image.width + OUTSIDE or bottom > image.height + OUTSIDE:
        found = f"bbox {bbox} lies outside of its image of {image.width} x {image.height} pixels"
        raise DataError(place, found, f"{SIDES}, inside the image")
    image.boxes.append((left / image.width, top / image.height, right / image.width, bottom / image.height))
    image.names.append(names[category])


def match_boxes(
    examples: Sequence[Example], images: dict[str, BoxedImage], load: Callable[[Path], Tensor], *, place: str
) -> tuple[list[ImageBoxes], dict[str, float]]:
    """Join boxes with training images: by the image id, or by the file name for formats without ids.

    Args:
        examples: Training images.
        images: What `read_boxes` returned.
        load: Decodes an image to (3, H, W), to compare its shape.
        place: Name of the files, for messages.

    Returns:
        The boxes of each example; and class -> mean fraction of an image that its boxes cover, for all classes that the
        examples have, in alphabetical order.

    Raises:
        DataError: No example has boxes, or an image does not have the shape that its entry gives.
    """
    by_name = {PurePosixPath(image.file_name).name: image for image in images.values()}
    matched = [images.get(example.image_id) or by_name.get(example.image.name) for example in examples]
    known = [image for image in matched if image is not None]
    covered: dict[str, float] = {}
    for image in known:
        for (left, top, right, bottom), name in zip(image.boxes, image.names, strict=True):
            covered[name] = covered.get(name, 0.0) + (right - left) * (bottom - top) / len(known)
    if not covered:
        first = f"{quote(examples[0].image.name)} with the id {quote(examples[0].image_id)}"
        found = f"no box of any of the {len(examples):,} training images, such as {first}"
        raise DataError(place, found, "the ids or file names of the images in data.annotations")
    measured = 0
    for example, image in zip(examples, matched, strict=True):
        if image is not None and measured < MEASURED_IMAGES:
            measured += 1
            _check_shape(example, image, load)
    if lacking := [example for example, image in zip(examples, matched, strict=True) if image is None]:
        log.warning(
            "data.boxes: %s of %s training images are not in %s, and left out of the objective boxes (first: %s)",
            f"{len(lacking):,}", f"{len(examples):,}", place, lacking[0].place,
        )  # fmt: skip
    number = {name: i for i, name in enumerate(sorted(covered))}
    unknown = ImageBoxes(np.zeros((1, 4), np.float32), np.array([NOT_LABELLED]))
    boxes = [
        unknown
        if image is None
        else ImageBoxes(
            np.array(image.boxes, np.float32).reshape(-1, 4), np.array([number[n] for n in image.names], np.int64)
        )
        for image in matched
    ]
    return boxes, {name: covered[name] for name in number}


def _check_shape(example: Example, image: BoxedImage, load: Callable[[Path], Tensor]) -> None:
    """Raise where an image is turned or cropped against its entry; a smaller copy is no difference."""
    try:
        height, width = load(example.image).shape[-2:]
    except BadImageError:
        return  # reported, or skipped, where it is trained on
    scale = max(width / image.width, height / image.height)
    if abs(width - scale * image.width) > 2 or abs(height - scale * image.height) > 2:
        found = f"{image.width} x {image.height} for an image of {width} x {height} pixels ({example.image.name})"
        raise DataError(image.place, found, "the size of the upright image, which its boxes are measured in")


def place_boxes(boxes: ImageBoxes, placement: Placement) -> ImageBoxes:
    """Move boxes as augmentation has moved the image; corners may then lie outside of it.

    Resizing changes no fraction of a side.
    """
    if placement == Placement():
        return boxes
    offset = np.array([placement.left, placement.top] * 2)
    corners = (boxes.corners - offset) / np.array([placement.width, placement.height] * 2)
    if placement.is_mirrored:
        corners[:, [0, 2]] = 1 - corners[:, [2, 0]]
    return ImageBoxes(corners.astype(np.float32), boxes.classes)
