"""The small commands beside training, `mmbert data check ...`: their options, and what they print."""

import argparse
import json
import sys
from pathlib import Path
from typing import NoReturn

from mmbert.command_line import explain, one_sentence_for_mistakes, set_up_logging
from mmbert.data.check import check_file
from mmbert.data.readers import FORMATS
from mmbert.data.readers.vqa import check_same_questions, read_annotations, read_questions, read_results
from mmbert.errors import UsageError
from mmbert.metrics.vqa import MODES, Answered, vqa_accuracy
from mmbert.signals import StopSignals

COMMANDS = {
    "data": "data check FILE, which lists every problem of an annotation file and its pictures",
    "score": "score vqa, which scores a file of predictions as the official script does",
}
"""First word -> what it is for; `mmbert --help` lists them under LightningCLI's own."""


class Parser(argparse.ArgumentParser):
    """Says in one sentence what is wrong, with a suggestion where a name is misspelt."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """Raise what is printed with exit code 2."""
        raise UsageError(explain(message, *_names(self)))


def _names(parser: argparse.ArgumentParser) -> tuple[list[str], list[str]]:
    """All options at and below a parser, and the subcommands right below it."""
    options, subcommands = [], []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            subcommands += action.choices
            for below in action.choices.values():
                options += _names(below)[0]
        else:
            options.append(action.dest)
    return options, subcommands


def run_command(arguments: list[str]) -> None:
    """Run one of `COMMANDS`.

    Args:
        arguments: command line without the program; the first is in `COMMANDS`.

    Raises:
        SystemExit: 1 for what is wrong with the files, 2 for wrong options, 0 after help.
    """
    set_up_logging()
    with one_sentence_for_mistakes(), StopSignals():
        options = vars(_parser().parse_args(arguments))
        code = options.pop("run")(**options)
    if code:
        raise SystemExit(code)


def _parser() -> Parser:
    parser = Parser(prog="mmbert")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    data = commands.add_parser("data", help=COMMANDS["data"])
    check = data.add_subparsers(required=True, metavar="check").add_parser(
        "check",
        help="list every problem of an annotation file and its pictures",
        description="Lists every problem of an annotation file and its pictures, one line each, and exits with 1 if "
        "there is one: whatever stops training, pictures that cannot be decoded, empty captions, captions and pictures "
        "that come twice.",
    )
    check.set_defaults(run=_data_check)
    check.add_argument("file", metavar="FILE", help="The annotation file.")
    check.add_argument("--images", metavar="DIR", help="Folder of the pictures. Without it: FILE's folder, images/ "
                       "in it, or images/ beside it, whichever has the first picture.")  # fmt: skip
    check.add_argument("--format", metavar="F", help=f"{', '.join(FORMATS)}. Without it: told from FILE.")
    check.add_argument("--image_key", metavar="K", help="Field with the picture's path (jsonl, csv). Without it: a "
                       "usual name, such as image, filename, img.")  # fmt: skip
    check.add_argument("--caption_key", metavar="K", nargs="+", help="Fields with captions (jsonl, csv). Without it: "
                       "a usual name, such as caption, text, sentence.")  # fmt: skip
    check.add_argument("--split_key", metavar="K", help="Field that tells the split (jsonl, csv). Without it: one.")

    score = commands.add_parser("score", help=COMMANDS["score"])
    vqa = score.add_subparsers(required=True, metavar="vqa").add_parser(
        "vqa",
        help="score VQA predictions",
        description="Prints JSON with the official script's keys: overall, perQuestionType, perAnswerType, in percent.",
    )
    vqa.set_defaults(run=_score_vqa)
    vqa.add_argument("--questions", metavar="Q.json", required=True, help="Questions as VQAv2 publishes them.")
    vqa.add_argument("--annotations", metavar="A.json", required=True, help="Human answers as VQAv2 publishes them.")
    vqa.add_argument("--results", metavar="R.json", required=True, help='[{"question_id": 1, "answer": "red"}, ...]')
    vqa.add_argument("--mode", choices=MODES, default="official", help="official, with its quirks; or clean, which "
                     "always normalises and is printed under its own key.")  # fmt: skip
    vqa.add_argument("--out", metavar="S.json", help="Writes what is printed to this file too.")
    return parser


def _score_vqa(*, questions: str, annotations: str, results: str, mode: str, out: str | None) -> int:
    asked, answered = read_questions(Path(questions)), read_annotations(Path(annotations))
    check_same_questions(asked, answered)
    said = read_results(Path(results), answered)
    rows = (
        Answered(number, said[number], known.answers, known.question_type, known.answer_type)
        for number, known in answered.items()
    )
    scores = vqa_accuracy(rows, mode=mode)
    text = json.dumps(scores if mode == "official" else {mode: scores}, indent=2, ensure_ascii=True)
    print(text)
    if out is not None:
        Path(out).write_text(text + "\n")
    return 0


def _data_check(file: str, *, images: str | None, format: str | None, **keys: str | list[str] | None) -> int:
    given = {key: value for key, value in keys.items() if value is not None}
    report = check_file(file, images=images, format=format, **given)
    for line in report.lines():
        _print(line)
    print(f"mmbert: {report.summary}", file=sys.stderr)
    return 1 if report.total else 0


def _print(line: str) -> None:
    """Print what may hold any character, on a terminal of any encoding."""
    encoding = sys.stdout.encoding or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding))
