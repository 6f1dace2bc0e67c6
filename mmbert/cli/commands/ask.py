"""`mmbert ask MODEL IMAGE "question"`: answer a question about an image with a fine-tuned model."""

import argparse

from mmbert.cli.command_line import add_model, utf8_text
from mmbert.errors import printable


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `mmbert ask`."""
    command.description = (
        "Prints the answers of a model that was fine-tuned with model.task=vqa or decision, best first, each with its "
        "score: for vqa the expected accuracy, for decision the probability."
    )
    command.set_defaults(run=_ask)
    add_model(command)
    command.add_argument("image", metavar="IMAGE", help="An image file.")
    command.add_argument("question", metavar="QUESTION", type=utf8_text, help="A question or statement about it.")
    command.add_argument("--top_k", type=int, default=5, help="Number of answers (default 5).")
    command.add_argument("--device", help="cpu, cuda, cuda:1 ...; default: the GPU if there is one.")


def _ask(*, model: str, image: str, question: str, top_k: int, device: str | None) -> int:
    from mmbert.inference.loaded import load

    for answer, score in load(model, device).answer(image, question, top_k):
        print(f"{score:.4f}  {printable(answer)}")
    return 0
