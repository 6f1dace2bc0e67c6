"""Check an annotation file and its images without training: every problem with its place."""

import hashlib
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmbert.data.examples import FIRST_SPLITS, Example, Problems, gather_examples
from mmbert.data.format_detection import DetectedFolder, detect_format, detect_keys
from mmbert.data.images import BadImageError, load_image, read_content
from mmbert.data.pairs import text_key
from mmbert.data.readers.base import ImageFolder
from mmbert.errors import DataError, describe, printable, quote
from mmbert.runtime.signals import ignore_signals_in_worker

MAX_LISTED = 20
MIN_PARALLEL_IMAGES = 200
"""So many are decoded before other processes would have started."""


@dataclass(frozen=True)
class Report:
    """What a check found."""

    problems: list[str]
    """One line each, in the order of the file, at most `MAX_LISTED`."""
    total: int
    """All problems, listed or not."""
    summary: str
    """One line: format, images, captions, splits, seconds."""

    def lines(self) -> list[str]:
        """The problems, and how many more there are."""
        rest = self.total - len(self.problems)
        return [*self.problems, f"... and {rest:,} more problems"] if rest else self.problems


def check_file(
    file: str | os.PathLike[str],
    *,
    format: str | None = None,
    images: str | os.PathLike[str] | None = None,
    **keys: Any,
) -> Report:
    """Read an annotation file, decode its images, and list what is wrong.

    Besides what stops training these are problems: empty captions, images that cannot be decoded, a caption twice
    for one image, and image files with the same bytes.

    Args:
        file: the annotation file.
        format: a name in `mmbert.data.readers.FORMATS`; None: guessed (`mmbert.data.format_detection`).
        images: folder of the images; None: guessed.
        **keys: options of the format's reader; `image_key` and `caption_key` are guessed where they are missing.

    Raises:
        UsageError: the format or a key is unknown.
    """
    started = time.perf_counter()
    path = Path(file)
    parts = [Problems(MAX_LISTED)]  # what each step found, so that none takes another's room in the list
    examples: list[Example] = []
    with parts[0]:
        try:
            format = format or detect_format(path)
            if format == "csv" and path.suffix.lower() == ".tsv":
                keys["delimiter"] = "\t"
            if format in ("jsonl", "csv"):
                keys = detect_keys(path, format, keys)
            folder = DetectedFolder(path) if images is None else ImageFolder(images)
            reading, looking = Problems(MAX_LISTED, strict=True), Problems(MAX_LISTED)
            examples = gather_examples(format, path, folder, reading, **keys)
            if isinstance(folder, DetectedFolder):  # without a folder, what else was found says little
                folder.raise_if_unsettled()
            parts += [reading, looking]
            _look(examples, folder.root, looking)
        except OSError as error:  # the disk or the network goes away while the file is read
            raise DataError(str(path), f"cannot be read ({error.strerror})", "a readable file") from None
        except BrokenProcessPool:
            raise DataError(str(path), "a process that decodes its images was killed", "enough memory") from None
    listed = sorted((p for part in parts for p in part.listed), key=lambda problem: _position(problem[0], path))
    return Report(
        [printable(describe(*problem)) for problem in listed[:MAX_LISTED]],
        sum(part.total for part in parts),
        _summary(format or "unknown format", examples, time.perf_counter() - started),
    )


def _look(examples: Sequence[Example], root: str, problems: Problems) -> None:
    """Check images and captions of what the reader accepted; no two examples of one file share an image file."""
    seen: dict[bytes, Example] = {}
    for example, (digest, reason) in zip(examples, _examine_all([e.image for e in examples]), strict=True):
        name = quote(os.path.relpath(example.image, root), 200)
        if reason:
            found, _, expected = reason.partition("; expected ")
            problems.add(example.place, f"{name}: {found}", expected or "an image that can be decoded")
        elif (first := seen.setdefault(digest, example)) is not example:
            found = f"{name} has the same bytes as {quote(os.path.relpath(first.image, root), 200)} of {first.place}"
            if first.split == example.split:
                problems.add(example.place, found, "each image once")
            else:
                found += f", which is in {first.split}, and this one in {example.split}"
                problems.add(example.place, found, "each image in one split")
        captions: dict[int, int] = {}
        for number, caption in enumerate(example.captions, 1):
            if (first_number := captions.setdefault(text_key(caption), number)) != number:
                found = f"caption {number} of {name} is caption {first_number} again, {quote(caption)}"
                problems.add(example.place, found, "each caption of an image once")


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
    """Where in the file "FILE:RECORD" is, to sort by; what is said of the whole file comes first."""
    record = place.removeprefix(f"{file}:") if place.startswith(f"{file}:") else ""
    return record.startswith("annotations"), [int(number) for number in re.findall(r"\d+", record)]


def _summary(format: str, examples: Sequence[Example], seconds: float) -> str:
    splits = Counter(example.split for example in examples)
    order = sorted(splits, key=lambda split: (*FIRST_SPLITS, split).index(split))
    captions = sum(len(example.captions) for example in examples)
    sizes = ", ".join(f"{splits[split]:,} {printable(split)}" for split in order) or "no splits"
    return f"{format} | {len(examples):,} images | {captions:,} captions | {sizes} | {seconds:.1f} s"
