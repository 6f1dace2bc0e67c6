"""`mmbert score vqa`: score a file of VQA predictions as the official script does."""

import argparse
import json
import logging
from pathlib import Path

from mmbert.data.readers.vqa import check_same_questions, read_annotations, read_questions, read_results
from mmbert.metrics.vqa import MODES, AnsweredQuestion, vqa_accuracy
from mmbert.runtime.files import atomic_write_text, check_output_file

log = logging.getLogger("mmbert")
MIN_ANSWERS = 4
"""Human answers that must agree before the official score of a question can be 1."""


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `mmbert score`."""
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
    vqa.add_argument("--json", action="store_true", help="Print JSON, as without this option.")
    vqa.add_argument("--out", metavar="S.json", help="Also write the scores to this file.")


def _vqa(*, questions: str, annotations: str, results: str, mode: str, out: str | None, **_: bool) -> int:
    check_output_file(out)
    by_id, annotated = read_questions(Path(questions)), read_annotations(Path(annotations))
    check_same_questions(by_id, annotated)
    predictions = read_results(Path(results), annotated)
    few = [known.place for known in annotated.values() if len(known.answers) < MIN_ANSWERS]
    if few:
        log.warning(
            "%s questions have fewer than %d human answers, so even a right prediction scores below 1 in the official "
            "score, and 0 where there is one answer (first: %s)", f"{len(few):,}", MIN_ANSWERS, few[0],
        )  # fmt: skip
    rows = (
        AnsweredQuestion(number, predictions[number], known.answers, known.question_type, known.answer_type)
        for number, known in annotated.items()
    )
    scores = vqa_accuracy(rows, mode=mode)
    text = json.dumps(scores if mode == "official" else {mode: scores}, indent=2, ensure_ascii=True)
    print(text)
    if out is not None:
        atomic_write_text(Path(out), text + "\n")
    return 0
