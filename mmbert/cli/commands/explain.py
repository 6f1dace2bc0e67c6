"""`mmbert explain MODEL IMAGE TEXT --out map.html`: relevance of every token and image patch for one score."""

import argparse
from dataclasses import asdict
from typing import Any

from mmbert.cli.command_line import add_device, add_json, add_model, print_json, utf8_text
from mmbert.errors import printable


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `mmbert explain`."""
    command.description = (
        "Prints the score, the relevance of every token, and the most relevant image patches; --out writes a page that "
        "links tokens and patches, or a figure."
    )
    command.set_defaults(run=_explain)
    add_model(command)
    command.add_argument("image", metavar="IMAGE", help="An image file.")
    command.add_argument("text", metavar="TEXT", type=utf8_text, help="A text, question or statement about it.")
    command.add_argument("--out", metavar="FILE", help="File to write: .html, .png, .svg, .pdf or .json.")
    command.add_argument("--target", metavar="T", type=utf8_text, help="itm; itc; a word of the text, which is masked; "
                         "of a fine-tuned model one of its labels. Default: itm, else itc; the best answer, or the "
                         "best word at a [MASK].")  # fmt: skip
    command.add_argument("--method", choices=("attention", "gradient", "integrated_gradients"),
                         help="Default: attention where it connects text and image, else gradient (late fusion, itc). "
                         "integrated_gradients needs captum.")  # fmt: skip
    command.add_argument("--samples", type=int, default=64, metavar="N", help="Permutations to sample for the shares "
                         "of text and image (default 64).")  # fmt: skip
    command.add_argument("--seed", type=int, default=0, help="Seed of these permutations (default 0).")
    add_device(command)
    add_json(command)


def _explain(
    *, model: str, image: str, text: str, out: str | None, target: str | None, method: Any, samples: int, seed: int,
    device: str | None, dtype: str, json: bool,
) -> int:  # fmt: skip
    from mmbert.inference.loaded import load

    loaded = load(model, device, dtype=dtype)
    found = loaded.explain(image, text, target, method=method, links=out is not None and out.endswith(".html"))
    if out is not None:
        found.save(out)
    shares = loaded.modality_shares(image, text, target, samples=samples, seed=seed)
    if json:
        regions = {"region_values": shares.region_values.tolist()}
        print_json(found.to_json() | {"modality_shares": asdict(shares) | regions})
        return 0
    print(f"{found.headline} ({found.method})")
    for token, value in zip(found.tokens, found.token_relevance, strict=True):
        print(f"{value:9.4f}  {printable(token)}")
    columns = found.patch_relevance.shape[1]
    for patch in (-found.patch_relevance).argsort(axis=None, kind="stable")[:3]:
        value = found.patch_relevance.flat[patch]
        print(f"{value:9.4f}  patch in row {patch // columns + 1}, column {patch % columns + 1}")
    print(f"share of the image {shares.image:.3f}, of the text {shares.text:.3f} (+- {shares.standard_error:.3f})")
    if out is not None:
        print(f"{printable(out)}: written")
    return 0
