"""`mmbert export onnx|program MODEL OUT`: write ONNX files or torch.export programs of a saved model."""

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mmbert.cli.command_line import add_json, add_model, print_json
from mmbert.errors import printable

if TYPE_CHECKING:
    from mmbert.inference.export import ExportedFile


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `mmbert export`."""
    formats = command.add_subparsers(required=True, metavar="onnx|program")
    onnx = _add_format(formats, "onnx", _onnx, "ONNX files")
    onnx.add_argument("--int8", action="store_true", help="Quantise the weights of linear layers to int8, for CPUs; "
                      "activations are quantised when they are computed.")  # fmt: skip
    _add_format(formats, "program", _program, "torch.export programs, which run without mmbert")


def _add_format(
    formats: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, run: Callable[..., int], what: str
) -> argparse.ArgumentParser:
    """Add one format with the arguments that all have."""
    command = formats.add_parser(
        name,
        help=f"write {what}",
        description=f"Writes {what} with dynamic batch size and text length, and checks their outputs against the "
        "model's to 1e-4. A fine-tuned model becomes one file; a pretrained one becomes a text encoder, an image "
        "encoder, and the fusion with the heads on it.",
    )
    command.set_defaults(run=run)
    add_model(command)
    command.add_argument("out", metavar="OUT", help="Folder to write; must not exist, or be empty.")
    add_json(command)
    return command


def _onnx(*, model: str, out: str, int8: bool, json: bool) -> int:
    from mmbert.inference.export import export_onnx

    return _print(export_onnx(model, out, int8=int8), json)


def _program(*, model: str, out: str, json: bool) -> int:
    from mmbert.inference.export import export_program

    return _print(export_program(model, out), json)


def _print(files: "Sequence[ExportedFile]", json: bool) -> int:
    if json:
        print_json([{**file._asdict(), "path": str(file.path)} for file in files])
        return 0
    for file in files:
        int8 = "" if file.int8_difference is None else f", {file.int8_difference:.1e} in int8"
        size = f"{file.bytes / 1e6:.1f} MB"
        print(f"{printable(str(file.path))}: {size}, outputs differ by {file.difference:.1e} at most{int8}")
    return 0
