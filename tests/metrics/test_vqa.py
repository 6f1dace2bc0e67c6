"""VQA accuracy against values worked out by hand from the official script; the script itself is not in this repository.

On 2026-11-23 the fetched script (GT-Vision-Lab/VQA a013f00, print statements made functions, Python 3.11) and ours
agreed on 10,000 random rows of such traps in every accuracy, per question and rounded: 0 different.
"""

import pytest

from mmbert.metrics.vqa import AnsweredQuestion, normalize_answer, question_accuracy, vqa_accuracy


def people(*answers: str) -> list[dict[str, object]]:
    """Annotation records of ten people, or as many as are given; "3*red" stands for three."""
    texts: list[str] = []
    for answer in answers:
        count, star, text = answer.partition("*")
        texts += [text] * int(count) if star and count.isdigit() else [answer]
    return [{"answer": text, "answer_confidence": "yes", "answer_id": i + 1} for i, text in enumerate(texts)]


NORMALIZED = [
    # punctuation becomes a space where nothing stands beside it ...
    ("and/or", "and or"),
    ("the-end", "end"),
    ("a_b", "b"),
    ("x=y", "x y"),
    ("what?now", "what now"),
    ("semi;colon", "semi colon"),
    ("[x]", "x"),
    ('"quoted"', "quoted"),
    ("{z}", "z"),
    ("(y)", "y"),
    ("1+1", "1 1"),
    ("back\\slash", "back slash"),
    ("<b>", "b"),
    ("me@home", "me home"),
    ("back`tick", "back tick"),
    ("yes!", "yes"),
    ("no?", "no"),
    ("red,green", "red green"),
    # ... and nothing where a space does
    ("yes !", "yes"),
    ("red, green", "red green"),
    ("t- shirt", "t shirt"),
    ("t -shirt", "t shirt"),
    ("a-b -c", "ab c"),
    # a comma between digits anywhere deletes every mark
    ("1,000", "1000"),
    ("1,000-2,000", "10002000"),
    ("1,000 and/or", "1000 andor"),
    ("1, 2", "1 2"),
    ("a,1", "1"),
    # no mark at all
    ("10:30", "10:30"),
    ("100%", "100%"),
    ("$5", "$5"),
    ("rock & roll", "rock & roll"),
    ("it's", "it's"),
    ("#1", "#1"),
    # periods go unless a digit follows
    ("u.s.", "us"),
    ("3.5", "3.5"),
    ("5.", "5"),
    (".5", ".5"),
    ("a.b", "ab"),
    ("1.2.", "1.2"),
    ("...", ""),
    ("v.2", "v.2"),
    ("." * 33, "."),
    ("." * 32 + "x", "x"),
    ("x" + "." * 40, "x" + "." * 8),
    # number words, articles, case, spaces
    ("two", "2"),
    ("None", "0"),
    ("TEN", "10"),
    ("eleven", "eleven"),
    ("a dog", "dog"),
    ("The Cat", "cat"),
    ("an", ""),
    ("two a", "2"),
    ("  big   dog ", "big dog"),
    ("A", ""),
    ("theatre", "theatre"),
    # contractions: of whole words, in lower case, with the table's own mistakes
    ("dont", "don't"),
    ("Isnt it", "isn't it"),
    ("somebody'd", "somebodyd"),
    ("ill", "ill"),
    ("im", "im"),
    ("yall'd've", "y'all'd've"),
    ("hes here", "he's here"),
    ("oclock", "o'clock"),
    ("let's", "let's"),
    ("shes", "shes"),
]


@pytest.mark.parametrize(("text", "expected"), NORMALIZED)
def test_answers_are_normalized_as_officially(text: str, expected: str) -> None:
    assert normalize_answer(text) == expected


SCORED = [
    # m of 10 people agree: leave one out, a third for each of the others
    *[
        ("red", people(f"{m}*red", f"{10 - m}*blue"), score)
        for m, score in [(1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (5, 1.0), (9, 1.0)]
    ],
    ("red", people("10*blue"), 0.0),
    ("red", people("10*red"), 1.0),
    # all the same: compared as they are
    ("Black.", people("10*black"), 0.0),
    ("black", people("10*Black."), 0.0),
    ("Black.", people("10*Black."), 1.0),
    ("two", people("10*2"), 0.0),
    (" black\n", people("10*black"), 1.0),
    ("big\tdog", people("10*big dog"), 1.0),
    ("big\ndog", people("10*big dog"), 1.0),
    # not the same: both sides are normalised
    ("Black.", people("9*black", "white"), 1.0),
    ("two", people("3*2", "7*3"), 0.9),
    ("2", people("3*two", "7*three"), 0.9),
    ("a dog", people("2*dog", "2*the dog", "6*cat"), 1.0),
    ("dont know", people("1*don't know", "9*x"), 0.3),
    ("1,000", people("2*1000", "8*x"), 0.6),
    ("10:30", people("1*10:30", "9*10 30"), 0.3),
    # differing only by white space at the ends, they are the same
    ("two", people("5*2", "5* 2 "), 0.0),
    # they differ before normalisation and not after
    ("black", people("5*Black", "5*black."), 1.0),
    # an answer that normalises to nothing equals another one that does
    ("the", people("1*a", "9*x"), 0.3),
    ("", people("1*an", "9*x"), 0.3),
    # fewer than ten: the average of what is there
    ("red", people("red"), 0.0),
    ("red", people("2*red"), 1 / 3),
    ("red", people("2*red", "blue"), (1 / 3 + 1 / 3 + 2 / 3) / 3),
    ("red", people("3*red", "6*blue"), (3 * 2 / 3 + 6) / 9),
]


@pytest.mark.parametrize(("prediction", "answers", "expected"), SCORED)
def test_accuracy_of_a_question_is_the_official_one(
    prediction: str, answers: list[dict[str, object]], expected: float
) -> None:
    assert question_accuracy(prediction, answers) == pytest.approx(expected, abs=1e-12)


def test_records_that_are_equal_in_every_field_are_left_out_together() -> None:
    same = [{"answer": "red"}] * 4 + [{"answer": "blue"}] * 6
    # Leaving "red" out takes all four; leaving "blue" out takes all six.
    assert question_accuracy("red", same) == pytest.approx((4 * 0 + 6 * 1) / 10)


def test_records_that_differ_in_any_field_are_left_out_alone() -> None:
    # By "answer_confidence" the three are three: each "red" leaves one match, "blue" leaves two.
    red, blue = {"answer": "red"}, {"answer": "blue", "answer_confidence": "yes"}
    three = [red | {"answer_confidence": "yes"}, red | {"answer_confidence": "no"}, blue]
    assert question_accuracy("red", three) == pytest.approx((1 / 3 + 1 / 3 + 2 / 3) / 3)


def test_records_that_share_their_id_too_are_left_out_together() -> None:
    # Leaving a "red" out takes both, which leaves no match; leaving "blue" out leaves two.
    same = [{"answer": "red", "answer_id": 1}, {"answer": "red", "answer_id": 1}, {"answer": "blue", "answer_id": 2}]
    assert question_accuracy("red", same) == pytest.approx((0 + 0 + 2 / 3) / 3)


def test_clean_mode_always_normalizes() -> None:
    assert question_accuracy("Black.", people("10*black"), mode="clean") == 1.0
    assert question_accuracy("two", people("10*2"), mode="clean") == 1.0


def test_split_is_scored_in_the_mode_that_is_asked_for() -> None:
    rows = [AnsweredQuestion(1, "Black.", people("10*black"), "what color", "other")]
    assert vqa_accuracy(rows)["overall"] == 0
    assert vqa_accuracy(rows, mode="clean")["overall"] == 100


def test_split_is_reported_by_type_with_the_official_rounding() -> None:
    rows = [
        AnsweredQuestion(1, "red", people("3*red", "7*blue"), "what color", "other"),  # 90
        AnsweredQuestion(2, "no", people("10*yes"), "is the", "yes/no"),  # 0
        AnsweredQuestion(3, "yes", people("10*yes"), "is the", "yes/no"),  # 100
    ]
    assert vqa_accuracy(rows) == {
        "overall": 63.33,
        "perQuestionType": {"what color": 90.0, "is the": 50.0},
        "perAnswerType": {"other": 90.0, "yes/no": 50.0},
    }


@pytest.mark.parametrize(
    "call",
    [
        lambda: vqa_accuracy([]),
        lambda: question_accuracy("x", []),
        lambda: question_accuracy("x", people("y"), mode="mmf"),
    ],
)
def test_nothing_to_score_is_an_error(call: object) -> None:
    with pytest.raises(ValueError, match=r"no questions|no human answers|allowed are official, clean"):
        call()  # pyright: ignore
