"""`mmbert demo MODEL ...`: a local page to try models in the browser."""

import argparse

from mmbert.cli.command_line import add_allow_import


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `mmbert demo`."""
    command.description = (
        "Serves a page on this machine: scores of texts, masked words, questions, explanations, image search; several "
        "models stand side by side. It loads nothing from other servers."
    )
    command.set_defaults(run=_demo)
    command.add_argument("models", metavar="MODEL", nargs="+", help="Folders of saved models: RUN/model.")
    add_allow_import(command)
    command.add_argument("--index", metavar="INDEX", help="An index of mmbert index, to search in.")
    command.add_argument("--host", default="127.0.0.1", help="Address to listen at (default 127.0.0.1, this machine "
                         "only).")  # fmt: skip
    command.add_argument("--port", type=int, default=7860, help="Port to listen at (default 7860).")
    command.add_argument("--device", help="cpu, cuda, cuda:1 ...; default: the GPU if there is one.")


def _demo(*, models: list[str], index: str | None, host: str, port: int, device: str | None) -> int:
    from mmbert.inference.demo import serve_demo

    serve_demo(models, index, host=host, port=port, device=device)
    return 0
