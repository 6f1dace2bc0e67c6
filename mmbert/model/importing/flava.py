"""FLAVA (arXiv:2112.04482) with the names of transformers: early fusion of two encoders with a class token."""

from typing import Any

import torch
from torch import Tensor

from mmbert.errors import UsageError
from mmbert.model.importing.base import Checkpoint, Computed, Plan, count_layers, shape
from mmbert.model.importing.names import embeddings, layers, mlm_head, modules
from mmbert.model.importing.two_towers import CLIP_IMAGES
from mmbert.model.importing.vilt import PRE_NORM_LAYER
from mmbert.model.importing.vits import Tower, vit_tower

MAX_TEXT_LENGTH = 77
"""Tokens at which FLAVA's processor truncates."""
MIM = ("mim_head", "mmm_image_head", "image_codebook")
"""Modules for masked image modeling: heads, and the tokenizer of images that gives their labels."""


def plan(checkpoint: Checkpoint) -> Plan:
    """Plan the import of FlavaModel or FlavaForPreTraining, with the contrastive head that both have.

    Raises:
        UsageError: Another activation, encoders of other widths than the fusion, or a fusion without a class token.
    """
    prefix = "flava." if any(name.startswith("flava.") for name in checkpoint.state) else ""
    texts, images, fusion = (
        # Files of older versions of transformers have the values that hold in a second place.
        checkpoint._replace(config=checkpoint.value(f"{x}_config", {}) | checkpoint.value(f"{x}_config_dict", {}))
        for x in ("text", "image", "multimodal")
    )
    for part in (texts, images, fusion):
        for key, allowed in (("hidden_act", "gelu"), ("qkv_bias", True)):
            part.require(key, allowed, allowed)
    fusion.require("use_cls_token", True, True)
    text, image = _text_tower(texts, f"{prefix}text_model"), vit_tower(images, f"{prefix}image_model")
    state, joint = checkpoint.state, f"{prefix}multimodal_model"
    width, count = shape(state, f"{joint}.cls_token")[-1], count_layers(state, f"{joint}.encoder.layer.")
    if {text.width, image.width} != {width}:
        raise UsageError(
            f"'{checkpoint.source}': widths {text.width} (text), {image.width} (image), {width} (fusion); mmbert "
            "imports FLAVA with equal widths."
        )
    config: dict[str, Any] = {
        **image.config, **text.config, "fusion": "early", "fusion_norm": "pre", "fusion_final_norm": True,
        "early_image_norm": False, "early_class_token": True, "early_inputs": "last_layer", "fusion_layers": count,
        "hidden_size": width, "num_attention_heads": fusion.value("num_attention_heads", 12),
        "intermediate_size": shape(state, f"{joint}.encoder.layer.0.intermediate.dense.weight")[0],
        "layer_norm_eps": fusion.value("layer_norm_eps", 1e-12),
    }  # fmt: skip
    token = f"{joint}.cls_token"
    tensors: dict[str, str | Computed] = {
        **text.tensors, **image.tensors,
        "mmbert.fusion.class_token": Computed((token,), torch.flatten),
        "mmbert.fusion.image_type": Computed((token,), lambda x: torch.zeros(x.shape[-1])),
        **layers("mmbert.fusion.layers", f"{joint}.encoder.layer", range(count), PRE_NORM_LAYER),
        **modules({f"mmbert.fusion.{x}_input": f"{prefix}{x}_to_mm_projection" for x in ("text", "image")}),
        **modules({f"mmbert.fusion.layers.{count - 1}.final_norm": f"{joint}.layernorm"}),
    }  # fmt: skip
    out = Plan(config, tensors, max_text_length=min(MAX_TEXT_LENGTH, config["max_position_embeddings"]))
    out.image_settings = CLIP_IMAGES
    out.unused = {
        **{f"{prefix}{x}_model.pooler.": "FLAVA's objectives do not read it" for x in ("text", "image")},
        f"{prefix}image_model.embeddings.mask_token": "stands for masked patches, which mmbert does not have",
        **{f"{prefix}text_model.embeddings.{x}_ids": "constant" for x in ("position", "token_type")},
    }
    _add_heads(out, checkpoint, prefix, texts)
    return out


def _text_tower(part: Checkpoint, prefix: str) -> Tower:
    """Map the text encoder."""
    state = part.state
    vocabulary, width = shape(state, f"{prefix}.embeddings.word_embeddings.weight")
    depth, heads = count_layers(state, f"{prefix}.encoder.layer."), part.value("num_attention_heads", 12)
    config = {
        "text_tower": "flava", "text_layers": depth, "text_hidden_size": width, "text_num_attention_heads": heads,
        "text_intermediate_size": shape(state, f"{prefix}.encoder.layer.0.intermediate.dense.weight")[0],
        "text_layer_norm_eps": part.value("layer_norm_eps", 1e-12), "vocab_size": vocabulary,
        "max_position_embeddings": shape(state, f"{prefix}.embeddings.position_embeddings.weight")[0],
        "type_vocab_size": shape(state, f"{prefix}.embeddings.token_type_embeddings.weight")[0],
        "pad_token_id": part.value("pad_token_id", 0),
    }  # fmt: skip
    tensors = {
        **embeddings(f"{prefix}.embeddings"),
        **layers("mmbert.text_encoder.layers", f"{prefix}.encoder.layer", range(depth), PRE_NORM_LAYER),
        **modules({"mmbert.text_encoder.norm": f"{prefix}.layernorm"}),
    }
    return Tower(config, tensors, width, heads)


def _add_heads(plan: Plan, checkpoint: Checkpoint, prefix: str, texts: Checkpoint) -> None:
    """Add the contrastive head, and of FlavaForPreTraining those of the fusion for MLM and ITM.

    Raises:
        UsageError: The head for MLM has another epsilon than the fusion.
    """
    state = checkpoint.state
    size = shape(state, f"{prefix}text_projection.weight")[0]
    objectives: dict[str, Any] = {"itc": {"weight": 1.0, "embedding_size": size}}
    plan.tensors |= modules({f"objectives.itc.{x}_projection": f"{prefix}{x}_projection" for x in ("text", "image")})
    plan.tensors["objectives.itc.log_scale"] = Computed((f"{prefix}logit_scale",), _as_vector)
    pooler = f"{prefix}multimodal_model.pooler"
    if "itm_head.seq_relationship.weight" in state:
        texts.require("layer_norm_eps", plan.config["layer_norm_eps"], 1e-12)
        head = mlm_head(state, "mmm_text_head", f"{prefix}text_model.embeddings.word_embeddings.weight")
        objectives |= {"mlm": head.options, "itm": 1.0}
        plan.tensors |= head.tensors | modules({"objectives.itm.head": "itm_head.seq_relationship"})
        plan.unused |= {
            **head.unused,
            f"{pooler}.": "the head for ITM has a pooler of its own",
            "mlm_head.": "predicts words of a text without an image; the head of mmbert reads the fusion",
            **{f"{name}.": "predicts codes of image patches, which mmbert does not" for name in MIM},
        }
        pooler = "itm_head.pooler"
    plan.tensors |= modules({"mmbert.fusion.pooler.dense": f"{pooler}.dense"})
    plan.config["objectives"] = objectives


def _as_vector(x: Tensor) -> Tensor:
    return x.reshape(1)
