"""File names of images that annotations name by an id: a template, or COCO's list of images."""

import re
import string
from collections.abc import Callable
from pathlib import Path

from mmbert.data.readers.strict import expect, field, load_json
from mmbert.errors import DataError, UsageError, quote

EXAMPLE = "COCO_val2014_{:012d}.jpg"
FORMAT_SPEC = re.compile(r"(0?[0-9]{1,3})?[ds]?")
"""Format of the id in a template: a width, zero-padded or not."""


def image_name_formatter(image_names: str) -> Callable[[int | str, str], str]:
    """Build the function (image_id, place) -> file name.

    Args:
        image_names: A template such as "COCO_val2014_{:012d}.jpg", or a JSON file whose list "images" has "id" and
            "file_name", as COCO's caption files.

    Raises:
        DataError: The file can't be read; and by the function, where an id has no name.
        UsageError: An invalid template.
    """
    return _from_file(Path(image_names)) if image_names.endswith(".json") else _from_template(image_names)


def _from_template(template: str) -> Callable[[int | str, str], str]:
    try:
        fields = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError:  # a single brace
        fields = []
    names = [name for name, _, _ in fields]
    valid = all(FORMAT_SPEC.fullmatch(spec or "") and conversion is None for _, spec, conversion in fields)
    if not valid or (names != [""] and set(names) != {"0"}):
        raise UsageError(
            f"data.image_names={template!r}: expected a template with one {{}} for the image id, such as {EXAMPLE} "
            "(write {{ and }} for braces of the name), or a .json file with COCO's list of images."
        )
    is_number = any((spec or "").startswith("0") or (spec or "").endswith("d") for _, spec, _ in fields)

    def format_name(image_id: int | str, place: str) -> str:
        try:
            return template.format(int(image_id) if is_number else str(image_id))
        except ValueError:
            found = f"image_id {quote(image_id)} does not fit image_names={template!r}, which takes a number"
            raise DataError(place, found, "a number, or a template with {} for text") from None

    return format_name


def _from_file(path: Path) -> Callable[[int | str, str], str]:
    names: dict[int | str, str] = {}
    top = expect(load_json(path), dict, "the file", str(path))
    for index, record in enumerate(field(top, "images", list, str(path))):
        place = f"{path}:images[{index}]"
        record = expect(record, dict, "the image", place)
        image_id = record.get("id")
        if not isinstance(image_id, str):
            image_id = field(record, "id", int, place)
        names[image_id] = field(record, "file_name", str, place)

    def look_up(image_id: int | str, place: str) -> str:
        if image_id not in names:
            raise DataError(place, f"image_id {quote(image_id)}", f"an id of {path}")
        return names[image_id]

    return look_up
