"""Render an explanation as one HTML page without external resources."""

import base64
import io
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader
from PIL import Image

from mmbert.errors import printable
from mmbert.inference.explanation.drawing import scaled
from mmbert.inference.explanation.explanation import METHOD_NAMES, Explanation

FILES = files("mmbert.inference.explanation")
SCALE = 480
"""Side of the embedded image in pixels, at least; small ones are enlarged without interpolation."""


def render(explanation: Explanation) -> str:
    """Render the page; every value is escaped, and is a single printable line."""
    rows, columns = explanation.patch_relevance.shape
    links = explanation.links
    data: dict[str, Any] = {
        "tokens": [printable(token) for token in explanation.tokens],
        "columns": columns,
        "token": scaled(explanation.token_relevance).round(4).tolist(),
        "patch": scaled(explanation.patch_relevance).flatten().round(4).tolist(),
        "links": None if links is None else links.reshape(len(links), -1).round(4).tolist(),
    }
    environment = Environment(
        autoescape=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
        loader=FunctionLoader(lambda name: FILES.joinpath(name).read_text(encoding="utf-8")),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(
        explanation=explanation,
        method=METHOD_NAMES[explanation.method],
        rows=rows,
        columns=columns,
        image=_data_uri(explanation),
        data=data,
    )


def _data_uri(explanation: Explanation) -> str:
    image = Image.fromarray(explanation.image)
    if image.width < SCALE:
        factor = -(-SCALE // image.width)
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
