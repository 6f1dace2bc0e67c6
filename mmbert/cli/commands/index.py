"""`mmbert index MODEL FOLDER --out INDEX`: encode a folder of images for `mmbert search`."""

import argparse

from mmbert.cli.command_line import add_json, add_model, print_json
from mmbert.errors import printable

MAX_LISTED = 20
"""Unreadable files that are named; --json names all."""


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `mmbert index`."""
    command.description = (
        "Encodes the images in and below a folder, or brings an index up to date: only new and changed images are "
        "encoded. After a kill, the same command goes on. Under torchrun, every process encodes its share."
    )
    command.set_defaults(run=_index)
    add_model(command, "A folder RUN/model that was pretrained with the objective itc.")
    command.add_argument("folder", metavar="FOLDER", help="The folder with the images.")
    command.add_argument("--out", metavar="INDEX", required=True, help="Folder of the index.")
    command.add_argument("--batch_size", type=int, default=64, help="Images per encoder call (default 64).")
    command.add_argument("--num_workers", type=int, default=1, help="Processes that decode images (default 1).")
    command.add_argument("--device", help="cpu, cuda, cuda:1 ...; default: the GPU if there is one.")
    command.add_argument("--faiss", action="store_true", help="Also write an approximate index, for more than a "
                         "million images, and print its recall; needs faiss-cpu.")  # fmt: skip
    add_json(command)


def _index(
    *, model: str, folder: str, out: str, batch_size: int, num_workers: int, device: str | None, faiss: bool, json: bool
) -> int:
    from mmbert.inference.indexing import build_index
    from mmbert.runtime.distributed import rank, torchrun_process_group

    with torchrun_process_group():
        found = build_index(
            model, folder, out, batch_size=batch_size, num_workers=num_workers, device=device, approximate=faiss
        )
        is_first = rank() == 0
    if not is_first:
        return 0
    if json:
        print_json(found._asdict())
        return 0
    print(
        f"{printable(out)}: {found.images:,} images of {printable(folder)}; {found.encoded:,} new or changed, "
        f"{found.deleted:,} deleted, {len(found.unreadable):,} unreadable"
    )
    for file, reason in [*found.unreadable.items()][:MAX_LISTED]:
        print(f"unreadable: {printable(file)}: {printable(reason)}")
    if len(found.unreadable) > MAX_LISTED:
        print(f"unreadable: {len(found.unreadable) - MAX_LISTED:,} more; --json lists all")
    return 0
