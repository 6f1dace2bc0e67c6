"""Read labelled examples of any known format."""

import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmbert.data.readers.base import ImageFolder, Problems
from mmbert.data.readers.easy_vqa import package_folder, read_easy_vqa
from mmbert.data.readers.labelled import LabelledExample, read_labelled_jsonl
from mmbert.data.readers.nlvr import read_nlvr, read_nlvr2
from mmbert.data.readers.vqa import read_vqav2
from mmbert.errors import UsageError, did_you_mean

log = logging.getLogger("mmbert")

__all__ = ["LABELLED_FORMATS", "LabelledExample", "read_labelled"]

TABLES: dict[str, Any] = {"jsonl": read_labelled_jsonl, "nlvr": read_nlvr, "nlvr2": read_nlvr2}
"""Formats of one annotation file per split; a reader takes (path, images, problems, *, split, its own keys)."""
LABELLED_FORMATS = ("vqav2", "easy_vqa", *TABLES)

Files = str | Mapping[str, str]


def read_labelled(
    format: str, annotations: Files, images: Files, *, questions: Files = "", image_names: Files = "", **keys: Any
) -> dict[str, list[LabelledExample]]:
    """Read all labelled examples of a data set.

    Args:
        format: A name in `LABELLED_FORMATS`.
        annotations: One file with a split for each record, or {split: file}; for easy_vqa the data folder of the
            package, or "" for the installed one.
        images: Folder of the images, or {split: folder}; "" where the texts have none.
        questions: vqav2's question files, {split: file}.
        image_names: How an image_id becomes a file name, for all or {split: template or file}; see
            `image_name_formatter`.
        **keys: Options of the format's reader.

    Returns:
        split -> examples in the order of the file.

    Raises:
        DataError: Something is wrong with the files; the message lists the first problems.
        UsageError: The format or an option is unknown, or options contradict each other.
    """
    if format not in LABELLED_FORMATS:
        known = ", ".join(LABELLED_FORMATS)
        hint = did_you_mean(format, LABELLED_FORMATS)
        raise UsageError(f"data.format={format!r} is not known for tasks; allowed are {known}.{hint}")
    of_format = {"vqav2": ["questions", "image_names"], "easy_vqa": []}
    allowed = of_format[format] if format in of_format else list(inspect.signature(TABLES[format]).parameters)[4:]
    files = {name: value for name, value in (("questions", questions), ("image_names", image_names)) if value}
    for name in {**keys, **files}:
        if name not in allowed:
            known = ", ".join(allowed) or "none"
            raise UsageError(f"data.{name}: format {format} has no such option; it has {known}.")
    if format == "easy_vqa":
        if not isinstance(annotations, str):
            raise UsageError("data.annotations: easy_vqa takes the data folder of the package, or nothing.")
        examples = read_easy_vqa(Path(annotations) if annotations else package_folder())
    elif format == "vqav2":
        examples = _read_vqav2(annotations, images, questions, image_names)
    else:
        examples = _read_tables(format, annotations, images, image_names, keys)
    splits: dict[str, list[LabelledExample]] = {}
    for example in examples:
        splits.setdefault(example.split, []).append(example)
    _warn_shared_images(splits)
    return splits


def _read_vqav2(annotations: Files, images: Files, questions: Files, image_names: Files) -> list[LabelledExample]:
    if not isinstance(annotations, Mapping) or not isinstance(questions, Mapping) or not image_names:
        raise UsageError(
            "vqav2 needs data.questions and data.annotations as {split: file}, and data.image_names, "
            "a template such as COCO_val2014_{:012d}.jpg or a COCO file that names the images."
        )
    if set(questions) != set(annotations):
        raise UsageError(f"data.questions has {sorted(questions)}, data.annotations {sorted(annotations)}.")
    examples = []
    for split in annotations:
        folder = ImageFolder(_for_split(images, split, "images"))
        names = _for_split(image_names, split, "image_names")
        examples += read_vqav2(Path(questions[split]), Path(annotations[split]), folder, split=split, image_names=names)
    return examples


def _read_tables(
    format: str, annotations: Files, images: Files, image_names: Files, keys: dict[str, Any]
) -> list[LabelledExample]:
    reader = TABLES[format]
    problems, examples = Problems(), []
    for split, file in annotations.items() if isinstance(annotations, Mapping) else [(None, annotations)]:
        folder = ImageFolder(_for_split(images, split, "images")) if images else None
        if image_names:
            keys["image_names"] = _for_split(image_names, split, "image_names")
        with problems:
            found = reader(Path(file), folder, problems, split=split, **keys)
            if not found and not problems.total:
                problems.add(file, "no examples", "at least one")
            examples += found
    problems.raise_if_any()
    return examples


def _for_split(value: Files, split: str | None, name: str) -> str:
    """Return the value of an option for one split."""
    if not isinstance(value, Mapping):
        return value
    if split is None or split not in value:
        raise UsageError(f"data.{name} has nothing for the split {split!r}; it has {sorted(value)}.")
    return value[split]


def _warn_shared_images(splits: dict[str, list[LabelledExample]]) -> None:
    """Warn of images of train or val that are in another split too: its metrics may be too good."""
    owner: dict[Path, LabelledExample] = {}
    for name in ("train", "val"):
        for example in splits.get(name, ()):
            for image in example.images:
                owner.setdefault(image, example)
    shared = [
        (example, owner[image])
        for name, examples in splits.items()
        for example in examples
        for image in example.images
        if image in owner and owner[image].split != name
    ]
    if shared:
        example, first = shared[0]
        log.warning(
            "%s examples have an image that is in train or val and another split too (first: %s, as in %s)",
            f"{len(shared):,}", example.place, first.place,
        )  # fmt: skip
