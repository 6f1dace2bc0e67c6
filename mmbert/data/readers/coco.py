"""COCO captions: `images` and `annotations` joined by `image_id`; one file is one split."""

from pathlib import Path
from typing import Any

from mmbert.data.readers.base import Example, ImageFolder, Problems, clean_caption
from mmbert.data.readers.strict import expect, field, load_json, missing_key
from mmbert.errors import DataError


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
        images: folder of the pictures.
        problems: receives what is wrong.
        split: name of the split the file is; "train" if not given.
        drop_uncaptioned: leave pictures without a caption out instead of refusing the file.

    Raises:
        DataError: the file as a whole cannot be read.
    """
    top = expect(load_json(path), dict, "the file", str(path))
    records = field(top, "images", list, str(path))
    annotations = field(top, "annotations", list, str(path))

    pictures: dict[int | str, tuple[Path, str]] = {}
    files: dict[Path, str] = {}
    bad_ids: set[int | str] = set()
    for index, record in enumerate(records):
        place = f"{path}:images[{index}]"
        with problems:
            record = expect(record, dict, "the image", place)
            key = _identifier(record, "id", place)
            if key in pictures:
                raise DataError(place, f"id {key!r} is also the id of {pictures[key][1]}", "each id once")
            bad_ids.add(key)
            file, _ = images.find(field(record, "file_name", str, place), place)
            if file in files:
                raise DataError(place, f"the file of {files[file]} again", "each picture once")
            files[file] = place
            pictures[key] = file, place
            bad_ids.discard(key)

    captions: dict[int | str, list[str]] = {key: [] for key in pictures}
    used: dict[int | str, str] = {}
    for index, record in enumerate(annotations):
        place = f"{path}:annotations[{index}]"
        with problems:
            record = expect(record, dict, "the annotation", place)
            key = _identifier(record, "image_id", place)
            if key in bad_ids:
                continue  # its image is already reported
            if key not in captions:
                raise DataError(place, f"image_id {key!r} is no image's id", _known_id(key, captions))
            if "id" in record:
                number = _identifier(record, "id", place)
                if number in used:
                    raise DataError(place, f"id {number!r} is also the id of {used[number]}", "each id once")
                used[number] = place
            if "caption" not in record:
                error = missing_key("caption", record, place)
                raise DataError(place, error.found, f"{error.expected} Is this a captions_*.json file?")
            if caption := clean_caption(record["caption"], place):
                captions[key].append(caption)
            else:
                problems.note("empty captions dropped", place)

    examples = []
    for key, (file, place) in pictures.items():
        if captions[key]:
            examples.append(Example(file, tuple(captions[key]), str(key), split or "train", place))
        elif drop_uncaptioned:
            problems.note("pictures without a caption dropped", place)
        else:
            problems.add(place, f"no caption for image {key!r}", "at least one, or drop_uncaptioned=True")
    return examples


def _identifier(record: dict[str, Any], key: str, place: str) -> int | str:
    value = record.get(key)
    return value if isinstance(value, str) else field(record, key, int, place)


def _known_id(key: int | str, known: dict[int | str, list[str]]) -> str:
    """Say what would have been right; ids of the wrong type (42 and "42") are the usual reason."""
    if isinstance(key, int):
        return f"one of the images' ids (there is {str(key)!r}, a string)" if str(key) in known else "a known id"
    is_number = key.isdecimal() and int(key) in known
    return f"one of the images' ids (there is {int(key)}, a number)" if is_number else "a known id"
