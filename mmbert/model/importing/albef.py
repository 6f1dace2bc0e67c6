"""ALBEF (arXiv:2107.07651) with the names of the authors' files: `hybrid_cross` over a ViT and half of BERT."""

import torch

from mmbert.errors import UsageError
from mmbert.model.fusion.base import BERT_NAMES
from mmbert.model.importing.base import Checkpoint, Computed, Plan, count_layers, shape
from mmbert.model.importing.names import BERT_LAYER, absent, embeddings, layers, mlm_head, modules
from mmbert.model.importing.vits import timm_vit

CROSS_LAYER = {
    **BERT_NAMES,
    **{f"cross_attention.{x}": f"crossattention.self.{x}" for x in ("query", "key", "value")},
    "cross_attention.output": "crossattention.output.dense",
    "cross_attention.norm": "crossattention.output.LayerNorm",
}
"""Modules of `CrossAttentionLayer` -> of ALBEF's and BLIP's text layers with cross-attention."""

MOMENTUM = ("visual_encoder_m.", "text_encoder_m.", "vision_proj_m.", "text_proj_m.", "combine_", "cls_head_m.")
QUEUES = ("image_queue", "text_queue", "queue_ptr", "idx_queue", "ptr_queue")
LABELS = ["contradiction", "neutral", "entailment"]
"""Order of the authors' classes for entailment (SNLI-VE)."""


def plan(checkpoint: Checkpoint) -> Plan:
    """Plan the import of a pre-training, retrieval or entailment checkpoint.

    Raises:
        UsageError: The answer decoder of VQA, or the doubled layers of NLVR2, which mmbert does not have.
    """
    state = checkpoint.state
    if any(name.startswith("text_decoder.") for name in state):
        raise UsageError(f"'{checkpoint.source}': ALBEF's VQA generates answers with a decoder, which mmbert lacks.")
    bert = "text_encoder.bert" if any(name.startswith("text_encoder.bert.") for name in state) else "text_encoder"
    if any(".crossattention.0." in name or ".crossattention1." in name for name in state):
        raise UsageError(f"'{checkpoint.source}': ALBEF's NLVR2 attends to two images in each layer; mmbert does not.")
    depth = count_layers(state, f"{bert}.encoder.layer.")
    first = min((i for i in range(depth) if f"{bert}.encoder.layer.{i}.crossattention.self.query.weight" in state),
                default=depth)  # fmt: skip
    words = f"{bert}.embeddings.word_embeddings.weight"
    vocabulary, width = shape(state, words)
    vit, image_tensors = timm_vit(state, "visual_encoder")
    inner = shape(state, f"{bert}.encoder.layer.0.intermediate.dense.weight")[0]
    config = {
        **vit, "fusion": "hybrid_cross", "pooler": "none", "text_layers": first, "fusion_layers": depth - first,
        "hidden_size": width, "num_attention_heads": max(1, width // 64), "vocab_size": vocabulary,
        "intermediate_size": inner, "text_intermediate_size": inner, "layer_norm_eps": 1e-12,
        "max_position_embeddings": shape(state, f"{bert}.embeddings.position_embeddings.weight")[0],
        "type_vocab_size": shape(state, f"{bert}.embeddings.token_type_embeddings.weight")[0],
    }  # fmt: skip
    text = "mmbert.text_encoder.bert.encoder.layer"
    tensors = {
        **image_tensors,
        **embeddings(f"{bert}.embeddings"),
        **layers(text, f"{bert}.encoder.layer", range(first), BERT_LAYER),
        **layers("mmbert.fusion.layers", f"{bert}.encoder.layer", range(first, depth), CROSS_LAYER),
    }
    out = Plan(config, tensors, absent("absent_text"))
    out.unused = {name: "of the momentum model, which trains only" for name in MOMENTUM}
    out.unused |= {name: "negatives of training" for name in QUEUES}
    out.unused[f"{bert}.embeddings.position_ids"] = "constant"
    clip_mean, clip_std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    out.image_settings = {"mean": clip_mean, "std": clip_std}
    if "cls_head.0.weight" in state:
        classes = shape(state, "cls_head.2.weight")[0]
        names = LABELS if classes == 3 and not checkpoint.labels else checkpoint.class_names(classes)
        config |= {"task": "decision", "labels": names, "objectives": {}, "task_options": {"head": "relu"}}
        out.tensors |= modules({"task.head.0": "cls_head.0", "task.head.2": "cls_head.2"})
        return out
    objectives: dict[str, object] = {}
    if "text_encoder.cls.predictions.bias" in state:
        head = mlm_head(state, "text_encoder.cls.predictions", words)
        objectives["mlm"] = head.options
        out.tensors |= head.tensors
        out.unused |= head.unused
    if "itm_head.weight" in state:
        objectives["itm"] = {"weight": 1.0, "negatives": "hard"} if "vision_proj.weight" in state else 1.0
        out.tensors |= modules({"objectives.itm.head": "itm_head"})
    if "vision_proj.weight" in state:
        size = shape(state, "vision_proj.weight")[0]
        objectives["itc"] = {"weight": 1.0, "embedding_size": size}
        out.tensors |= modules(
            {"objectives.itc.image_projection": "vision_proj", "objectives.itc.text_projection": "text_proj"}
        )
        out.tensors["objectives.itc.log_scale"] = Computed(("temp",), lambda x: -torch.log(x).reshape(1))
    if objectives:
        config["objectives"] = objectives
    out.has_head = bool(objectives)
    return out
