"""Check an annotation file and its images without training: every error and remark with its place."""

import hashlib
import inspect
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mmbert.data.examples import FIRST_SPLITS, Problems, gather_examples
from mmbert.data.format_detection import DetectedFolder, detect_format, detect_keys, has_labels
from mmbert.data.images import BadImageError, load_image, read_content
from mmbert.data.labelled import TABLES
from mmbert.data.pairs import text_key
from mmbert.data.readers import FORMATS
from mmbert.data.readers.base import ImageFolder
from mmbert.data.readers.foils import read_foils
from mmbert.data.readers.strict import expect, load_json
from mmbert.data.readers.vqa import read_vqav2
from mmbert.errors import DataError, UsageError, describe, did_you_mean, printable, quote
from mmbert.runtime.signals import ignore_signals_in_worker

MAX_LISTED = 20
TASK_FORMATS = ("vqav2", "nlvr", "nlvr2", "foils", "boxes")
CHECKED_FORMATS = (*FORMATS, *TASK_FORMATS)
"""Formats of `check_file`; jsonl is for captions and for tasks."""
LABEL_OPTIONS = ("text_key", "label_key", "id_key")
"""Options that only labelled examples have."""
MIN_PARALLEL_IMAGES = 200
"""Fewer images are decoded by one process: others would take longer to start."""


class ImageRecord(NamedTuple):
    """An image of an annotation file, with its captions."""

    image: Path
    captions: tuple[str, ...]  # none where the text is a question, statement or foil, or where there is none
    split: str
    place: str


@dataclass(frozen=True)
class Report:
    """Errors and remarks of a check."""

    problems: list[str]
    """One line for each error or remark, in the order of the file, at most `MAX_LISTED`."""
    num_errors: int
    """All errors, listed or not: what stops training."""
    num_remarks: int
    """All remarks, listed or not: what training accepts, such as a repeated caption."""
    summary: str
    """One line: format, images, captions, splits, errors, remarks, seconds."""

    @property
    def total(self) -> int:
        """Number of errors and remarks."""
        return self.num_errors + self.num_remarks

    def lines(self) -> list[str]:
        """Return the lines, and the number of those that are not listed."""
        rest = self.total - len(self.problems)
        return [*self.problems, f"... and {rest:,} more problems"] if rest else self.problems


def check_file(
    file: str | os.PathLike[str],
    *,
    format: str | None = None,
    images: str | os.PathLike[str] | None = None,
    questions: str | os.PathLike[str] | None = None,
    image_names: str | None = None,
    **keys: Any,
) -> Report:
    """Read an annotation file of captions, a task, foils or boxes, decode its images, and list errors and remarks.

    Errors are what stops training, images that cannot be decoded included. Remarks are what training accepts: dropped
    empty captions, a caption twice for one image, image files with the same bytes or in two splits, missing labels.

    Args:
        file: the annotation file.
        format: a name in `CHECKED_FORMATS`; None: detected, see `mmbert.data.format_detection`.
        images: folder of the images; None: detected.
        questions: question file of vqav2, where `file` holds its annotations.
        image_names: how an image_id becomes a file name, see `image_name_formatter`.
        **keys: options of the format's reader; `image_key` and `caption_key` are detected where they are missing. A
            JSON-lines file is read as labelled examples of a task if one of `LABEL_OPTIONS` is given, or if its rows
            have text and label.

    Raises:
        UsageError: the format or a key is unknown, or vqav2 lacks an option.
    """
    if format is not None and format not in CHECKED_FORMATS:
        known, near = ", ".join(CHECKED_FORMATS), did_you_mean(format, CHECKED_FORMATS)
        raise UsageError(f"format is {format!r}; expected {known}.{near}")
    started = time.perf_counter()
    path = Path(file)
    remarks = Problems(MAX_LISTED)
    parts = [Problems(MAX_LISTED)]  # one for each step, so that none fills the list of another
    records: list[ImageRecord] = []
    counts = ""
    with parts[0]:
        try:
            format = format or detect_format(path)
            is_labelled = format in TASK_FORMATS or (format == "jsonl" and _is_labelled(path, keys))
            folder = DetectedFolder(path) if images is None else ImageFolder(images)
            reading, decoding = Problems(MAX_LISTED, remarks=remarks), Problems(MAX_LISTED)
            if is_labelled:
                records, counts = _read_task_records(format, path, folder, reading, questions, image_names, keys)
            else:
                if questions is not None or image_names is not None:
                    raise UsageError(f"--questions and --image_names are for tasks; format {format} has captions.")
                if format in ("jsonl", "csv"):
                    keys = detect_keys(path, format, keys)
                examples = gather_examples(format, path, folder, reading, **keys)
                records = [ImageRecord(e.image, e.captions, e.split, e.place) for e in examples]
                counts = f"{sum(len(example.captions) for example in examples):,} captions"
            if isinstance(folder, DetectedFolder):  # without a folder, other errors are of no use
                folder.raise_if_unsettled()
            parts += [reading, decoding]
            _check_images(records, folder.root, decoding, remarks)
        except OSError as error:  # the disk or the network goes away while the file is read
            raise DataError(str(path), f"cannot be read ({error.strerror})", "a readable file") from None
        except BrokenProcessPool:
            raise DataError(str(path), "a process that decodes its images was killed", "enough memory") from None
    num_errors = sum(part.total for part in parts)
    errors = [problem for part in parts for problem in part.listed][:MAX_LISTED]
    marked = [(place, f"remark: {found}", expected) for place, found, expected in remarks.listed]
    listed = sorted([*errors, *marked[: MAX_LISTED - len(errors)]], key=lambda problem: _position(problem[0], path))
    sizes = _sizes(format or "unknown format", records, counts)
    seconds = time.perf_counter() - started
    return Report(
        [printable(describe(*problem)) for problem in listed],
        num_errors,
        remarks.total,
        f"{sizes} | {num_errors:,} errors, {remarks.total:,} remarks | {seconds:.1f} s",
    )


def _is_labelled(path: Path, keys: dict[str, Any]) -> bool:
    """Return whether a JSON-lines file is read as labelled examples rather than captions."""
    if any(name in keys for name in LABEL_OPTIONS):
        return True
    return "caption_key" not in keys and has_labels(path)


def _read_task_records(
    format: str,
    path: Path,
    folder: ImageFolder,
    problems: Problems,
    questions: str | os.PathLike[str] | None,
    image_names: str | None,
    keys: dict[str, Any],
) -> tuple[list[ImageRecord], str]:
    """Read examples of a task, foils or boxes.

    Returns:
        Each image once, and the number of texts in words.
    """
    if format == "foils":
        foils = read_foils([path], folder, problems)
        records = [ImageRecord(foil.image, (), "test", foil.place) for foil in foils]
        return _distinct(records), f"{len(foils):,} foils"
    if format == "boxes":
        return _read_boxes(path, folder, problems)
    if format == "vqav2":
        if image_names is None:
            raise UsageError("--image_names is missing: vqav2 names no image files; such as COCO_val2014_{:012d}.jpg.")
        is_question_file = questions is None
        if is_question_file and "questions" not in expect(load_json(path), dict, "the file", str(path)):
            raise UsageError("--questions is missing: the question file of these annotations.")
        annotations = None if is_question_file else path
        examples = read_vqav2(
            Path(path if questions is None else questions), annotations, folder, split="train", image_names=image_names
        )
    else:
        if image_names is not None:
            keys = {**keys, "image_names": image_names}
        if format == "jsonl":
            found = detect_keys(
                path, "jsonl", {k: keys[k] for k in ("image_key", "text_key") if k in keys}, text="text_key"
            )
            keys = {**found, **keys}
        allowed = [*inspect.signature(TABLES[format]).parameters][4:]
        for key in keys:
            if key not in allowed:
                raise UsageError(f"format {format} of a task has no option {key!r}.{did_you_mean(key, allowed)}")
        examples = TABLES[format](path, folder, problems, **keys)
    if unlabelled := [example for example in examples if not example.answers]:
        found = f"{len(unlabelled):,} of {len(examples):,} examples have no label or answer"
        problems.note("unlabelled", unlabelled[0].place, found, "one for training; `mmbert predict` needs none")
    records = [ImageRecord(image, (), e.split, e.place) for e in examples for image in e.images]
    return _distinct(records), f"{len(examples):,} examples"


def _read_boxes(path: Path, folder: ImageFolder, problems: Problems) -> tuple[list[ImageRecord], str]:
    from mmbert.data.boxes import read_boxes  # with torch, which no other format needs here

    boxed = read_boxes([path], problems)
    records = []
    for entry in boxed.values():
        with problems:
            records.append(ImageRecord(folder.find(entry.file_name, entry.place)[0], (), "train", entry.place))
    classes = {name for entry in boxed.values() for name in entry.names}
    return records, f"{sum(len(entry.boxes) for entry in boxed.values()):,} boxes of {len(classes):,} classes"


def _distinct(records: Sequence[ImageRecord]) -> list[ImageRecord]:
    """Keep the first record of each image file in each split."""
    return [*{(record.image, record.split): record for record in reversed(records)}.values()][::-1]


def _check_images(records: Sequence[ImageRecord], root: str, errors: Problems, remarks: Problems) -> None:
    """Decode the images, and look for repeated images and captions."""
    seen: dict[bytes, ImageRecord] = {}
    for record, (digest, reason) in zip(records, _examine_all([r.image for r in records]), strict=True):
        name = quote(os.path.relpath(record.image, root), 200)
        if reason:
            found, _, expected = reason.partition("; expected ")
            errors.add(record.place, f"{name}: {found}", expected or "an image that can be decoded")
        elif (first := seen.setdefault(digest, record)) is not record:
            found = f"{name} has the same bytes as {quote(os.path.relpath(first.image, root), 200)} of {first.place}"
            if first.split == record.split:
                remarks.add(record.place, found, "each image once")
            else:
                found += f", which is in {first.split}, and this one in {record.split}"
                remarks.add(record.place, found, "each image in one split")
        captions: dict[int, int] = {}
        for number, caption in enumerate(record.captions, 1):
            if (first_number := captions.setdefault(text_key(caption), number)) != number:
                found = f"caption {number} of {name} is caption {first_number} again, {quote(caption)}"
                remarks.add(record.place, found, "each caption of an image once")


def _examine_all(files: Sequence[Path]) -> Iterator[tuple[bytes, str]]:
    """Yield what `_examine` returns for each file, in their order."""
    processes = min(8, os.cpu_count() or 1)
    if processes == 1 or len(files) < MIN_PARALLEL_IMAGES:
        yield from map(_examine, files)
        return
    pool = ProcessPoolExecutor(processes, initializer=ignore_signals_in_worker, initargs=(0,))
    try:
        yield from pool.map(_examine, files, chunksize=16)
    finally:
        pool.shutdown(cancel_futures=True)


def _examine(file: Path) -> tuple[bytes, str]:
    """Return the hash of an image file, and why it cannot be decoded ("" if it can)."""
    try:
        content = read_content(file)
        load_image(content)
    except BadImageError as error:
        return b"", error.reason
    except MemoryError:
        return b"", "too large for the memory of this machine"
    return hashlib.blake2b(content, digest_size=16).digest(), ""


def _position(place: str, file: Path) -> tuple[bool, list[int]]:
    """Compute the sort key of a place "FILE:RECORD"; problems of the whole file come first."""
    record = place.removeprefix(f"{file}:") if place.startswith(f"{file}:") else ""
    return record.startswith("annotations"), [int(number) for number in re.findall(r"\d+", record)]


def _sizes(format: str, records: Sequence[ImageRecord], counts: str) -> str:
    splits = Counter(record.split for record in records)
    order = sorted(splits, key=lambda split: (*FIRST_SPLITS, split).index(split))
    sizes = ", ".join(f"{splits[split]:,} {printable(split)}" for split in order) or "no splits"
    return f"{format} | {len(records):,} images | {counts or '0 captions'} | {sizes}"
