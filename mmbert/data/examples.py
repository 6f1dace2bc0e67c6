"""Read annotation files of any known caption format."""

import inspect
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmbert.data.readers import FORMATS
from mmbert.data.readers.base import Example, ImageFolder, Problems
from mmbert.errors import UsageError, did_you_mean

__all__ = ["Example", "Problems", "read_examples"]

logger = logging.getLogger("mmbert")

PathLike = str | os.PathLike[str]
FIRST_SPLITS = ("train", "val", "test")


def read_examples(
    format: str,
    annotations: PathLike | Mapping[str, PathLike],
    images: PathLike | Mapping[str, PathLike],
    *,
    problems: Problems | None = None,
    **keys: Any,
) -> dict[str, list[Example]]:
    """Read all annotations of a data set; every image file is checked to exist inside its folder.

    Args:
        format: a name in `mmbert.data.readers.FORMATS`.
        annotations: one file, or {split: file}.
        images: folder of the images, or {split: folder} to go with {split: file}.
        problems: collects errors; pass one to set how many are listed (10 otherwise) or to read its notes.
        **keys: options of the format's reader, such as `caption_key`.

    Returns:
        split -> examples in the order of the file; train, val and test come first.

    Raises:
        DataError: something is wrong with the files; the message lists the first problems.
        UsageError: the format or a key is unknown, or keys contradict each other.
    """
    problems = Problems() if problems is None else problems
    splits: dict[str, list[Example]] = {}
    for example in gather_examples(format, annotations, images, problems, **keys):
        splits.setdefault(example.split, []).append(example)
    problems.raise_if_any()
    problems.log_notes()
    order = [name for name in FIRST_SPLITS if name in splits]
    return {name: splits[name] for name in [*order, *(name for name in splits if name not in order)]}


def gather_examples(
    format: str,
    annotations: PathLike | Mapping[str, PathLike],
    images: PathLike | Mapping[str, PathLike] | ImageFolder,
    problems: Problems,
    **keys: Any,
) -> list[Example]:
    """Read examples as `read_examples` does, but collect errors in `problems` instead of raising them.

    Args:
        format: as in `read_examples`, and so are `annotations` and `keys`.
        images: as in `read_examples`, or an `ImageFolder`.
        problems: receives errors.

    Returns:
        The valid examples in the order of the files.

    Raises:
        DataError: the folder of the images does not exist.
        UsageError: the format or a key is unknown, or keys contradict each other.
    """
    if format not in FORMATS:
        raise UsageError(f"format is {format!r}; expected {', '.join(FORMATS)}.{did_you_mean(format, FORMATS)}")
    reader = FORMATS[format]
    own = inspect.signature(reader).parameters.values()
    allowed = [option.name for option in own if option.kind is option.KEYWORD_ONLY and option.name != "split"]
    for key in keys:
        if key not in allowed:
            known = ", ".join(allowed) or "no options"
            raise UsageError(f"format {format} has no option {key!r}; expected {known}.{did_you_mean(key, allowed)}")

    gathered: list[Example] = []
    owner: dict[Path, Example] = {}
    for split, file, folder in _files(annotations, images):
        with problems:
            examples = reader(file, folder, problems, split=split, **keys)
            if not examples and not problems.total:
                problems.add(str(file), "no examples", "at least one image with a caption")
            for example in examples:
                first = owner.setdefault(example.image, example)
                # Test splits may share images; train and val may share none with any other split.
                if first.split != example.split and {first.split, example.split} & {"train", "val"}:
                    kind = f"images in {example.split} and another split"
                    found = f"the image of {first.place} again, now in {example.split}"
                    problems.note(kind, example.place, found, f"it in {first.split} only")
            gathered += examples
    return gathered


def _files(
    annotations: PathLike | Mapping[str, PathLike], images: PathLike | Mapping[str, PathLike] | ImageFolder
) -> list[tuple[str | None, Path, ImageFolder]]:
    """List (split or None, annotation file, image folder)."""
    if not isinstance(annotations, Mapping):
        if isinstance(images, Mapping):
            raise UsageError("images gives a folder per split; expected one folder, since annotations is one file")
        return [(None, Path(annotations), _folder(images))]
    if not annotations:
        raise UsageError("annotations is empty; expected a file, or a file for each split")
    if not isinstance(images, Mapping):
        folder = _folder(images)
        return [(split, Path(file), folder) for split, file in annotations.items()]
    if missing := [split for split in annotations if split not in images]:
        raise UsageError(f"images has no folder for the split {missing[0]!r}; expected one for each annotation file")
    return [(split, Path(file), ImageFolder(images[split])) for split, file in annotations.items()]


def _folder(images: PathLike | ImageFolder) -> ImageFolder:
    return images if isinstance(images, ImageFolder) else ImageFolder(images)
