"""Strict readers of questions, human answers and predictions in the format of VQAv2 (visualqa.org)."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmbert.data.readers.base import ImageFolder, Problems
from mmbert.data.readers.image_names import image_name_formatter
from mmbert.data.readers.labelled import LabelledExample, clean_text, find_images
from mmbert.data.readers.strict import expect, field, load_json
from mmbert.errors import DataError, quote

log = logging.getLogger("mmbert")

ANSWERS_PER_QUESTION = 10
"""Human answers to each question of VQAv2."""


class Question(NamedTuple):
    """One question about an image."""

    image_id: int | str
    text: str
    place: str


class Annotation(NamedTuple):
    """Human answers to one question."""

    answers: list[dict[str, Any]]  # each with "answer"; complete records, since the official score compares them
    question_type: str
    answer_type: str
    most_frequent_answer: str  # "multiple_choice_answer", or "" where the file has none
    place: str


def read_questions(path: Path) -> dict[int, Question]:
    """Read `{"questions": [{"question_id", "image_id", "question"}]}`.

    Returns:
        question_id -> question, in the order of the file.

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
    """Read `{"annotations": [{"question_id", "answers": [{"answer"}], "question_type", "answer_type"}]}`.

    A question may have any number of answers; fewer than ten are counted in one warning.

    Returns:
        question_id -> human answers, in the order of the file.

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
                raise DataError(place, "no answers", "at least one answer")
            for i, answer in enumerate(answers):
                where = f"{place}.answers[{i}]"
                field(expect(answer, dict, "the answer", where), "answer", str, where)
            if len(answers) < ANSWERS_PER_QUESTION:
                few, first = few + 1, first or place
            most_frequent = expect(record.get("multiple_choice_answer") or "", str, "multiple_choice_answer", place)
            question_type = field(record, "question_type", str, place)
            answer_type = field(record, "answer_type", str, place)
            found[number] = Annotation(answers, question_type, answer_type, most_frequent, place)
    problems.raise_if_any()
    if few:
        log.warning("%s: fewer than %d answers to %d questions (first: %s)", path, ANSWERS_PER_QUESTION, few, first)
    return found


def read_results(path: Path, expected: Iterable[int]) -> dict[int, str]:
    """Read predictions in the format of the evaluation server, `[{"question_id", "answer"}]`.

    Args:
        path: The file.
        expected: Ids of the split; each must be answered once, and no other.

    Returns:
        question_id -> predicted answer.

    Raises:
        DataError: Something is wrong with the file; lists the first problems.
    """
    found: dict[int, str] = {}
    expected_ids = dict.fromkeys(expected)
    problems = Problems()
    top = expect(load_json(path), list, "the file", str(path))
    for index, record in enumerate(top):
        place = f"{path}:[{index}]"
        with problems:
            number = _new_id(expect(record, dict, "the prediction", place), found, place)
            if number not in expected_ids:
                raise DataError(place, f"question_id {number}", "a question of this split; is it the file of another?")
            found[number] = field(record, "answer", str, place)
    problems.raise_if_any()
    for number in expected_ids:
        if number not in found:
            problems.add(str(path), f"no answer to question_id {number}", "one for each question of the split")
    problems.raise_if_any()
    return found


def check_same_questions(questions: Mapping[int, Question], annotations: Mapping[int, Annotation]) -> None:
    """Check that questions and annotations are of one split.

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
    """Read the questions of one split with their images and, if there is an annotation file, the answers.

    Args:
        questions: Question file.
        annotations: Annotation file of the same split; None: questions without answers.
        images: Folder of the images.
        split: Name of the split.
        image_names: How an image_id becomes a file name, see `image_name_formatter`.

    Raises:
        DataError: Something is wrong with the files; lists the first problems.
    """
    by_id = read_questions(questions)
    annotated = {} if annotations is None else read_annotations(annotations)
    if annotations is not None:
        check_same_questions(by_id, annotated)
    name_of = image_name_formatter(image_names)
    examples, problems = [], Problems()
    for number, question in by_id.items():
        with problems:
            text = clean_text(question.text, question.place)
            files = find_images(images, [name_of(question.image_id, question.place)], question.place)
            known = annotated.get(number)
            answers = () if known is None else repeat_few_answers([a["answer"] for a in known.answers])
            examples.append(
                LabelledExample(
                    files, text, answers, number, split,
                    question.place, question_type="" if known is None else known.question_type,
                    answer_type="" if known is None else known.answer_type,
                    most_frequent_answer="" if known is None else known.most_frequent_answer,
                )
            )  # fmt: skip
    problems.raise_if_any()
    return examples


def repeat_few_answers(answers: Sequence[str]) -> tuple[str, ...]:
    """Repeat a short list of human answers to about ten, for which the official score is made.

    The official score of an answer is the mean of min(1, matches / 3) over all ways to leave one human answer out
    (arXiv:1505.00468): the only answer to a question scores 0. With 1, 2, 3, 4 or 5 answers the list is repeated 10, 5,
    3, 2 or 2 times, so an answer scores as the same fraction of ten people would: the only answer 1, one of two
    different answers 1, one of five 0.6. Six answers or more are left as they are.
    """
    return tuple(answers) * max(1, ANSWERS_PER_QUESTION // len(answers))


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
