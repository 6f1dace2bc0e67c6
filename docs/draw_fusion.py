"""Draw docs/fusion.svg: how early, late and hybrid fusion connect tokens, traced from the strategies themselves.

    python docs/draw_fusion.py

Each strategy fuses 3 text and 3 image tokens with one layer. Hooks record which tokens each layer attends to, and which
outputs the joint vector is made of. Mid-tone colors are readable on light and dark pages.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import torch

from mmbert import MMBertConfig, Tokens
from mmbert.model.fusion import FUSIONS
from mmbert.model.layers import FusionLayer, Pooler

DRAWN = ("early", "late", "hybrid")
NUM_TEXT = NUM_IMAGE = 3
NUM_TOKENS = NUM_TEXT + NUM_IMAGE
TEXT_COLOR, IMAGE_COLOR, NEUTRAL = "#388bfd", "#db6d28", "#768390"
PANEL, GAP = 300, 30
INPUT_Y, OUTPUT_Y, JOINT_Y, HEIGHT = 395, 265, 178, 445
SQUARE = 'width="20" height="20" rx="3"'


class Layer(NamedTuple):
    """One call of a fusion layer; tokens are numbered, text before image."""

    sequence: list[int]
    """Tokens that the layer updates; each attends to all of them."""
    context: list[int]
    """Tokens of the other stream that they attend to as well."""


class Connections(NamedTuple):
    """What a strategy with one fusion layer connects."""

    layers: list[Layer]
    pooled: list[int]
    """Output tokens that the joint vector is computed from."""


def trace(name: str) -> Connections:
    """Run a strategy once and record the inputs of its layers and of its pooler."""
    torch.manual_seed(0)
    width = 8
    # The layers of late fusion are an MLP on the pooled vectors; without it they reach the pooler unchanged.
    depth = 0 if name == "late" else 1
    config = MMBertConfig(fusion=name, fusion_layers=depth, hidden_size=width, num_attention_heads=2)
    fusion = FUSIONS[name](config).eval()
    inputs = torch.randn(1, NUM_TOKENS, width, requires_grad=True)
    text, image = inputs.split([NUM_TEXT, NUM_IMAGE], dim=1)
    layers: list[Layer] = []
    vectors: list[torch.Tensor] = []

    def origins(tokens: Tokens) -> list[int]:
        """The input token that each token of a layer's input was computed from."""
        found = []
        for state in tokens.hidden_states[0]:
            (gradient,) = torch.autograd.grad(state.square().sum(), inputs, retain_graph=True)
            found.append(int(gradient[0].abs().sum(dim=-1).argmax()))
        return found

    for module in fusion.modules():
        if isinstance(module, FusionLayer):
            module.register_forward_pre_hook(
                lambda _, args, kwargs: layers.append(
                    Layer(origins(args[0]), origins(kwargs["context"]) if "context" in kwargs else [])
                ),
                with_kwargs=True,
            )
        elif isinstance(module, Pooler):
            module.register_forward_pre_hook(lambda _, args: vectors.extend(torch.cat(args, dim=-1)[0].split(width)))
    fused = fusion(Tokens(text, text.new_ones(1, NUM_TEXT) > 0), Tokens(image, image.new_ones(1, NUM_IMAGE) > 0))
    outputs = torch.cat([fused.text.hidden_states, fused.image.hidden_states], dim=1)[0]
    pooled = [i for vector in vectors for i, output in enumerate(outputs) if torch.equal(vector, output)]
    return Connections(layers, pooled)


def color(token: int) -> str:
    """Color of a token's modality."""
    return TEXT_COLOR if token < NUM_TEXT else IMAGE_COLOR


def x_of(token: int) -> int:
    """Horizontal position of a token within its panel."""
    return 35 + 42 * token + (20 if token >= NUM_TEXT else 0)


def draw_token(token: int, y: int) -> str:
    """A circle for text, a square for an image patch."""
    x = x_of(token)
    shape = f'<circle cx="{x}" cy="{y}" r="11"' if token < NUM_TEXT else f'<rect x="{x - 10}" y="{y - 10}" {SQUARE}'
    return f'{shape} fill="{color(token)}"/>'


def draw_line(start: int, y1: int, x2: int, y2: int) -> str:
    """A connection in the color of the token that it comes from."""
    return f'<path d="M{x_of(start)} {y1}L{x2} {y2}" stroke="{color(start)}" stroke-width="1.6" opacity="0.7"/>'


def draw_text(x: int, y: int, size: int, content: str, fill: str = NEUTRAL, weight: int = 400) -> str:
    """Centered text."""
    return f'<text x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" fill="{fill}">{content}</text>'


def wrap(words: str, width: int = 25) -> list[str]:
    """Lines of at most `width` characters."""
    lines = [""]
    for word in words.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def draw_panel(name: str) -> list[str]:
    """One strategy: input tokens below, layers with their connections, output tokens, and the joint vector on top."""
    connections = trace(name)
    middle = PANEL // 2
    module_docstring = sys.modules[FUSIONS[name].__module__].__doc__ or ""
    title, _, subtitle = module_docstring.splitlines()[0].rstrip(".").partition(": ")
    parts = [draw_text(middle, 32, 31, title, weight=600)]
    parts += [draw_text(middle, 62 + 26 * i, 21, line) for i, line in enumerate(wrap(subtitle))]
    for layer in connections.layers:
        left, right = x_of(min(layer.sequence)) - 20, x_of(max(layer.sequence)) + 20
        parts.append(
            f'<rect x="{left}" y="{OUTPUT_Y - 20}" width="{right - left}" height="{INPUT_Y - OUTPUT_Y + 40}" rx="12" '
            f'fill="none" stroke="{NEUTRAL}" stroke-width="2"/>'
        )
        for target in layer.sequence:
            parts += [draw_line(i, INPUT_Y, x_of(target), OUTPUT_Y) for i in [*layer.sequence, *layer.context]]
    updated = {token for layer in connections.layers for token in layer.sequence}
    parts += [draw_line(i, INPUT_Y, x_of(i), OUTPUT_Y) for i in range(NUM_TOKENS) if i not in updated]
    parts += [draw_line(i, OUTPUT_Y, middle, JOINT_Y) for i in connections.pooled]
    parts += [draw_token(i, y) for y in (INPUT_Y, OUTPUT_Y) for i in range(NUM_TOKENS)]
    parts.append(f'<rect x="{middle - 82}" y="{JOINT_Y - 19}" width="164" height="38" rx="19" fill="{NEUTRAL}"/>')
    parts.append(draw_text(middle, JOINT_Y + 7, 22, "joint vector", fill="#ffffff"))
    parts.append(draw_text(x_of(1), HEIGHT - 8, 23, "text", fill=TEXT_COLOR, weight=600))
    parts.append(draw_text(x_of(NUM_TEXT + 1), HEIGHT - 8, 23, "image", fill=IMAGE_COLOR, weight=600))
    return parts


def draw() -> str:
    """The whole drawing as SVG."""
    width = len(DRAWN) * PANEL + (len(DRAWN) - 1) * GAP
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" role="img" '
        'font-family="system-ui, sans-serif" text-anchor="middle">',
        "<title>Connections between text and image tokens in early, late and hybrid fusion</title>",
    ]
    for i, name in enumerate(DRAWN):
        lines += [f'<g transform="translate({i * (PANEL + GAP)} 0)">', *draw_panel(name), "</g>"]
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    (Path(__file__).parent / "fusion.svg").write_text(draw(), encoding="utf-8")
