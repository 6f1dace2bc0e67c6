"""`mmbert data`: check an annotation file and its images, or generate a data set."""

import argparse
import sys
from pathlib import Path
from typing import Any

from mmbert.cli.command_line import add_json, print_json, utf8_text
from mmbert.data.prepare import DATA_FOLDER, GENERATORS, generate, list_files
from mmbert.data.readers import FORMATS


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `mmbert data`."""
    subcommands = command.add_subparsers(required=True, metavar="check|prepare")
    _add_prepare(subcommands.add_parser(
        "prepare", help="generate a data set", description="Generates a data set and lists its files; one that is "
        "complete already is kept. A run whose configuration sets data.prepare generates it by itself."
    ))  # fmt: skip
    check = subcommands.add_parser(
        "check",
        help="list every error of an annotation file and its images",
        description="Lists every error and remark of an annotation file and its images, one line each. Errors stop "
        "training: broken records, missing images, images that cannot be decoded; the exit code is 1 then. Remarks do "
        "not: empty captions that are dropped, captions and images that come twice, missing labels. Give a file of "
        "captions, of labelled examples (jsonl, nlvr, nlvr2), questions or annotations of vqav2, foils, or boxes.",
    )
    check.set_defaults(run=_check)
    check.add_argument("file", metavar="FILE", help="The annotation file.")
    check.add_argument("--images", metavar="DIR", help="Folder of the images. Without it: FILE's folder, images/ "
                       "in it, or images/ beside it, whichever has the first image.")  # fmt: skip
    check.add_argument("--format", metavar="F", help=f"{', '.join(FORMATS)}, vqav2, nlvr, nlvr2, foils, boxes. "
                       "Without it: detected.")  # fmt: skip
    check.add_argument("--image_key", type=utf8_text, metavar="K", help="Field with the image's path (jsonl, csv). "
                       "Without it: a usual name, such as image, filename, img.")  # fmt: skip
    check.add_argument("--caption_key", type=utf8_text, metavar="K", nargs="+", help="Fields with captions (jsonl, "
                       "csv). Without it: a usual name, such as caption, text, sentence.")  # fmt: skip
    check.add_argument("--split_key", type=utf8_text, metavar="K", help="Field with the split (jsonl, csv). Without "
                       "it: one.")  # fmt: skip
    check.add_argument("--delimiter", type=utf8_text, metavar="C", help="Character between columns (csv), a tab "
                       "also as tab. Without it: detected among , ; tab and |.")  # fmt: skip
    check.add_argument("--drop_uncaptioned", action="store_const", const=True, help="Images without a caption are "
                       "remarks, as data.drop_uncaptioned=true drops them.")  # fmt: skip
    check.add_argument("--text_key", type=utf8_text, metavar="K", help="Field with the text of a task (jsonl).")
    check.add_argument("--label_key", type=utf8_text, metavar="K", help="Field with the label of a task (jsonl). "
                       "This option, --text_key or --id_key means that FILE is of a task.")  # fmt: skip
    check.add_argument("--id_key", type=utf8_text, metavar="K", help="Field with the row's id (jsonl of a task).")
    check.add_argument("--questions", metavar="Q.json", help="Question file of vqav2, if FILE holds its annotations.")
    check.add_argument("--image_names", metavar="NAMES", help="How an image_id becomes a file name: a template such "
                       "as COCO_val2014_{:012d}.jpg, or COCO's JSON file (vqav2, jsonl of a task).")  # fmt: skip
    add_json(check)
    check.add_argument("--strict", action="store_true", help="Exit with 1 if there are remarks, too.")


def _check(
    file: str,
    *,
    images: str | None,
    format: str | None,
    strict: bool,
    json: bool,
    **keys: str | list[str] | bool | None,
) -> int:
    from mmbert.data.check import check_file  # imports torch, which `data prepare` doesn't need

    given: dict[str, Any] = {key: value for key, value in keys.items() if value is not None}
    report = check_file(file, images=images, format=format, **given)
    if json:
        numbers = {"errors": report.num_errors, "remarks": report.num_remarks, "summary": report.summary}
        print_json({"problems": report.problems, **numbers})
    else:
        for line in report.lines():
            print(line)
        print(f"mmbert: {report.summary}", file=sys.stderr)
    return 1 if report.num_errors or (strict and report.num_remarks) else 0


SHAPES_OPTIONS = {
    "train": "number of training scenes: 20,000 by default",
    "val": "number of validation scenes: 1,000 by default",
    "test": "number of test scenes, half of them with unseen pairs of color and shape: 2,000 by default",
    "size": "side of the images in pixels: 64 by default",
    "seed": "another seed makes other scenes: 0 by default",
    "jobs": "number of processes: the number of cores by default",
}


def _add_prepare(command: argparse.ArgumentParser) -> None:
    data_sets = command.add_subparsers(required=True, metavar="|".join(GENERATORS))
    for name, content in GENERATORS.items():
        parser = data_sets.add_parser(name, help=content, description=f"Generates {name}: {content}.")
        parser.set_defaults(run=_prepare, name=name)
        add_json(parser)
        parser.add_argument("--out", metavar="DIR", type=Path, default=DATA_FOLDER / name,
                            help=f"folder to write to: {DATA_FOLDER / name} by default")  # fmt: skip
        if name == "shapes":
            for option, text in SHAPES_OPTIONS.items():
                parser.add_argument(f"--{option}", metavar="N", type=int, help=text)
            parser.add_argument("--force", action="store_true", help="generate it again even if it is complete")


def _prepare(*, name: str, out: Path, json: bool, force: bool = False, **numbers: int | None) -> int:
    options = [f"--{option}={number}" for option, number in numbers.items() if number is not None]
    generate(name, out, [*options, *(["--force"] if force else [])])
    lines = [*list_files(out)]
    if json:
        print_json(lines)
    else:
        for line in lines:
            print(line)
    return 0
