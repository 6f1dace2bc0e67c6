"""`mmbert search INDEX QUERY`: find the images of an index that match a text or are similar to an image."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmbert.cli.command_line import add_allow_import, add_json, print_json, utf8_text
from mmbert.errors import printable
from mmbert.runtime.files import atomic_write_text, check_output_file

if TYPE_CHECKING:
    from mmbert.inference.index import SearchResult

SHEET = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ query }}</title><style>
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; padding: 20px; max-width: 1200px;
  overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; }
main { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 210px), 1fr)); }
figure { margin: 0; }
img { width: 100%; aspect-ratio: 1; object-fit: contain; background: rgb(128 128 128 / .15); border-radius: 6px; }
figcaption { font-size: .85rem; }
</style></head><body><h1>{{ query }}</h1><main>
{% for image, result in results %}
<figure>{% if image %}<img alt="" src="{{ image }}">{% else %}<p>This file can't be read any more.</p>{% endif %}
<figcaption>{{ loop.index }}. {{ result.kind }} {{ "%.4f" % result.score }}<br>{{ printable(result.path) }}</figcaption>
</figure>
{% endfor %}
</main></body></html>
"""


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `mmbert search`."""
    command.description = "Prints score and path of the images that match best, with the model that made the index."
    command.set_defaults(run=_search)
    command.add_argument("index", metavar="INDEX", help="A folder that mmbert index wrote.")
    command.add_argument("query", metavar="QUERY", type=utf8_text, help="A text, or the path of an image.")
    add_allow_import(command)
    command.add_argument("-k", type=int, default=10, help="Number of images (default 10).")
    command.add_argument("--rerank", type=int, default=0, metavar="N", help="Fuse the text with the N best images, "
                         "such as 32 and at least K, and order these by the probability of a match.")  # fmt: skip
    command.add_argument("--exact", action="store_true", help="Don't use the approximate index of --faiss.")
    command.add_argument("--html", metavar="FILE", help="Also write a page with the images to this file.")
    command.add_argument("--model", metavar="MODEL", help="The model's folder, if it was moved since.")
    command.add_argument("--device", help="cpu, cuda, cuda:1 ...; default: the GPU if there is one.")
    add_json(command)


def _search(
    *, index: str, query: str, k: int, rerank: int, exact: bool, html: str | None, model: str | None,
    device: str | None, json: bool,
) -> int:  # fmt: skip
    from mmbert.inference.index import load_index

    check_output_file(html, "--html")
    results = load_index(index, model, device).search(query, k, rerank=rerank, exact=exact)
    if html is not None:
        atomic_write_text(Path(html), render_contact_sheet(query, results))
    if json:
        print_json([result._asdict() for result in results])
        return 0
    for score, path in ((result.score, result.path) for result in results):
        print(f"{score:.4f}  {printable(path)}")
    if html is not None:
        print(f"{printable(html)}: written")
    return 0


def render_contact_sheet(query: str, results: Sequence["SearchResult"]) -> str:
    """Render one HTML page with small copies of the images, without external resources."""
    from jinja2 import Environment

    from mmbert.inference.index import thumbnail_uri

    images = [thumbnail_uri(result.path) for result in results]
    template = Environment(autoescape=True, trim_blocks=True).from_string(SHEET)
    return template.render(query=printable(query), results=[*zip(images, results, strict=True)], printable=printable)
