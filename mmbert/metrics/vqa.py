"""VQA accuracy: that of the official script including its defects, and a clean variant.

The reference is vqaEval.py of GT-Vision-Lab/VQA (commit a013f00, 2021) as it runs under Python 3 once its print
statements are functions; see also VQA (arXiv:1505.00468). Its defects are commented where they are reproduced.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

MODES = ("official", "clean")
ARTICLES = frozenset(("a", "an", "the"))
NUMBERS: dict[str, str] = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
NUMBERS |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
PUNCTUATION = (";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!")
COMMA_IN_NUMBER = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")  # the script's look-behind is mistyped and always true
MOST_PERIODS = 32  # the script passes re.UNICODE, which is 32, where the number of replacements belongs
# Data of the official script, its spelling mistakes included. Copyright (c) 2014 Aishwarya Agrawal, BSD-2-Clause.
_TABLE = """
    aint:ain't arent:aren't cant:can't couldve:could've couldnt:couldn't couldn'tve:couldn't've
    couldnt've:couldn't've didnt:didn't doesnt:doesn't dont:don't hadnt:hadn't hadnt've:hadn't've hadn'tve:hadn't've
    hasnt:hasn't havent:haven't hed:he'd hed've:he'd've he'dve:he'd've hes:he's howd:how'd howll:how'll hows:how's
    Id've:I'd've I'dve:I'd've Im:I'm Ive:I've isnt:isn't itd:it'd itd've:it'd've it'dve:it'd've itll:it'll
    let's:let's maam:ma'am mightnt:mightn't mightnt've:mightn't've mightn'tve:mightn't've mightve:might've
    mustnt:mustn't mustve:must've neednt:needn't notve:not've oclock:o'clock oughtnt:oughtn't ow's'at:'ow's'at
    'ows'at:'ow's'at 'ow'sat:'ow's'at shant:shan't shed've:she'd've she'dve:she'd've she's:she's shouldve:should've
    shouldnt:shouldn't shouldnt've:shouldn't've shouldn'tve:shouldn't've somebody'd:somebodyd
    somebodyd've:somebody'd've somebody'dve:somebody'd've somebodyll:somebody'll somebodys:somebody's
    someoned:someone'd someoned've:someone'd've someone'dve:someone'd've someonell:someone'll someones:someone's
    somethingd:something'd somethingd've:something'd've something'dve:something'd've somethingll:something'll
    thats:that's thered:there'd thered've:there'd've there'dve:there'd've therere:there're theres:there's
    theyd:they'd theyd've:they'd've they'dve:they'd've theyll:they'll theyre:they're theyve:they've twas:'twas
    wasnt:wasn't wed've:we'd've we'dve:we'd've weve:we've werent:weren't whatll:what'll whatre:what're whats:what's
    whatve:what've whens:when's whered:where'd wheres:where's whereve:where've whod:who'd whod've:who'd've
    who'dve:who'd've wholl:who'll whos:who's whove:who've whyll:why'll whyre:why're whys:why's wont:won't
    wouldve:would've wouldnt:wouldn't wouldnt've:wouldn't've wouldn'tve:wouldn't've yall:y'all yall'll:y'all'll
    y'allll:y'all'll yall'd've:y'all'd've y'alld've:y'all'd've y'all'dve:y'all'd've youd:you'd youd've:you'd've
    you'dve:you'd've youll:you'll youre:you're youve:you've
"""
CONTRACTIONS: dict[str, str] = {short: full for short, _, full in (pair.partition(":") for pair in _TABLE.split())}


class AnsweredQuestion(NamedTuple):
    """One question with its annotated answers and the prediction."""

    question_id: int
    prediction: str
    answers: Sequence[Mapping[str, Any]]  # the annotation's records, each with "answer" and mostly "answer_id"
    question_type: str
    answer_type: str


@lru_cache(maxsize=1 << 18)
def normalize_answer(text: str) -> str:
    """Normalize an answer as the official script does: punctuation, articles, number words and contractions.

    A punctuation mark is deleted where it stands next to a space anywhere in the text, or where the text has a comma
    between digits anywhere; else it becomes a space.
    """
    out = text
    has_number = COMMA_IN_NUMBER.search(text) is not None
    for mark in PUNCTUATION:
        if mark in text:
            out = out.replace(mark, "" if has_number or f"{mark} " in text or f" {mark}" in text else " ")
    out = PERIOD.sub("", out, count=MOST_PERIODS)
    words = [NUMBERS.get(word, word) for word in out.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _strip(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def question_accuracy(prediction: str, answers: Sequence[Mapping[str, Any]], *, mode: str = "official") -> float:
    """Accuracy of one answer: the mean of min(1, matches / 3) over all ways to leave one annotated answer out.

    With ten answers m matches give 0, 0.3, 0.6, 0.9, 1, 1, ... The official mode normalises only where the
    annotated answers differ; where all ten say "black", "Black." is wrong. The clean mode always normalises.

    Args:
        prediction: Answer of the model.
        answers: Records of the annotation file. Each is left out together with those equal in every field, so records
            without "answer_id" count as one.
        mode: A name in `MODES`.

    Raises:
        ValueError: No answers, or an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}; allowed are {', '.join(MODES)}")
    if not answers:
        raise ValueError("no human answers to compare with")
    texts = [_strip(str(answer["answer"])) for answer in answers]
    predicted = _strip(prediction)
    if mode == "clean" or len(set(texts)) > 1:
        texts, predicted = [normalize_answer(text) for text in texts], normalize_answer(predicted)
    ids = [answer.get("answer_id") for answer in answers]
    total = 0.0
    if None not in ids and len(set(ids)) == len(ids):  # all records differ, so each leaves itself out
        matches = texts.count(predicted)
        if_other, if_same = min(1.0, matches / 3), min(1.0, (matches - 1) / 3)
        for text in texts:
            total += if_same if text == predicted else if_other
        return total / len(texts)
    rest = [{k: v for k, v in answer.items() if k != "answer"} for answer in answers]
    for i, text in enumerate(texts):
        others = (j for j, other in enumerate(texts) if other != text or rest[j] != rest[i])
        total += min(1.0, sum(texts[j] == predicted for j in others) / 3)
    return total / len(texts)


def vqa_accuracy(questions: Iterable[AnsweredQuestion], *, mode: str = "official") -> dict[str, Any]:
    """Compute the VQA accuracy of a split.

    Returns:
        `overall`, `perQuestionType` and `perAnswerType` in percent, with the official script's names and rounding.

    Raises:
        ValueError: No questions.
    """
    overall: list[float] = []
    by_question_type: dict[str, list[float]] = {}
    by_answer_type: dict[str, list[float]] = {}
    for question in questions:
        accuracy = question_accuracy(question.prediction, question.answers, mode=mode)
        overall.append(accuracy)
        by_question_type.setdefault(question.question_type, []).append(accuracy)
        by_answer_type.setdefault(question.answer_type, []).append(accuracy)
    if not overall:
        raise ValueError("there are no questions to score")
    return {
        "overall": _percent(overall),
        "perQuestionType": {name: _percent(values) for name, values in by_question_type.items()},
        "perAnswerType": {name: _percent(values) for name, values in by_answer_type.items()},
    }


def _percent(accuracies: list[float]) -> float:
    return round(100 * float(sum(accuracies)) / len(accuracies), 2)
