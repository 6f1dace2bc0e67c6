"""Reader of COCO captions: `images` and `annotations` joined by `image_id`; one file is one split."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmbert.data.readers.base import (
    UNCAPTIONED,
    Example,
    ImageFolder,
    Problems,
    clean_caption,
    note_empty_caption,
    note_uncaptioned,
)
from mmbert.data.readers.strict import MAX_INT_DIGITS, expect, field, load_json, missing_key
from mmbert.errors import DataError, quote


def read_coco(
    path: Path,
    images: ImageFolder,
    problems: Problems,
    *,
    split: str | None = None,
    drop_uncaptioned: bool = False,
) -> list[Example]:
    """Read captions_train2017.json and its like.

    Args:
        path: the annotation file.
        images: folder of the images.
        problems: receives errors.
        split: name of the split the file is; "train" if not given.
        drop_uncaptioned: drop images without a caption instead of raising an error.

    Raises:
        DataError: the file cannot be read.
    """
    top = expect(load_json(path), dict, "the file", str(path))
    records = field(top, "images", list, str(path))
    annotations = field(top, "annotations", list, str(path))

    known_images: dict[int | str, tuple[Path, str]] = {}
    files: dict[Path, str] = {}
    bad_ids: set[int | str] = set()
    for index, record in enumerate(records):
        place = f"{path}:images[{index}]"
        with problems:
            record = expect(record, dict, "the image", place)
            key = identifier(record, "id", place)
            if key in known_images:
                raise DataError(place, f"id {quote(key)} is also the id of {known_images[key][1]}", "each id once")
            if (twin := _other_type(key, known_images)) is not None and str(twin) == str(key):
                found = f"id {key!r} beside id {twin!r} of {known_images[twin][1]}"
                raise DataError(place, found, "ids of one type, numbers or strings")
            bad_ids.add(key)
            file, _ = images.find(field(record, "file_name", str, place), place)
            if file in files:
                raise DataError(place, f"the file of {files[file]} again", "each image once")
            files[file] = place
            known_images[key] = file, place
            bad_ids.discard(key)

    captions: dict[int | str, list[str]] = {key: [] for key in known_images}
    used: dict[int | str, str] = {}
    reported: set[int | str | None] = set()
    for index, record in enumerate(annotations):
        place = f"{path}:annotations[{index}]"
        key, before = None, problems.total
        with problems:
            record = expect(record, dict, "the annotation", place)
            key = identifier(record, "image_id", place)
            if key in bad_ids:
                continue  # its image is already reported
            if key not in captions:
                reported.add(twin := _other_type(key, captions))
                expected = "a known id"
                if twin is not None:
                    kind = "a number" if isinstance(twin, int) else "a string"
                    expected = f"one of the images' ids (there is {quote(twin)}, {kind})"
                raise DataError(place, f"image_id {quote(key)} is no image's id", expected)
            if "id" in record:
                number = identifier(record, "id", place)
                if number in used:
                    raise DataError(place, f"id {quote(number)} is also the id of {used[number]}", "each id once")
                used[number] = place
            if "caption" not in record:
                error = missing_key("caption", record, place)
                raise DataError(place, error.found, f"{error.expected} Is this a captions_*.json file?")
            if caption := clean_caption(record["caption"], place):
                captions[key].append(caption)
            else:
                note_empty_caption(problems, place)
        if problems.total > before:
            reported.add(key)

    examples = []
    for key, (file, place) in known_images.items():
        if captions[key]:
            examples.append(Example(file, tuple(captions[key]), str(key), split or "train", place))
            continue
        found = f"no caption for image {quote(key)}"
        if drop_uncaptioned:
            note_uncaptioned(problems, place)
        elif key not in reported:  # otherwise an error of its captions is already reported
            problems.add(place, found, UNCAPTIONED)
    return examples


def identifier(record: dict[str, Any], key: str, place: str) -> int | str:
    """Return an id, a number or a string.

    Raises:
        DataError: it is missing, or something else.
    """
    value = record.get(key)
    return value if isinstance(value, str) else field(record, key, int, place)


def _other_type(key: int | str, known: Mapping[int | str, object]) -> int | str | None:
    """Find the known id that differs in its type only, as 42 and "42" do: the usual reason for an unknown one."""
    if isinstance(key, int):
        twin: int | str = str(key)
    elif key.isdecimal() and len(key) <= MAX_INT_DIGITS:
        twin = int(key)
    else:
        return None
    return twin if twin in known else None
