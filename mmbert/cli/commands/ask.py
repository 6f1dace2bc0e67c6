"""`mmbert ask MODEL IMAGE "question"`: a fine-tuned model's answers to one question."""

import argparse

from mmbert.cli.command_line import add_model
from mmbert.errors import printable
from mmbert.inference.loaded import load
from mmbert.runtime.terminal import print_line


def add_options(command: argparse.ArgumentParser) -> None:
    """Adds what may follow `mmbert ask`."""
    command.description = (
        "Prints the answers of a model that was fine-tuned with model.task=vqa or decision, best first, each behind "
        "its score: for vqa the accuracy that it may expect, for decision its probability."
    )
    command.set_defaults(run=_ask)
    add_model(command)
    command.add_argument("image", metavar="IMAGE", help="An image file.")
    command.add_argument("question", metavar="QUESTION", help="A question or statement about it.")
    command.add_argument("--top_k", type=int, default=5, help="Answers wanted.")
    command.add_argument("--device", help="cpu, cuda, cuda:1 ...; without it the GPU if there is one.")


def _ask(*, model: str, image: str, question: str, top_k: int, device: str | None) -> int:
    for answer, score in load(model, device).answer(image, question, top_k):
        print_line(f"{score:.4f}  {printable(answer)}")
    return 0
