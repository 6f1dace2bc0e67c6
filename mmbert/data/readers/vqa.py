"""Questions, human answers and predictions in the format of VQAv2 (visualqa.org), read strictly."""

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mmbert.data.readers.base import ImageFolder, Problems
from mmbert.data.readers.labelled import LabelledExample, clean_text, find_images
from mmbert.data.readers.strict import expect, field, load_json
from mmbert.errors import DataError, quote

log = logging.getLogger("mmbert")

ANSWERS_PER_QUESTION = 10
"""Human answers to each question of VQAv2."""


class Question(NamedTuple):
    """A question about an image."""

    image_id: int | str
    text: str
    place: str


class Annotation(NamedTuple):
    """What people answered to a question."""

    answers: list[dict[str, Any]]  # each with "answer"; kept whole, since the official score compares whole records
    question_type: str
    answer_type: str
    most_frequent_answer: str  # "multiple_choice_answer", or "" where the file has none
    place: str


def read_questions(path: Path) -> dict[int, Question]:
    """Reads `{"questions": [{"question_id", "image_id", "question"}]}`; ids in the order of the file.

    Raises:
        DataError: Something is wrong with the file; lists the first problems.
    """
    found: dict[int, Question] = {}
    problems = Problems()
    for index, record in enumerate(_records(path, "questions")):
        place = f"{path}:questions[{index}]"
        with problems:
            number = _new_id(record, found, place)
            image_id = record.get("image_id")
            if isinstance(image_id, bool) or not isinstance(image_id, int | str):
                image_id = field(record, "image_id", int, place)
            found[number] = Question(image_id, field(record, "question", str, place), place)
    problems.raise_if_any()
    return found


def read_annotations(path: Path) -> dict[int, Annotation]:
    """Reads `{"annotations": [{"question_id", "answers": [{"answer"}], "question_type", "answer_type"}]}`.

    Fewer than ten answers are taken as they are, with one warning.

    Raises:
        DataError: Something is wrong with the file; lists the first problems.
    """
    found: dict[int, Annotation] = {}
    problems, few, first = Problems(), 0, ""
    for index, record in enumerate(_records(path, "annotations")):
        place = f"{path}:annotations[{index}]"
        with problems:
            number = _new_id(record, found, place)
            answers = field(record, "answers", list, place)
            if not answers:
                raise DataError(place, "no answers", f"the answers of {ANSWERS_PER_QUESTION} people")
            for i, answer in enumerate(answers):
                where = f"{place}.answers[{i}]"
                field(expect(answer, dict, "the answer", where), "answer", str, where)
            if len(answers) < ANSWERS_PER_QUESTION:
                few, first = few + 1, first or place
            common = expect(record.get("multiple_choice_answer") or "", str, "multiple_choice_answer", place)
            kinds = (field(record, "question_type", str, place), field(record, "answer_type", str, place))
            found[number] = Annotation(answers, kinds[0], kinds[1], common, place)
    problems.raise_if_any()
    if few:
        log.warning("%s: fewer than %d answers to %d questions (first: %s)", path, ANSWERS_PER_QUESTION, few, first)
    return found


def read_results(path: Path, expected: Iterable[int]) -> dict[int, str]:
    """Reads predictions as the evaluation server takes them, `[{"question_id", "answer"}]`.

    Args:
        path: The file.
        expected: Ids of the split; each must be answered once, and no other.

    Raises:
        DataError: Something is wrong with the file; lists the first problems.
    """
    found: dict[int, str] = {}
    wanted = dict.fromkeys(expected)
    problems = Problems()
    top = expect(load_json(path), list, "the file", str(path))
    for index, record in enumerate(top):
        place = f"{path}:[{index}]"
        with problems:
            number = _new_id(expect(record, dict, "the prediction", place), found, place)
            if number not in wanted:
                raise DataError(place, f"question_id {number}", "a question of this split; is it the file of another?")
            found[number] = field(record, "answer", str, place)
    problems.raise_if_any()
    for number in wanted:
        if number not in found:
            problems.add(str(path), f"no answer to question_id {number}", "one for each question of the split")
    problems.raise_if_any()
    return found


def check_same_questions(questions: Mapping[int, Question], annotations: Mapping[int, Annotation]) -> None:
    """Questions and annotations must be of one split.

    Raises:
        DataError: An id is in one file only.
    """
    for number, annotation in annotations.items():
        if number not in questions:
            raise DataError(annotation.place, f"question_id {number}", "a question of the question file")
    for number, question in questions.items():
        if number not in annotations:
            raise DataError(question.place, f"question_id {number}", "one that the annotation file answers")


def read_vqav2(
    questions: Path, annotations: Path | None, images: ImageFolder, *, split: str, image_names: str
) -> list[LabelledExample]:
    """Reads the questions of one split with their images and, if they are known, the answers.

    Args:
        questions: Question file.
        annotations: Annotation file of the same split; None: the answers are not known.
        images: Folder of the images.
        split: Name of the split.
        image_names: How an image_id becomes a file name, see `image_name_formatter`.

    Raises:
        DataError: Something is wrong with the files; lists the first problems.
    """
    asked = read_questions(questions)
    answered = {} if annotations is None else read_annotations(annotations)
    if annotations is not None:
        check_same_questions(asked, answered)
    name_of = image_name_formatter(image_names)
    examples, problems = [], Problems()
    for number, question in asked.items():
        with problems:
            text = clean_text(question.text, question.place)
            files = find_images(images, [name_of(question.image_id, question.place)], question.place)
            known = answered.get(number)
            examples.append(
                LabelledExample(
                    files, text, () if known is None else tuple(a["answer"] for a in known.answers), number, split,
                    question.place, question_type="" if known is None else known.question_type,
                    answer_type="" if known is None else known.answer_type,
                    most_frequent_answer="" if known is None else known.most_frequent_answer,
                )
            )  # fmt: skip
    problems.raise_if_any()
    return examples


def image_name_formatter(image_names: str) -> Callable[[int | str, str], str]:
    """Gives the function (image_id, place) -> file name.

    Args:
        image_names: A template such as "COCO_val2014_{:012d}.jpg", or a JSON file whose list "images" has "id" and
            "file_name", as COCO's caption files.

    Raises:
        DataError: The file can't be read; and the function, where an id has no name.
    """
    if not image_names.endswith(".json"):

        def by_template(image_id: int | str, place: str) -> str:
            try:
                return image_names.format(image_id)
            except (ValueError, IndexError, KeyError) as error:
                found = f"image_id {quote(image_id)} does not fit image_names={image_names!r} ({error})"
                raise DataError(place, found, "a template such as COCO_val2014_{:012d}.jpg") from None

        return by_template
    path = Path(image_names)
    names: dict[Any, str] = {}
    top = expect(load_json(path), dict, "the file", str(path))
    for index, record in enumerate(field(top, "images", list, str(path))):
        place = f"{path}:images[{index}]"
        record = expect(record, dict, "the image", place)
        names[record.get("id")] = field(record, "file_name", str, place)

    def by_file(image_id: int | str, place: str) -> str:
        if image_id not in names:
            raise DataError(place, f"image_id {quote(image_id)}", f"one that {path} names")
        return names[image_id]

    return by_file


def _records(path: Path, key: str) -> list[dict[str, Any]]:
    top = expect(load_json(path), dict, "the file", str(path))
    records = field(top, key, list, str(path))
    if not records:
        raise DataError(f"{path}:{key}", "an empty list", "at least one question")
    for index, record in enumerate(records):
        expect(record, dict, "the record", f"{path}:{key}[{index}]")
    return records


def _new_id(record: dict[str, Any], found: Mapping[int, object], place: str) -> int:
    number = field(record, "question_id", int, place)
    if number in found:
        raise DataError(place, f"question_id {quote(number)} again", "each question once")
    return number
