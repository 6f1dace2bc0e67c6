"""Reader of foils in the format of SugarCrepe (arXiv:2306.14610): an image, its caption, and a false caption."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmbert.data.readers.base import ImageFolder, Problems, clean_caption
from mmbert.data.readers.strict import expect, field, load_json, missing_key
from mmbert.errors import DataError


class Foil(NamedTuple):
    """One image with its caption and a false caption."""

    image: Path
    caption: str
    foil: str
    category: str
    file: str
    place: str


def read_foils(files: Sequence[Path], images: ImageFolder, problems: Problems | None = None) -> list[Foil]:
    """Read `{"ID": {"filename", "caption", "negative_caption"[, "category"]}}`.

    Args:
        files: One file or more, read in their order; a file's name is the category of records without one.
        images: Folder of the images.
        problems: Receives errors instead of raising them.

    Raises:
        DataError: Something is wrong with a file; lists the first problems.
    """
    raises = problems is None
    problems = Problems() if problems is None else problems
    foils = []
    for path in files:
        with problems:
            records = expect(load_json(path), dict, "the file", str(path))
            if not records:
                raise DataError(str(path), "no records", "at least one image with caption and negative_caption")
            for key, record in records.items():
                with problems:
                    foils.append(_foil(path, f"{path}:{key}", record, images, problems))
    if raises:
        problems.raise_if_any()
        problems.log_notes()
    return foils


def _foil(path: Path, place: str, record: object, images: ImageFolder, problems: Problems) -> Foil:
    record = expect(record, dict, "the record", place)
    image, _ = images.find(field(record, "filename", str, place), place)
    caption, foil = _text(record, "caption", place), _text(record, "negative_caption", place)
    if caption == foil:  # it counts as wrong, as in SugarCrepe's own script
        problems.note("foils equal to their caption", place, "a foil equal to its caption", "another text")
    category = field(record, "category", str, place) if "category" in record else path.stem
    return Foil(image, caption, foil, category or path.stem, str(path), place)


def _text(record: dict[str, Any], key: str, place: str) -> str:
    if key not in record:
        raise missing_key(key, record, place)
    text = clean_caption(record[key], place)
    if not text:
        raise DataError(place, f"an empty {key}", "text")
    return text
