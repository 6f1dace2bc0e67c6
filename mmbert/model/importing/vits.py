"""Image encoders of published checkpoints as timm's ViTs."""

from typing import Any

import torch
from torch import Tensor

from mmbert.model.importing.base import Computed, State, count_layers, shape

OWN = "mmbert.image_encoder.vit"
VIT_MODULES = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
"""Modules with weight and bias of a block of timm's ViT."""


def fused(*names: str) -> Computed:
    """Concatenate the rows of tensors, such as query, key and value."""
    return Computed(names, lambda *parts: torch.cat(parts))


def positions_with_class(position: str) -> Computed:
    """Return a (P + 1, D) table of positions, that of the class token first, as timm's (1, P + 1, D)."""
    return Computed((position,), lambda table: table.unsqueeze(0))


def as_token(x: Tensor) -> Tensor:
    """Reshape a class token to timm's (1, 1, D)."""
    return x.reshape(1, 1, -1)


def sizes(width: int, *, depth: int, patch: int, positions: int, heads: int, inner: int) -> dict[str, Any]:
    """Return the keys of `Architecture` for a ViT with class token.

    Args:
        width: Features.
        depth: Layers.
        patch: Side of a patch, in pixels.
        positions: Rows of the table of positions, the class token's included.
        heads: Attention heads.
        inner: Width of the feed-forward blocks.
    """
    side = round((positions - 1) ** 0.5)
    arguments = {} if inner == 4 * width else {"mlp_ratio": inner / width}
    return {
        "image_layers": depth, "image_hidden_size": width, "image_num_attention_heads": heads, "patch_size": patch,
        "image_size": side * patch, "image_model_args": arguments,
    }  # fmt: skip


def timm_vit(state: State, prefix: str) -> tuple[dict[str, Any], dict[str, str | Computed]]:
    """Map a ViT with the names of timm, as ALBEF has it, with 64 features a head.

    Returns:
        Keys of `Architecture`, and parameters of the model.
    """
    depth = count_layers(state, f"{prefix}.blocks.")
    width, _, patch, _ = shape(state, f"{prefix}.patch_embed.proj.weight")
    inner = shape(state, f"{prefix}.blocks.0.mlp.fc1.weight")[0]
    positions = shape(state, f"{prefix}.pos_embed")[1]
    config = sizes(width, depth=depth, patch=patch, positions=positions, heads=max(1, width // 64), inner=inner)
    names = ["cls_token", "pos_embed", *(f"{m}.{kind}" for m in ("patch_embed.proj", "norm") for kind in KINDS)]
    names += [f"blocks.{i}.{m}.{kind}" for i in range(depth) for m in VIT_MODULES for kind in KINDS]
    return {**config, "image_model": "vit_base_patch16_224"}, {f"{OWN}.{name}": f"{prefix}.{name}" for name in names}


KINDS = ("weight", "bias")

CLIP_BLOCK = {
    "norm1": "ln_1", "norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "attn.proj": "attn.out_proj",
}  # fmt: skip
"""Modules of a block of timm's ViT -> of OpenAI's CLIP."""


def openai_block(own: str, theirs: str) -> dict[str, str | Computed]:
    """Map a block of CLIP's ViT with the names of OpenAI's code, which BridgeTower and METER keep."""
    names: dict[str, str | Computed] = {
        f"{own}.{a}.{kind}": f"{theirs}.{b}.{kind}" for a, b in CLIP_BLOCK.items() for kind in KINDS
    }
    return {**names, **{f"{own}.attn.qkv.{kind}": f"{theirs}.attn.in_proj_{kind}" for kind in KINDS}}
