"""`mmbert predict`: a fine-tuned model's predictions for a file of questions or statements."""

import argparse
from pathlib import Path
from typing import Any

from mmbert.cli.command_line import add_device, add_json, add_model, print_json, utf8_text
from mmbert.data.format_detection import detect_keys
from mmbert.data.labelled import TABLES
from mmbert.data.readers.base import ImageFolder, Problems
from mmbert.data.readers.labelled import LabelledExample, read_labelled_jsonl
from mmbert.data.readers.vqa import read_vqav2
from mmbert.errors import DataError, UsageError, printable
from mmbert.inference.loaded import LoadedModel, load
from mmbert.inference.prediction import predict_decisions, predict_vqa


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `mmbert predict`."""
    tasks = command.add_subparsers(required=True, metavar="vqa|decision")
    vqa = tasks.add_parser(
        "vqa",
        help="answer all questions of a VQAv2 file",
        description="Writes the file that VQA's evaluation server takes, each question of the split exactly once; "
        "`mmbert score vqa` scores it where the annotations are known.",
    )
    vqa.set_defaults(run=_vqa)
    add_model(vqa, "A folder RUN/model that was fine-tuned with model.task=vqa.")
    vqa.add_argument("--questions", metavar="Q.json", required=True, help="Questions as VQAv2 publishes them.")
    vqa.add_argument("--images", metavar="DIR", required=True, help="Folder of the images.")
    vqa.add_argument("--image_names", metavar="NAMES", required=True, help="How an image_id becomes a file name: a "
                     "template such as COCO_test2015_{:012d}.jpg, or a JSON file whose list \"images\" has \"id\" and "
                     "\"file_name\".")  # fmt: skip
    _add_shared(vqa, "Questions")
    decision = tasks.add_parser(
        "decision",
        help="predict the labels of a JSON-lines file",
        description="Writes the predicted label and the probability of every label for each row of a JSON-lines file "
        "with texts and images; labels of the file, if it has any, are not used.",
    )
    decision.set_defaults(run=_decision)
    add_model(decision, "A folder RUN/model that was fine-tuned with model.task=decision.")
    decision.add_argument("--annotations", metavar="A.jsonl", required=True, help="One JSON object per line.")
    decision.add_argument("--images", metavar="DIR", required=True, help="Folder of the images.")
    decision.add_argument("--format", choices=[*TABLES], default="jsonl", help="Its format (default jsonl); nlvr2 has "
                          "two images per text.")  # fmt: skip
    decision.add_argument("--image_key", type=utf8_text, metavar="K", help="Field with the image's path. Without "
                          "it: a usual name, such as image, filename, img.")  # fmt: skip
    decision.add_argument("--image_names", metavar="NAMES", help="How the value of the image's field becomes a file "
                          "name: a template such as {}.jpg, or COCO's JSON file.")  # fmt: skip
    decision.add_argument("--text_key", type=utf8_text, metavar="K", help="Field with the text. Without it: a usual "
                          "name, such as text, sentence, caption.")  # fmt: skip
    decision.add_argument(
        "--id_key", type=utf8_text, metavar="K", help="Field with the row's id. Without it: the row's number, from 0."
    )
    _add_shared(decision, "Texts")


def _add_shared(command: argparse.ArgumentParser, items: str) -> None:
    command.add_argument("--out", metavar="R.json", required=True, help="The file to write.")
    command.add_argument("--batch_size", type=int, default=64, help=f"{items} per forward pass.")
    command.add_argument("--num_workers", type=int, default=1, help="Processes that decode images.")
    add_device(command)
    add_json(command)


def _check_sizes(batch_size: int, num_workers: int) -> None:
    for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
        if value < least:
            raise UsageError(f"--{name} {value}: must be {least} or more.")


def _vqa(
    *,
    model: str,
    questions: str,
    images: str,
    image_names: str,
    out: str,
    batch_size: int,
    num_workers: int,
    device: str | None,
    dtype: str,
    json: bool,
) -> int:
    _check_sizes(batch_size, num_workers)
    loaded = load(model, device, dtype=dtype)
    examples = read_vqav2(Path(questions), None, ImageFolder(images), split="questions", image_names=image_names)
    predict_vqa(loaded, examples, Path(out), batch_size=batch_size, num_workers=num_workers)
    _report(out, len(examples), f"answers to the {len(examples):,} questions of {printable(questions)}", json)
    return 0


def _decision(
    *,
    model: str,
    annotations: str,
    images: str,
    format: str,
    image_key: str | None,
    image_names: str | None,
    text_key: str | None,
    id_key: str | None,
    out: str,
    batch_size: int,
    num_workers: int,
    device: str | None,
    dtype: str,
    json: bool,
) -> int:
    _check_sizes(batch_size, num_workers)
    loaded = load(model, device, dtype=dtype)
    path, problems = Path(annotations), Problems()
    if format != "jsonl":
        if any((image_key, image_names, text_key, id_key)):
            raise UsageError(f"--format {format} has no options for fields and image names.")
        examples = TABLES[format](path, ImageFolder(images), problems, split="test")
        problems.raise_if_any()
        return _write_decisions(loaded, examples, annotations, out, batch_size, num_workers, json)
    given: dict[str, Any] = {"image_key": image_key, "text_key": text_key}
    keys = detect_keys(
        path, "jsonl", {key: value for key, value in given.items() if value is not None}, text="text_key"
    )
    examples = read_labelled_jsonl(
        path,
        ImageFolder(images),
        problems,
        split="test",
        image_names=image_names,
        label_key=None,
        id_key=id_key,
        **keys,
    )
    problems.raise_if_any()
    return _write_decisions(loaded, examples, annotations, out, batch_size, num_workers, json)


def _write_decisions(
    loaded: LoadedModel, examples: list[LabelledExample], annotations: str, out: str, batch_size: int,
    num_workers: int, json: bool,
) -> int:  # fmt: skip
    if not examples:
        raise DataError(annotations, "no examples", "at least one row")
    predict_decisions(loaded, examples, Path(out), batch_size=batch_size, num_workers=num_workers)
    _report(out, len(examples), f"labels of the {len(examples):,} rows of {printable(annotations)}", json)
    return 0


def _report(out: str, count: int, content: str, json: bool) -> None:
    if json:
        print_json({"out": out, "count": count})
    else:
        print(f"{printable(out)}: {content}")
