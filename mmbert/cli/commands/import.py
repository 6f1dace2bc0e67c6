"""`mmbert import SOURCE OUT`: convert a published checkpoint to a folder of an mmbert model."""

import argparse
from pathlib import Path
from typing import Any

from mmbert.cli.command_line import add_json, print_json
from mmbert.errors import UsageError, printable


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `mmbert import`."""
    command.description = (
        "Converts a checkpoint of another project, such as ViLT or VisualBERT, to a folder that mmbert.load and the "
        "Auto classes of transformers read, and prints what became of its tensors. docs/checkpoints.md has the list."
    )
    command.set_defaults(run=_import)
    command.add_argument("source", metavar="SOURCE", help="Folder, file of weights, or name on the hub, OWNER/MODEL.")
    command.add_argument("out", metavar="OUT", help="Folder to write; it must not exist.")
    command.add_argument("--partial", action="store_true", help="Also import a checkpoint that does not match "
                         "completely; what is missing is newly initialised.")  # fmt: skip
    command.add_argument("--tokenizer", help="Folder or hub name of the tokenizer; default: that in SOURCE.")
    command.add_argument("--labels", metavar="FILE", help="File with one class of the task's head a line, where the "
                         "checkpoint only numbers them.")  # fmt: skip
    command.add_argument("--image_size", type=int, help="Side of the images, in pixels; default: the checkpoint's.")
    add_json(command)


def _import(*, source: str, out: str, labels: str | None, json: bool, **options: Any) -> int:
    from mmbert.inference.importing import import_checkpoint

    names: list[str] = []
    if labels is not None:
        try:
            names = Path(labels).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--labels '{labels}' can't be read: {error}") from error
    account = import_checkpoint(source, out, labels=names, **options)
    if json:
        print_json(account._asdict())
        return 0
    print(account.table())
    print(f"{printable(out)}: written; mmbert.load('{printable(out)}') reads it")
    return 0
