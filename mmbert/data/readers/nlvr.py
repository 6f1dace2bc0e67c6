"""Readers of NLVR (lil.nlp.cornell.edu/nlvr, one image) and NLVR2 (arXiv:1811.00491, two images): true or false."""

from collections.abc import Mapping
from pathlib import Path

from mmbert.data.readers.base import ImageFolder, Problems
from mmbert.data.readers.labelled import LabelledExample, clean_text, find_images
from mmbert.data.readers.strict import field, iter_json_lines
from mmbert.errors import DataError, quote

LABELS: Mapping[str, str] = {"true": "true", "True": "true", "false": "false", "False": "false"}


def read_nlvr(
    path: Path, images: ImageFolder | None, problems: Problems, *, split: str | None = None
) -> list[LabelledExample]:
    """Read one `{"sentence", "label", "identifier": "SENTENCE-POSITION", "image"}` per line.

    The image's name and the position reveal the label, so an example holds the sentence and the image only.

    Raises:
        DataError: The file can't be read.
    """
    return _read(path, images, problems, split or "train", images_each=1)


def read_nlvr2(
    path: Path, images: ImageFolder | None, problems: Problems, *, split: str | None = None
) -> list[LabelledExample]:
    """Read one `{"identifier": "SPLIT-SET-PAIR-SENTENCE", "sentence", "label"}` per line.

    The images are `SPLIT-SET-PAIR-img0.png` and `-img1.png`, in a folder of the name in "directory" if there is one.

    Raises:
        DataError: The file can't be read.
    """
    return _read(path, images, problems, split or "train", images_each=2)


def _read(
    path: Path, images: ImageFolder | None, problems: Problems, split: str, *, images_each: int
) -> list[LabelledExample]:
    examples: list[LabelledExample] = []
    seen: dict[str, str] = {}
    for place, record in iter_json_lines(path, problems):
        with problems:
            identifier = field(record, "identifier", str, place)
            parts = identifier.split("-")
            if len(parts) != 2 * images_each:
                form = "SENTENCE-POSITION" if images_each == 1 else "SPLIT-SET-PAIR-SENTENCE"
                raise DataError(place, f"identifier {quote(identifier)}", form)
            if identifier in seen:
                raise DataError(place, f"identifier {quote(identifier)} again, as in {seen[identifier]}", "each once")
            seen[identifier] = place
            if images_each == 1:
                names, group = [field(record, "image", str, place)], parts[0]
            else:
                folder = f"{record['directory']}/" if "directory" in record else ""
                names = [f"{folder}{'-'.join(parts[:3])}-img{i}.png" for i in range(2)]
                group = "-".join((parts[0], parts[1], parts[3]))  # one statement about several pairs of images
            text = clean_text(field(record, "sentence", str, place), place)
            answers: tuple[str, ...] = ()
            if "label" in record:
                label = field(record, "label", str, place)
                if label not in LABELS:
                    raise DataError(place, f"label {quote(label)}", "true or false")
                answers = (LABELS[label],)
            files = find_images(images, names, place)
            examples.append(LabelledExample(files, text, answers, identifier, split, place, group=group))
    return examples
