"""Labelled examples of tasks (text, images, label), and their reader of JSON lines."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmbert.data.readers.base import ImageFolder, Problems, clean_caption, json_type
from mmbert.data.readers.image_names import image_name_formatter
from mmbert.data.readers.strict import iter_json_lines, missing_key
from mmbert.data.readers.table import Splits
from mmbert.errors import DataError, quote


@dataclass(frozen=True, slots=True)
class LabelledExample:
    """One text with its images and its label or human answers."""

    images: tuple[Path, ...]
    """Image files as in `Example.image`: one; two for NLVR2; none for text alone."""
    text: str
    answers: tuple[str, ...]
    """The label; or for VQA the human answers, see `mmbert.data.readers.vqa.repeat_few_answers`. Empty: unlabelled."""
    key: int | str
    """Question id or identifier, unique in its split."""
    split: str
    place: str
    """Record of the file, "FILE:RECORD", for messages."""
    group: str = ""
    """Shared by the examples of one statement, for the metric consistency."""
    question_type: str = ""
    """Question type of VQAv2, such as "what color is the"; "" where there is none."""
    answer_type: str = ""
    """Answer type of VQAv2: "yes/no", "number" or "other"; "" where there is none."""
    most_frequent_answer: str = ""
    """Answer that most annotators gave; "" where the file has none."""

    @property
    def image(self) -> Path:
        """The first image, for messages."""
        return self.images[0] if self.images else Path("no image")

    @property
    def contents(self) -> tuple[str, ...]:
        """Strings that identify the example, for the checksum of the training data."""
        return (*(image.name for image in self.images), self.text, *self.answers)


def find_images(images: ImageFolder | None, names: Sequence[str], place: str) -> tuple[Path, ...]:
    """Find the image files called `names`.

    Raises:
        DataError: There is no such file, or no folder was given.
    """
    if images is None:
        if names:
            raise DataError(place, f"the image {quote(names[0])}", "no images, since data.images is not set")
        return ()
    return tuple(images.find(name, place)[0] for name in names)


def clean_text(text: object, place: str) -> str:
    """Return the text without white space at its ends.

    Raises:
        DataError: It is no text, or empty.
    """
    found = clean_caption(text, place)
    if not found:
        raise DataError(place, "an empty text", "a text")
    return found


def read_labelled_jsonl(
    path: Path,
    images: ImageFolder | None,
    problems: Problems,
    *,
    split: str | None = None,
    image_key: str | Sequence[str] | None = "image",
    image_names: str | None = None,
    text_key: str = "text",
    label_key: str | None = "label",
    id_key: str | None = None,
    split_key: str | None = None,
    split_values: Mapping[str, Sequence[str]] | None = None,
) -> list[LabelledExample]:
    """Read one JSON object per line: SNLI-VE, Hateful Memes, VSR, or your own.

    Args:
        path: The file.
        images: Folder of the images; None for text alone.
        problems: Receives errors.
        split: The split of all rows.
        image_key: Key of the image's name; a list of keys for several images; None for text alone.
        image_names: How a value becomes a file name, such as "{}.jpg" for SNLI-VE's Flickr30K_ID; see
            `image_name_formatter`.
        text_key: Key of the text.
        label_key: Key of the label, a string, a whole number or true/false; a row without it has no label. None: labels
            are not read.
        id_key: Key of the row's id in predictions; None: its number in the file, from 0.
        split_key: As in `read_jsonl`.
        split_values: As in `read_jsonl`.

    Raises:
        DataError: The file can't be read.
        UsageError: Options contradict each other, or an invalid template.
    """
    name_of = None if image_names is None else image_name_formatter(image_names)
    splits = Splits(path, split, split_key, split_values)
    keys = [] if image_key is None or images is None else [image_key] if isinstance(image_key, str) else [*image_key]
    examples: list[LabelledExample] = []
    seen: dict[int | str, str] = {}
    for number, (place, record) in enumerate(iter_json_lines(path, problems)):
        with problems:
            name = splits.of(record, place)
            ids = [_plain(record, key, place) for key in keys]
            files = find_images(images, [str(i) if name_of is None else name_of(i, place) for i in ids], place)
            if text_key not in record:
                raise missing_key(text_key, record, place)
            text = clean_text(record[text_key], place)
            key = number if id_key is None else _plain(record, id_key, place)
            if key in seen:
                raise DataError(place, f"{id_key} {quote(key)} again, as in {seen[key]}", "each row once")
            seen[key] = place
            answers = ()
            if label_key is not None and record.get(label_key) is not None:
                answers = (str(_plain(record, label_key, place)),)
            examples.append(LabelledExample(files, text, answers, key, name, place))
    splits.report_unused(problems)
    return examples


def _plain(record: dict[str, Any], key: str, place: str) -> int | str:
    """Return a string, a whole number, or true/false as "true"/"false"."""
    if key not in record:
        raise missing_key(key, record, place)
    value = record[key]
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, int | str):
        raise DataError(place, f"{key} is {json_type(value)}", "a string or a whole number")
    return value.strip() if isinstance(value, str) else value
