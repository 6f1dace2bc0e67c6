"""`mmbert ask MODEL IMAGE "question"`: answer a question about an image with a fine-tuned model."""

import argparse

from mmbert.cli.command_line import add_device, add_json, add_model, print_json, read_list, utf8_text
from mmbert.errors import UsageError, printable


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `mmbert ask`."""
    command.description = (
        "Prints the answers of a model that was fine-tuned with model.task=vqa or decision, best first, each with its "
        "score: for vqa the expected accuracy, for decision the probability."
    )
    command.set_defaults(run=_ask)
    add_model(command)
    command.add_argument("images", metavar="IMAGE", nargs="+", type=utf8_text,
                         help="An image file; two for a model of two images per text (NLVR2).")  # fmt: skip
    command.add_argument("question", metavar="QUESTION", type=utf8_text,
                         help="A question or statement about it; -: the lines of standard input.")  # fmt: skip
    command.add_argument("--top_k", type=int, default=5, help="Number of answers (default 5).")
    add_device(command)
    add_json(command)


def _ask(
    *, model: str, images: list[str], question: str, top_k: int, device: str | None, dtype: str, json: bool
) -> int:  # fmt: skip
    from mmbert.inference.capabilities import task_of
    from mmbert.inference.loaded import load

    if not all(image.strip() for image in images):
        raise UsageError("IMAGE '' is empty: give an image file.")
    questions = read_list([question], "QUESTION")
    loaded = load(model, device, dtype=dtype)
    takes = task_of(loaded.model, loaded.name).num_images
    if len(images) != takes:
        raise UsageError(f"{len(images)} images: '{loaded.name}' takes {takes} for a text; give IMAGE so many times.")
    group = images[0] if takes == 1 else [images] * len(questions)
    results = loaded.answer(group, questions, top_k)
    if json:
        rows = [
            {"question": text, "answers": [{"answer": answer, "score": score} for answer, score in answers]}
            for text, answers in zip(questions, results, strict=True)
        ]
        print_json(rows if question == "-" else rows[0])
        return 0
    for text, answers in zip(questions, results, strict=True):
        if question == "-":
            print(f"{printable(text)}")
        for answer, score in answers:
            print(f"{score:.4f}  {printable(answer)}")
    return 0
