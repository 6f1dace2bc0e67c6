"""`mmbert match MODEL IMAGE "text" "text" ...`: score how well each text matches an image."""

import argparse

from mmbert.cli.command_line import add_model, utf8_text
from mmbert.errors import printable


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `mmbert match`."""
    command.description = (
        "Prints how well each text matches the image, best first: the probability of a match, or for a model with itc "
        "alone the cosine of the contrastive vectors; the first line names which."
    )
    command.set_defaults(run=_match)
    add_model(command)
    command.add_argument("image", metavar="IMAGE", help="An image file.")
    command.add_argument("texts", metavar="TEXT", nargs="+", type=utf8_text, help="One or more texts.")
    command.add_argument("--device", help="cpu, cuda, cuda:1 ...; default: the GPU if there is one.")


def _match(*, model: str, image: str, texts: list[str], device: str | None) -> int:
    from mmbert.inference.loaded import load

    scores, kind = load(model, device).match(image, texts)
    print(kind)
    for score, text in sorted(zip(scores, texts, strict=True), key=lambda row: -row[0]):
        print(f"{score:.4f}  {printable(text)}")
    return 0
