"""`mmbert score vqa`: the official numbers from the official files, and one error that names file and record."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmbert.cli.main import main

Files = dict[str, Any]


def files() -> Files:
    """Three questions: 3 of 10 people agree, nobody does, all do."""
    people = [["red"] * 3 + ["blue"] * 7, ["yes"] * 10, ["2"] * 10]
    kinds = [("what color", "other"), ("is the", "yes/no"), ("how many", "number")]
    return {
        "questions": {
            "questions": [{"question_id": i + 7, "image_id": 1, "question": "Which?"} for i in range(3)],
        },
        "annotations": {
            "annotations": [
                {
                    "question_id": i + 7,
                    "image_id": 1,
                    "question_type": kinds[i][0],
                    "answer_type": kinds[i][1],
                    "multiple_choice_answer": answers[-1],
                    "answers": [
                        {"answer": a, "answer_confidence": "yes", "answer_id": n} for n, a in enumerate(answers)
                    ],
                }
                for i, answers in enumerate(people)
            ]
        },
        "results": [
            {"question_id": 9, "answer": "2"},
            {"question_id": 7, "answer": "a red"},
            {"question_id": 8, "answer": "no"},
        ],
    }


def score(folder: Path, content: Files, *more: str) -> None:
    options = []
    for name, value in content.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
        options += [f"--{name}", str(folder / f"{name}.json")]
    main(["score", "vqa", *options, *more])


def test_scores_are_printed_with_the_official_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    score(tmp_path, files(), "--out", str(tmp_path / "s.json"))
    printed = json.loads(capsys.readouterr().out)
    assert printed == {
        "overall": 63.33,
        "perQuestionType": {"what color": 90.0, "is the": 0.0, "how many": 100.0},
        "perAnswerType": {"other": 90.0, "yes/no": 0.0, "number": 100.0},
    }
    assert json.loads((tmp_path / "s.json").read_text()) == printed


def test_clean_mode_stands_under_its_own_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = files()
    content["results"][0]["answer"] = "Two."
    score(tmp_path, content)
    assert json.loads(capsys.readouterr().out)["perAnswerType"]["number"] == 0.0, "all ten say 2: compared as it is"
    score(tmp_path, content, "--mode", "clean")
    printed = json.loads(capsys.readouterr().out)
    assert list(printed) == ["clean"]
    assert printed["clean"]["perAnswerType"]["number"] == 100.0


def test_fewer_than_ten_answers_are_averaged_with_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    content = files()
    for record in content["annotations"]["annotations"]:
        del record["answers"][5:]
    score(tmp_path, content)
    # 3 red and 2 blue: leaving a red out 2 agree, leaving a blue out 3.
    assert json.loads(capsys.readouterr().out)["perAnswerType"]["other"] == round(100 * (3 * 2 / 3 + 2) / 5, 2)
    warnings = [r.getMessage() for r in caplog.records if "fewer than 10" in r.getMessage()]
    assert len(warnings) == 1
    assert "to 3 questions" in warnings[0]
    assert "annotations[0]" in warnings[0]


def change(path: str, value: Any) -> Callable[[Files], None]:
    """Sets the value at "results.0.answer", or removes it where the value is `...`."""

    def apply(content: Any) -> None:
        *above, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        for part in above:
            content = content[part]
        if value is ...:
            del content[last]
        else:
            content[last] = value

    return apply


A, Q = "annotations.annotations", "questions.questions"
WRONG: dict[str, tuple[Callable[[Files], None], str]] = {
    "unknown id": (
        change("results.0.question_id", 99),
        "results.json:[0]: question_id 99; expected a question of this",
    ),
    "missing id": (change("results.1", ...), "results.json: no answer to question_id 7"),
    "id twice": (change("results.0.question_id", 7), "results.json:[1]: question_id 7 again"),
    "id as text": (change("results.0.question_id", "9"), "results.json:[0]: question_id is"),
    "answer is a number": (
        change("results.0.answer", 2),
        "results.json:[0]: answer is the number 2; expected a string",
    ),
    "answer is null": (change("results.0.answer", None), "results.json:[0]: answer is null; expected a string"),
    "no answer key": (change("results.0.answer", ...), "results.json:[0]: no key 'answer'"),
    "results are an object": (change("results", {"a": 1}), "results.json: the file is an object"),
    "a result is a list": (change("results.0", [1]), "results.json:[0]: the prediction is a list"),
    "empty split": (change("questions.questions", []), "questions.json:questions: an empty list"),
    "empty annotations": (change("annotations.annotations", []), "annotations.json:annotations: an empty list"),
    "no people": (change(f"{A}.1.answers", []), "annotations.json:annotations[1]: no answers"),
    "a person's answer is no text": (
        change(f"{A}.1.answers.3.answer", 4),
        "annotations[1].answers[3]: answer is the number 4",
    ),
    "no question type": (change(f"{A}.2.question_type", ...), "annotations[2]: no key 'question_type'"),
    "annotated twice": (change(f"{A}.2.question_id", 8), "annotations.json:annotations[2]: question_id 8 again"),
    "asked twice": (change(f"{Q}.2.question_id", 8), "questions.json:questions[2]: question_id 8 again"),
    "not asked": (change(f"{Q}.2", ...), "annotations.json:annotations[2]: question_id 9; expected a question of"),
    "not answered by people": (change(f"{A}.2", ...), "questions.json:questions[2]: question_id 9; expected one that"),
    "no question text": (change(f"{Q}.0.question", ...), "questions.json:questions[0]: no key 'question'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_file_is_one_error_with_file_and_record(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = files()
    apply, said = WRONG[name]
    apply(content)
    with pytest.raises(SystemExit) as stopped:
        score(tmp_path, content)
    assert stopped.value.code == 1
    errors = capsys.readouterr().err.splitlines()
    assert said in errors[0]
    assert str(tmp_path) in errors[0]


def test_wrong_options_end_with_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in (["--questions", "q.json"], ["--mode", "mmf"], ["--result", "x"]):
        with pytest.raises(SystemExit) as stopped:
            main(["score", "vqa", *options])
        assert stopped.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    with pytest.raises(SystemExit):
        score(tmp_path, files(), "--out", str(tmp_path / "absent" / "s.json"))
    captured = capsys.readouterr()
    assert "absent/s.json: its folder does not exist; give a file." in captured.err and not captured.out


def test_questions_with_one_answer_are_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    content = files()
    del content["annotations"]["annotations"][2]["answers"][1:]
    score(tmp_path, content)
    assert json.loads(capsys.readouterr().out)["perAnswerType"]["number"] == 0.0, "as the official script"
    messages = [r.getMessage() for r in caplog.records if "score" in r.getMessage()]
    assert len(messages) == 1 and messages[0].startswith("1 questions have fewer than 4 human answers")
    assert messages[0].endswith("annotations[2])")
