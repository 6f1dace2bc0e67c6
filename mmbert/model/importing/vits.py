"""Image encoders of published checkpoints as timm's ViTs."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmbert.errors import UsageError
from mmbert.model.importing.base import Checkpoint, Computed, State, count_layers, shape
from mmbert.model.importing.names import layers, modules

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


class Tower(NamedTuple):
    """An encoder of a checkpoint."""

    config: dict[str, Any]  # keys of `Architecture`
    tensors: dict[str, str | Computed]
    width: int
    heads: int
    pooler: str | None = None  # module of the checkpoint that pools its first state: linear, then tanh


CLIP_MODELS = {"quick_gelu": "vit_base_patch16_clip_quickgelu_224", "gelu": "vit_base_patch16_clip_224"}
"""Activation -> timm's ViT with the LayerNorm of CLIP before the first layer."""


def clip_tower(part: Checkpoint, prefix: str) -> Tower:
    """Map CLIP's ViT with the names of transformers.

    Args:
        part: Checkpoint with the configuration of this encoder.
        prefix: Before "embeddings".

    Raises:
        UsageError: An activation that CLIP's ViTs of timm do not have.
    """
    state, theirs = part.state, f"{prefix}.encoder.layers"
    act = part.value("hidden_act", "quick_gelu")
    if act not in CLIP_MODELS:
        raise UsageError(f"'{part.source}': config.json has hidden_act={act!r}; mmbert has {', '.join(CLIP_MODELS)}.")
    depth, heads = count_layers(state, f"{theirs}."), part.value("num_attention_heads", 12)
    width, _, patch, _ = shape(state, f"{prefix}.embeddings.patch_embedding.weight")
    positions = f"{prefix}.embeddings.position_embedding.weight"
    inner = shape(state, f"{theirs}.0.mlp.fc1.weight")[0]
    config = sizes(width, depth=depth, patch=patch, positions=shape(state, positions)[0], heads=heads, inner=inner)
    config |= {"image_model": CLIP_MODELS[act], "image_layer_norm_eps": part.value("layer_norm_eps", 1e-5)}
    names = {"norm1": "layer_norm1", "norm2": "layer_norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    tensors: dict[str, str | Computed] = {
        f"{OWN}.cls_token": Computed((f"{prefix}.embeddings.class_embedding",), as_token),
        f"{OWN}.pos_embed": positions_with_class(positions),
        f"{OWN}.patch_embed.proj.weight": f"{prefix}.embeddings.patch_embedding.weight",
        **modules({f"{OWN}.norm_pre": f"{prefix}.pre_layrnorm", f"{OWN}.norm": f"{prefix}.post_layernorm"}),
        **layers(f"{OWN}.blocks", theirs, range(depth), {**names, "attn.proj": "self_attn.out_proj"}),
        **_joined_attention(theirs, depth, [f"self_attn.{x}_proj" for x in "qkv"]),
    }
    return Tower(config, tensors, width, heads)


def vit_tower(part: Checkpoint, prefix: str) -> Tower:
    """Map transformers' ViT; see `clip_tower`.

    Raises:
        UsageError: Another activation, or no biases of the queries.
    """
    for key, allowed in (("hidden_act", "gelu"), ("qkv_bias", True), ("pooler_act", "tanh")):
        part.require(key, allowed, allowed)
    state, theirs = part.state, f"{prefix}.encoder.layer"
    depth, heads = count_layers(state, f"{theirs}."), part.value("num_attention_heads", 12)
    width, _, patch, _ = shape(state, f"{prefix}.embeddings.patch_embeddings.projection.weight")
    positions = f"{prefix}.embeddings.position_embeddings"
    inner = shape(state, f"{theirs}.0.intermediate.dense.weight")[0]
    config = sizes(width, depth=depth, patch=patch, positions=shape(state, positions)[1], heads=heads, inner=inner)
    config |= {"image_model": "vit_base_patch16_224", "image_layer_norm_eps": part.value("layer_norm_eps", 1e-12)}
    names = {
        "norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
    }  # fmt: skip
    embedding = f"{prefix}.embeddings.patch_embeddings.projection"
    tensors: dict[str, str | Computed] = {
        f"{OWN}.cls_token": f"{prefix}.embeddings.cls_token",
        f"{OWN}.pos_embed": positions,
        **modules({f"{OWN}.patch_embed.proj": embedding, f"{OWN}.norm": f"{prefix}.layernorm"}),
        **layers(f"{OWN}.blocks", theirs, range(depth), names),
        **_joined_attention(theirs, depth, [f"attention.attention.{x}" for x in ("query", "key", "value")]),
    }
    pooler = f"{prefix}.pooler.dense"
    return Tower(config, tensors, width, heads, pooler if f"{pooler}.weight" in state else None)


def _joined_attention(theirs: str, depth: int, names: list[str]) -> dict[str, str | Computed]:
    """Map separate queries, keys and values to the one matrix of timm's blocks."""
    return {
        f"{OWN}.blocks.{i}.attn.qkv.{kind}": fused(*(f"{theirs}.{i}.{name}.{kind}" for name in names))
        for i in range(depth)
        for kind in KINDS
    }
