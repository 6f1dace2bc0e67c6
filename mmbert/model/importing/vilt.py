"""ViLT (arXiv:2102.03334) with the names of transformers: early fusion of word and patch embeddings, before any layer.

An image is resized to a square, where ViLT keeps its shape, pads it, and interpolates the positions for it.
"""

from typing import Any

import torch
from torch import Tensor

from mmbert.errors import UsageError
from mmbert.model.importing.base import Checkpoint, Computed, Plan, count_layers, shape
from mmbert.model.importing.names import absent, embeddings, layers, mlm_head, modules
from mmbert.model.importing.vits import OWN, sizes

PRE_NORM_LAYER = {
    "attention.norm": "layernorm_before",
    **{f"attention.{x}": f"attention.attention.{x}" for x in ("query", "key", "value")},
    "attention.output": "attention.output.dense",
    "feed_forward.norm": "layernorm_after",
    "feed_forward.up": "intermediate.dense",
    "feed_forward.down": "output.dense",
}
"""Modules of `SelfAttentionLayer` -> of the layers of transformers' ViTs, which apply the LayerNorm first."""

HEAD_EPS = 1e-5
"""Epsilon of the LayerNorm in ViLT's classifiers: that of torch, unlike in its layers."""


def plan(checkpoint: Checkpoint) -> Plan:
    """Plan the import of a model without heads, or with those for MLM, VQA, retrieval or NLVR2.

    Raises:
        UsageError: Another activation, the token classifier, or more than two images per text.
    """
    state = checkpoint.state
    checkpoint.require("hidden_act", "gelu", "gelu")
    prefix = "vilt." if any(name.startswith("vilt.") for name in state) else ""
    words = f"{prefix}embeddings.text_embeddings.word_embeddings.weight"
    vocabulary, width = shape(state, words)
    count, heads = count_layers(state, f"{prefix}encoder.layer."), checkpoint.value("num_attention_heads", 12)
    patch = shape(state, f"{prefix}embeddings.patch_embeddings.projection.weight")[2]
    positions = shape(state, f"{prefix}embeddings.position_embeddings")[1]
    text = f"{prefix}embeddings.text_embeddings"
    config: dict[str, Any] = {
        **sizes(width, depth=0, patch=patch, positions=positions, heads=heads, inner=4 * width),
        "image_model": "vit_base_patch16_224", "image_final_norm": False, "fusion": "early", "fusion_norm": "pre",
        "fusion_final_norm": True, "early_image_norm": False, "text_layers": 0, "fusion_layers": count,
        "hidden_size": width, "num_attention_heads": heads, "vocab_size": vocabulary,
        "intermediate_size": shape(state, f"{prefix}encoder.layer.0.intermediate.dense.weight")[0],
        "max_position_embeddings": shape(state, f"{text}.position_embeddings.weight")[0],
        "type_vocab_size": shape(state, f"{text}.token_type_embeddings.weight")[0],
        "layer_norm_eps": checkpoint.value("layer_norm_eps", 1e-12),
        "pad_token_id": checkpoint.value("pad_token_id", 0),
    }  # fmt: skip
    types = f"{prefix}embeddings.token_type_embeddings.weight"
    tensors = {
        **embeddings(text),
        # Nothing but the fusion reads the text embeddings, so their last bias can hold the type vector of texts.
        "mmbert.text_encoder.bert.embeddings.LayerNorm.bias": Computed((f"{text}.LayerNorm.bias", types), _add_text),
        f"{OWN}.cls_token": f"{prefix}embeddings.cls_token",
        f"{OWN}.pos_embed": f"{prefix}embeddings.position_embeddings",
        **modules({f"{OWN}.patch_embed.proj": f"{prefix}embeddings.patch_embeddings.projection"}),
        "mmbert.fusion.image_type": Computed((types,), lambda types: types[1]),
        **layers("mmbert.fusion.layers", f"{prefix}encoder.layer", range(count), PRE_NORM_LAYER),
        **modules(
            {
                f"mmbert.fusion.layers.{count - 1}.final_norm": f"{prefix}layernorm",
                "mmbert.fusion.pooler.dense": f"{prefix}pooler.dense",
            }
        ),
    }
    if not checkpoint.value("qkv_bias", True):
        for i in range(count):
            for x in ("query", "key", "value"):
                weight = f"{prefix}encoder.layer.{i}.attention.attention.{x}.weight"
                tensors[f"mmbert.fusion.layers.{i}.attention.{x}.bias"] = Computed((weight,), _zeros)
    out = Plan(config, tensors, absent("absent_text"), max_text_length=config["max_position_embeddings"])
    out.unused = {f"{text}.position_ids": "constant", f"{text}.token_type_ids": "constant"}
    _add_head(out, checkpoint, words, types)
    return out


def _add_text(bias: Tensor, types: Tensor) -> Tensor:
    return bias + types[0]


def _zeros(weight: Tensor) -> Tensor:
    return torch.zeros(len(weight))


def _add_head(plan: Plan, checkpoint: Checkpoint, words: str, types: str) -> None:
    """Add the head that the checkpoint has.

    Raises:
        UsageError: One that mmbert can't express.
    """
    state = checkpoint.state
    if "rank_output.weight" in state:  # one score, which becomes the log-odds of two classes
        plan.config["objectives"] = {"itm": 1.0}
        for kind in ("weight", "bias"):
            plan.tensors[f"objectives.itm.head.{kind}"] = Computed((f"rank_output.{kind}",), _two_classes)
    elif "mlm_score.transform.dense.weight" in state:
        head = mlm_head(state, "mlm_score", words)
        plan.config["objectives"] = {"mlm": head.options}
        plan.tensors |= head.tensors
        plan.unused |= head.unused
    elif "classifier.3.weight" in state:
        labels, inner = shape(state, "classifier.3.weight")
        images = shape(state, "classifier.0.weight")[1] // plan.config["hidden_size"]
        if inner != 2 * plan.config["hidden_size"]:
            raise UsageError(f"'{checkpoint.source}' classifies {images} images of a text; mmbert imports 1 or 2.")
        plan.config |= {
            "task": "vqa" if images == 1 else "decision", "num_images": images, "early_image_types": images,
            "labels": checkpoint.class_names(labels), "objectives": {}, "task_options": {"head_norm_eps": HEAD_EPS},
        }  # fmt: skip
        plan.tensors |= modules({f"task.head.{i}": f"classifier.{i}" for i in (0, 1, 3)})
        if images > 1:
            plan.tensors["mmbert.fusion.image_type"] = Computed((types,), lambda types: types[1 : 1 + images])
    elif "classifier.weight" in state:
        raise UsageError(f"'{checkpoint.source}' classifies tokens, for which mmbert has no head.")
    else:
        plan.has_head = False


def _two_classes(score: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(score), score])
