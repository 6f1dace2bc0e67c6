"""Reader of easy-VQA (github.com/vzhou842/easy-VQA), as the package `easy-vqa` on PyPI holds it: 13 answers."""

import importlib.util
from pathlib import Path
from typing import Any

from mmbert.data.readers.base import ImageFolder, Problems
from mmbert.data.readers.labelled import LabelledExample, clean_text, find_images
from mmbert.data.readers.strict import expect, load_json
from mmbert.data.readers.vqa import repeat_few_answers
from mmbert.errors import DataError, UsageError

VALIDATION_FROM = 3800
"""First of the 4,000 training images that are used for validation: the package has no validation split."""


def package_folder() -> Path:
    """Find the data folder of the installed package without importing it.

    Raises:
        UsageError: It is not installed.
    """
    found = importlib.util.find_spec("easy_vqa")
    if found is None or not found.submodule_search_locations:
        raise UsageError("data.format=easy_vqa: the package easy-vqa is not installed; pip install 'mmbert[easy-vqa]'.")
    return Path(next(iter(found.submodule_search_locations))) / "data"


def read_easy_vqa(folder: Path) -> list[LabelledExample]:
    """Read `{train,test}/questions.json`, lists of [question, answer, image number], and `images/NUMBER.png`.

    Each question has one answer, which counts as that of ten people; see `repeat_few_answers`.

    Raises:
        DataError: Something is wrong with the files; lists the first problems.
    """
    problems = Problems()
    examples = []
    for part in ("train", "test"):
        path, images = folder / part / "questions.json", ImageFolder(folder / part / "images")
        for number, row in enumerate(expect(load_json(path), list, "the file", str(path))):
            place = f"{path}:[{number}]"
            with problems:
                question, answer, image = _row(row, place)
                split = "val" if part == "train" and image >= VALIDATION_FROM else part
                answer_type = "yes/no" if answer in ("yes", "no") else "other"
                files = find_images(images, [f"{image}.png"], place)
                examples.append(
                    LabelledExample(
                        files, question, repeat_few_answers([answer]), number, split, place,
                        question_type=" ".join(question.split()[:2]), answer_type=answer_type,
                        most_frequent_answer=answer,
                    )
                )  # fmt: skip
    problems.raise_if_any()
    return examples


def _row(row: Any, place: str) -> tuple[str, str, int]:
    if not isinstance(row, list) or len(row) != 3:
        raise DataError(place, f"{row!r:.60}", "[question, answer, image number]")
    return clean_text(row[0], place), clean_text(row[1], place), expect(row[2], int, "the image", place)
