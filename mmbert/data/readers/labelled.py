"""Texts with images and a label: the example that all such readers make, and the reader of JSON lines."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmbert.data.readers.base import ImageFolder, Problems, clean_caption, json_type
from mmbert.data.readers.strict import iter_json_lines, missing_key
from mmbert.data.readers.table import Splits
from mmbert.errors import DataError, quote


@dataclass(frozen=True, slots=True)
class LabelledExample:
    """One text, the images it is about, and what people said of it."""

    images: tuple[Path, ...]
    """Image files as in `Example.image`: one; two for NLVR2; none for text alone."""
    text: str
    answers: tuple[str, ...]
    """The label; or what each person answered, in the order of the file. Empty: not known."""
    key: int | str
    """Question id or identifier, unique in its split."""
    split: str
    place: str
    """Where the file says so, "FILE:RECORD", for messages."""
    group: str = ""
    """Examples of one statement, which are consistent if all are right."""
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
        """What makes this example another one than any other."""
        return (*(image.name for image in self.images), self.text, *self.answers)


def find_images(images: ImageFolder | None, names: Sequence[str], place: str) -> tuple[Path, ...]:
    """The files of the images called `names`.

    Raises:
        DataError: There is no such file, or no folder was given.
    """
    if images is None:
        if names:
            raise DataError(place, f"the image {quote(names[0])}", "no images, as data.images names no folder")
        return ()
    return tuple(images.find(name, place)[0] for name in names)


def clean_text(text: object, place: str) -> str:
    """A text that is not empty.

    Raises:
        DataError: It is no text, or there is nothing in it.
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
    label_key: str = "label",
    id_key: str | None = None,
    split_key: str | None = None,
    split_values: Mapping[str, Sequence[str]] | None = None,
) -> list[LabelledExample]:
    """Reads one JSON object a line: SNLI-VE, Hateful Memes, VSR, or your own.

    Args:
        path: The file.
        images: Folder of the images; None for text alone.
        problems: Receives what is wrong.
        split: The whole file is this split.
        image_key: Key of the image's name; a list of keys for several images; None for text alone.
        image_names: What a name is made of, such as "{}.jpg" for SNLI-VE's Flickr30K_ID.
        text_key: Key of the text.
        label_key: Key of the label, a string, a whole number or true/false. A row without it has no label.
        id_key: Key of what names the row in predictions; None: its number in the file, from 0.
        split_key: As in `read_jsonl`.
        split_values: As in `read_jsonl`.

    Raises:
        DataError: The file as a whole can't be read.
        UsageError: Options contradict each other.
    """
    splits = Splits(path, split, split_key, split_values)
    keys = [] if image_key is None or images is None else [image_key] if isinstance(image_key, str) else [*image_key]
    examples: list[LabelledExample] = []
    seen: dict[int | str, str] = {}
    for number, (place, record) in enumerate(iter_json_lines(path, problems)):
        with problems:
            name = splits.of(record, place)
            files = find_images(images, [_name(record, key, image_names, place) for key in keys], place)
            if text_key not in record:
                raise missing_key(text_key, record, place)
            text = clean_text(record[text_key], place)
            key = number if id_key is None else _plain(record, id_key, place)
            if key in seen:
                raise DataError(place, f"{id_key} {quote(key)} again, as in {seen[key]}", "each row once")
            seen[key] = place
            answers = (str(_plain(record, label_key, place)),) if record.get(label_key) is not None else ()
            examples.append(LabelledExample(files, text, answers, key, name, place))
    splits.report_unused(problems)
    return examples


def _name(record: dict[str, Any], key: str, template: str | None, place: str) -> str:
    name = str(_plain(record, key, place))
    return name if template is None else template.format(name)


def _plain(record: dict[str, Any], key: str, place: str) -> int | str:
    """A string, a whole number, or true/false as "true"/"false"."""
    if key not in record:
        raise missing_key(key, record, place)
    value = record[key]
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, int | str):
        raise DataError(place, f"{key} is {json_type(value)}", "a string or a whole number")
    return value.strip() if isinstance(value, str) else value
