"""`mmbert match MODEL IMAGE "text" "text" ...`: score how well each text matches an image."""

import argparse

from mmbert.cli.command_line import add_device, add_json, add_model, print_json, read_list, utf8_text
from mmbert.errors import printable


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `mmbert match`."""
    command.description = (
        "Prints how well each text matches the image, best first: the probability of a match, or for a model with itc "
        "alone the cosine of the contrastive vectors; the first line names which."
    )
    command.set_defaults(run=_match)
    add_model(command)
    command.add_argument("image", metavar="IMAGE", type=utf8_text, help="An image file; -: the files that standard "
                         "input names, one a line, each with its scores below its name.")  # fmt: skip
    command.add_argument("texts", metavar="TEXT", nargs="+", type=utf8_text,
                         help="One or more texts; -: the lines of standard input.")  # fmt: skip
    add_device(command)
    add_json(command)


def _match(*, model: str, image: str, texts: list[str], device: str | None, dtype: str, json: bool) -> int:
    from mmbert.inference.loaded import load

    images, texts = read_list([image], "IMAGE"), read_list(texts, "TEXT")
    results = load(model, device, dtype=dtype).match(images, texts)
    rows = [
        {
            "image": name,
            "kind": kind,
            "scores": [
                {"text": text, "score": score}
                for score, text in sorted(zip(scores, texts, strict=True), key=lambda row: -row[0])
            ],
        }
        for name, (scores, kind) in zip(images, results, strict=True)
    ]
    if json:
        print_json(rows if image == "-" else rows[0])
        return 0
    for row in rows:
        print(f"{printable(row['image'])}: {row['kind']}" if image == "-" else row["kind"])
        for found in row["scores"]:
            print(f"{found['score']:.4f}  {printable(found['text'])}")
    return 0
