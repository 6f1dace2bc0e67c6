"""`mmbert score vqa`: a file of predictions, scored as the official script does."""

import argparse
import json
from pathlib import Path

from mmbert.data.readers.vqa import check_same_questions, read_annotations, read_questions, read_results
from mmbert.metrics.vqa import MODES, AnsweredQuestion, vqa_accuracy


def add_options(command: argparse.ArgumentParser) -> None:
    """Adds what may follow `mmbert score`."""
    vqa = command.add_subparsers(required=True, metavar="vqa").add_parser(
        "vqa",
        help="score VQA predictions",
        description="Prints JSON with the official script's keys: overall, perQuestionType, perAnswerType, in percent.",
    )
    vqa.set_defaults(run=_vqa)
    vqa.add_argument("--questions", metavar="Q.json", required=True, help="Questions as VQAv2 publishes them.")
    vqa.add_argument("--annotations", metavar="A.json", required=True, help="Human answers as VQAv2 publishes them.")
    vqa.add_argument("--results", metavar="R.json", required=True, help='[{"question_id": 1, "answer": "red"}, ...]')
    vqa.add_argument("--mode", choices=MODES, default="official", help="official, with its quirks; or clean, which "
                     "always normalises and is printed under its own key.")  # fmt: skip
    vqa.add_argument("--out", metavar="S.json", help="Writes what is printed to this file too.")


def _vqa(*, questions: str, annotations: str, results: str, mode: str, out: str | None) -> int:
    asked, answered = read_questions(Path(questions)), read_annotations(Path(annotations))
    check_same_questions(asked, answered)
    said = read_results(Path(results), answered)
    rows = (
        AnsweredQuestion(number, said[number], known.answers, known.question_type, known.answer_type)
        for number, known in answered.items()
    )
    scores = vqa_accuracy(rows, mode=mode)
    text = json.dumps(scores if mode == "official" else {mode: scores}, indent=2, ensure_ascii=True)
    print(text)
    if out is not None:
        Path(out).write_text(text + "\n")
    return 0
