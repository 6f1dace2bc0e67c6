"""BridgeTower (arXiv:2206.08657) with the names of transformers: `hybrid_bridge` over RoBERTa and CLIP's ViT."""

from typing import Any

import torch
from torch import Tensor

from mmbert.errors import UsageError
from mmbert.model.importing.albef import CROSS_LAYER
from mmbert.model.importing.base import Checkpoint, Computed, Plan, count_layers, shape
from mmbert.model.importing.names import BERT_LAYER, absent, embeddings, layers, mlm_head, modules
from mmbert.model.importing.vits import OWN, as_token, openai_block, positions_with_class, sizes

ROBERTA_OFFSET = 2
"""RoBERTa counts positions from 2, after that of padding."""


def plan(checkpoint: Checkpoint) -> Plan:
    """Plan the import of a model without heads, or with those for MLM, ITM or contrastive learning.

    Raises:
        UsageError: Options of the architecture that no published checkpoint has and mmbert can't express.
    """
    state, text, vision = (checkpoint.state, checkpoint.value("text_config", {}), checkpoint.value("vision_config", {}))
    for key, allowed in (
        ("share_cross_modal_transformer_layers", True), ("share_link_tower_layers", False), ("link_tower_type", "add"),
        ("hidden_act", "gelu"),
    ):  # fmt: skip
        checkpoint.require(key, allowed, allowed)
    prefix = "bridgetower." if any(name.startswith("bridgetower.") for name in state) else ""
    bert, vit = f"{prefix}text_model", f"{prefix}vision_model.visual"
    words = f"{bert}.embeddings.word_embeddings.weight"
    vocabulary, text_width = shape(state, words)
    width = shape(state, f"{prefix}cross_modal_text_transform.weight")[0]
    text_layers = count_layers(state, f"{bert}.encoder.layer.")
    image_layers = count_layers(state, f"{vit}.transformer.resblocks.")
    fusion_layers = count_layers(state, f"{prefix}cross_modal_text_layers.")
    if text_width != width or text_layers != image_layers:
        raise UsageError(
            f"'{checkpoint.source}': widths {text_width} (text), {width} (fusion), layers {text_layers} (text), "
            f"{image_layers} (image); mmbert imports towers of equal depth whose text is as wide as the fusion."
        )
    image_width, _, patch, _ = shape(state, f"{vit}.embeddings.patch_embedding.weight")
    inner = shape(state, f"{vit}.transformer.resblocks.0.mlp.c_fc.weight")[0]
    positions = shape(state, f"{vit}.embeddings.position_embedding.weight")[0]
    heads = image_width // 64
    config = {
        **sizes(image_width, depth=image_layers, patch=patch, positions=positions, heads=heads, inner=inner),
        "image_model": "vit_base_patch16_clip_quickgelu_224",
        "image_layer_norm_eps": float(vision.get("layer_norm_eps", 1e-5)), "fusion": "hybrid_bridge",
        "pooler": "separate", "bridge_text_norm": "none", "text_layers": text_layers, "fusion_layers": fusion_layers,
        "hidden_size": width, "num_attention_heads": text.get("num_attention_heads", 12),
        "intermediate_size": shape(state, f"{prefix}cross_modal_text_layers.0.intermediate.dense.weight")[0],
        "text_intermediate_size": shape(state, f"{bert}.encoder.layer.0.intermediate.dense.weight")[0],
        "vocab_size": vocabulary, "pad_token_id": text.get("pad_token_id", 1),
        "layer_norm_eps": float(checkpoint.value("layer_norm_eps", 1e-5)),
        "max_position_embeddings": shape(state, f"{bert}.embeddings.position_embeddings.weight")[0] - ROBERTA_OFFSET,
        "type_vocab_size": shape(state, f"{bert}.embeddings.token_type_embeddings.weight")[0],
    }  # fmt: skip
    tensors = {
        **embeddings(f"{bert}.embeddings"),
        "mmbert.text_encoder.bert.embeddings.position_embeddings.weight": Computed(
            (f"{bert}.embeddings.position_embeddings.weight",), lambda table: table[ROBERTA_OFFSET:]
        ),
        **layers("mmbert.text_encoder.bert.encoder.layer", f"{bert}.encoder.layer", range(text_layers), BERT_LAYER),
        **_image_encoder(vit, image_layers),
        **_bridges(prefix, vit, fusion_layers, projects_image=image_width != width),
    }
    for stream, number in (("text", 0), ("image", 1)):
        own, theirs = f"mmbert.fusion.{stream}_layers", f"{prefix}cross_modal_{stream}_layers"
        tensors |= layers(own, theirs, range(fusion_layers), CROSS_LAYER)
        tensors |= modules({f"mmbert.fusion.pooler.dense.{number}": f"{prefix}cross_modal_{stream}_pooler.dense"})
    out = Plan(config, tensors, absent("absent_text", "absent_image"), max_text_length=50)
    out.unused[f"{bert}.pooler."] = "BridgeTower does not read it"
    clip_mean, clip_std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    out.image_settings = {"mean": clip_mean, "std": clip_std}
    _add_heads(out, state, prefix, words)
    return out


def _image_encoder(vit: str, depth: int) -> dict[str, str | Computed]:
    """Map CLIP's ViT."""
    token = f"{vit}.embeddings.class_embedding"
    found: dict[str, str | Computed] = {
        f"{OWN}.cls_token": Computed((token,), as_token),
        f"{OWN}.pos_embed": positions_with_class(f"{vit}.embeddings.position_embedding.weight"),
        f"{OWN}.patch_embed.proj.weight": f"{vit}.embeddings.patch_embedding.weight",
        **modules({f"{OWN}.norm_pre": f"{vit}.ln_pre", f"{OWN}.norm": f"{vit}.ln_post"}),
    }
    for i in range(depth):
        found |= openai_block(f"{OWN}.blocks.{i}", f"{vit}.transformer.resblocks.{i}")
    return found


def _bridges(prefix: str, vit: str, count: int, *, projects_image: bool) -> dict[str, str | Computed]:
    """Map the bridges, whose projections hold the type embedding, and for the image CLIP's last LayerNorm.

    The last bridge reads the encoder's output, which is normalised already, and projected where the widths differ.
    """
    types = f"{prefix}token_type_embeddings.weight"
    found: dict[str, str | Computed] = {}
    for stream, number in (("text", 0), ("image", 1)):
        own, theirs = f"mmbert.fusion.{stream}_bridges", f"{prefix}cross_modal_{stream}_transform"
        weight, bias, norm = f"{theirs}.weight", f"{theirs}.bias", f"{vit}.ln_post"

        def add_type(bias: Tensor, types: Tensor, number: int = number) -> Tensor:
            return bias + types[number]

        def scaled_bias(bias: Tensor, types: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
            return bias + types[1] + weight @ shift

        for i in range(count):
            last, projection = i == count - 1, f"{own}.projections.{i}"
            found[f"{projection}.weight"] = weight
            found[f"{projection}.bias"] = Computed((bias, types), add_type)
            if stream == "image" and not last:
                found[f"{projection}.weight"] = Computed((weight, f"{norm}.weight"), lambda w, scale: w * scale)
                found[f"{projection}.bias"] = Computed((bias, types, weight, f"{norm}.bias"), scaled_bias)
            elif stream == "image" and projects_image:
                found[f"{projection}.weight"] = Computed((bias,), lambda bias: torch.eye(len(bias)))
                found[f"{projection}.bias"] = Computed((types,), lambda types: types[1])
            link = f"{prefix}cross_modal_{stream}_link_tower.{i - 1}.LayerNorm"
            found |= modules({f"{own}.norms.{i}": link if i else f"{prefix}cross_modal_{stream}_layernorm"})
        if stream == "image" and projects_image:
            found |= modules({"mmbert.image_projection": theirs})
    return found


def _add_heads(plan: Plan, state: Any, prefix: str, words: str) -> None:
    """Add the heads that the checkpoint has."""
    objectives: dict[str, Any] = {}
    if "mlm_score.bias" in state:
        head = mlm_head(state, "mlm_score", words)
        objectives["mlm"] = head.options
        plan.tensors |= head.tensors
        plan.unused |= head.unused
    if "itm_score.fc.weight" in state:
        objectives["itm"] = 1.0
        plan.tensors |= modules({"objectives.itm.head": "itm_score.fc"})
    if "itc_text_head.fc.weight" in state:
        objectives["itc"] = {"weight": 1.0, "embedding_size": shape(state, "itc_text_head.fc.weight")[0]}
        plan.tensors |= _contrastive(prefix)
        plan.unused["itc_cross_modal_head."] = "contrasts joint vectors with both modalities, in training only"
    plan.has_head = bool(objectives)
    if objectives:
        plan.config["objectives"] = objectives


def _contrastive(prefix: str) -> dict[str, str | Computed]:
    """Map the contrastive heads; that of images follows BridgeTower's projection and type embedding."""
    own, head = "objectives.itc.image_projection", "itc_image_head.fc"
    weight, bias = f"{prefix}cross_modal_image_transform.weight", f"{prefix}cross_modal_image_transform.bias"
    types = f"{prefix}token_type_embeddings.weight"
    found = modules({"objectives.itc.text_projection": "itc_text_head.fc"})
    found["objectives.itc.log_scale"] = Computed(("logit_scale",), lambda x: x.reshape(1))
    found[f"{own}.weight"] = Computed((f"{head}.weight", weight), lambda w, inner: w @ inner)
    found[f"{own}.bias"] = Computed(
        (f"{head}.weight", f"{head}.bias", bias, types), lambda w, b, inner, types: b + w @ (inner + types[1])
    )
    return found
