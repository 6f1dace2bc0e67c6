"""`mmbert data check FILE`: every problem of an annotation file and its images."""

import argparse
import sys

from mmbert.data.check import check_file
from mmbert.data.readers import FORMATS
from mmbert.runtime.terminal import print_line


def add_options(command: argparse.ArgumentParser) -> None:
    """Adds what may follow `mmbert data`."""
    check = command.add_subparsers(required=True, metavar="check").add_parser(
        "check",
        help="list every problem of an annotation file and its images",
        description="Lists every problem of an annotation file and its images, one line each, and exits with 1 if "
        "there is one: whatever stops training, images that cannot be decoded, empty captions, captions and images "
        "that come twice.",
    )
    check.set_defaults(run=_check)
    check.add_argument("file", metavar="FILE", help="The annotation file.")
    check.add_argument("--images", metavar="DIR", help="Folder of the images. Without it: FILE's folder, images/ "
                       "in it, or images/ beside it, whichever has the first image.")  # fmt: skip
    check.add_argument("--format", metavar="F", help=f"{', '.join(FORMATS)}. Without it: told from FILE.")
    check.add_argument("--image_key", metavar="K", help="Field with the image's path (jsonl, csv). Without it: a "
                       "usual name, such as image, filename, img.")  # fmt: skip
    check.add_argument("--caption_key", metavar="K", nargs="+", help="Fields with captions (jsonl, csv). Without it: "
                       "a usual name, such as caption, text, sentence.")  # fmt: skip
    check.add_argument("--split_key", metavar="K", help="Field that tells the split (jsonl, csv). Without it: one.")


def _check(file: str, *, images: str | None, format: str | None, **keys: str | list[str] | None) -> int:
    given = {key: value for key, value in keys.items() if value is not None}
    report = check_file(file, images=images, format=format, **given)
    for line in report.lines():
        print_line(line)
    print(f"mmbert: {report.summary}", file=sys.stderr)
    return 1 if report.total else 0
