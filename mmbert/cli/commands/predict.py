"""`mmbert predict vqa`: a fine-tuned model's answers to a file of questions, for the evaluation server."""

import argparse
from pathlib import Path

from mmbert.cli.command_line import add_model
from mmbert.data.readers.base import ImageFolder
from mmbert.data.readers.vqa import read_vqav2
from mmbert.errors import UsageError, printable
from mmbert.inference.loaded import load
from mmbert.inference.prediction import predict_vqa
from mmbert.runtime.terminal import print_line


def add_options(command: argparse.ArgumentParser) -> None:
    """Adds what may follow `mmbert predict`."""
    vqa = command.add_subparsers(required=True, metavar="vqa").add_parser(
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
    vqa.add_argument("--out", metavar="R.json", required=True, help="The file to write.")
    vqa.add_argument("--batch_size", type=int, default=64, help="Questions in one call of the model.")
    vqa.add_argument("--num_workers", type=int, default=1, help="Processes that decode images.")
    vqa.add_argument("--device", help="cpu, cuda, cuda:1 ...; without it the GPU if there is one.")


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
) -> int:
    for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
        if value < least:
            raise UsageError(f"--{name} {value}: must be {least} or more.")
    ready = load(model, device)
    examples = read_vqav2(Path(questions), None, ImageFolder(images), split="questions", image_names=image_names)
    predict_vqa(ready, examples, Path(out), batch_size=batch_size, num_workers=num_workers)
    print_line(f"{printable(out)}: answers to the {len(examples):,} questions of {printable(questions)}")
    return 0
