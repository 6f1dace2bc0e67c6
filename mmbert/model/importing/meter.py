"""METER (arXiv:2111.02387) with the names of the authors' files: `hybrid` over RoBERTa or BERT and CLIP's ViT."""

from typing import Any

import torch
from torch import Tensor

from mmbert.errors import UsageError
from mmbert.model.importing.albef import CROSS_LAYER
from mmbert.model.importing.base import Checkpoint, Computed, Plan, count_layers, shape
from mmbert.model.importing.bridgetower import ROBERTA_OFFSET
from mmbert.model.importing.names import BERT_LAYER, absent, embeddings, layers, mlm_head, modules
from mmbert.model.importing.vits import OWN, as_token, openai_block, positions_with_class, sizes

TEXT, VIT = "text_transformer", "vit_model.visual"
CLASSIFIERS = {"vqa_classifier": "vqa", "snli_classifier": "decision"}
"""Classifier of a checkpoint -> task."""
HEAD_EPS = 1e-5
"""Epsilon of the LayerNorm in the classifiers: that of torch."""


def plan(checkpoint: Checkpoint) -> Plan:
    """Plan the import of a pre-training, VQA, entailment or retrieval checkpoint, with 64 features a head.

    Raises:
        UsageError: A Swin transformer, or the types of the second image in NLVR2, which mmbert can't express.
    """
    state = checkpoint.state
    if f"{VIT}.conv1.weight" not in state:
        raise UsageError(
            f"'{checkpoint.source}': METER with a Swin transformer; mmbert imports it with CLIP's ViT only."
        )
    if "nlvr2_classifier.0.weight" in state:
        raise UsageError(
            f"'{checkpoint.source}': METER's NLVR2 adds another type vector to the tokens of the second image, which "
            "hybrid does not have."
        )
    words = f"{TEXT}.embeddings.word_embeddings.weight"
    vocabulary, text_width = shape(state, words)
    width = shape(state, "cross_modal_text_transform.weight")[0]
    text_layers, fusion_layers = (
        count_layers(state, x) for x in (f"{TEXT}.encoder.layer.", "cross_modal_text_layers.")
    )
    image_layers = count_layers(state, f"{VIT}.transformer.resblocks.")
    image_width, _, patch, _ = shape(state, f"{VIT}.conv1.weight")
    positions = shape(state, f"{VIT}.positional_embedding")[0]
    types = shape(state, f"{TEXT}.embeddings.token_type_embeddings.weight")[0]
    offset = ROBERTA_OFFSET if types == 1 else 0  # BERT has two types
    inner = shape(state, f"{VIT}.transformer.resblocks.0.mlp.c_fc.weight")[0]
    heads = image_width // 64
    config: dict[str, Any] = {
        **sizes(image_width, depth=image_layers, patch=patch, positions=positions, heads=heads, inner=inner),
        "image_model": "vit_base_patch16_clip_quickgelu_224", "fusion": "hybrid", "pooler": "separate",
        "project_text": True, "project_image": True, "text_layers": text_layers, "fusion_layers": fusion_layers,
        "hidden_size": width, "num_attention_heads": width // 64, "text_hidden_size": text_width,
        "text_num_attention_heads": text_width // 64, "vocab_size": vocabulary, "type_vocab_size": types,
        "intermediate_size": shape(state, "cross_modal_text_layers.0.intermediate.dense.weight")[0],
        "text_intermediate_size": shape(state, f"{TEXT}.encoder.layer.0.intermediate.dense.weight")[0],
        "layer_norm_eps": 1e-12, "text_layer_norm_eps": 1e-5 if offset else 1e-12, "pad_token_id": 1 if offset else 0,
        "max_position_embeddings": shape(state, f"{TEXT}.embeddings.position_embeddings.weight")[0] - offset,
    }  # fmt: skip
    token = f"{VIT}.class_embedding"
    tensors: dict[str, str | Computed] = {
        **embeddings(f"{TEXT}.embeddings"),
        "mmbert.text_encoder.bert.embeddings.position_embeddings.weight": Computed(
            (f"{TEXT}.embeddings.position_embeddings.weight",), lambda table: table[offset:]
        ),
        **layers("mmbert.text_encoder.bert.encoder.layer", f"{TEXT}.encoder.layer", range(text_layers), BERT_LAYER),
        f"{OWN}.cls_token": Computed((token,), as_token),
        f"{OWN}.pos_embed": positions_with_class(f"{VIT}.positional_embedding"),
        f"{OWN}.patch_embed.proj.weight": f"{VIT}.conv1.weight",
        **modules({f"{OWN}.norm_pre": f"{VIT}.ln_pre", f"{OWN}.norm": f"{VIT}.ln_post"}),
    }
    for i in range(image_layers):
        tensors |= openai_block(f"{OWN}.blocks.{i}", f"{VIT}.transformer.resblocks.{i}")
    for stream, number in (("text", 0), ("image", 1)):

        def add_type(bias: Tensor, types: Tensor, number: int = number) -> Tensor:
            return bias + types[number]

        theirs = f"cross_modal_{stream}"
        tensors[f"mmbert.{stream}_projection.weight"] = f"{theirs}_transform.weight"
        tensors[f"mmbert.{stream}_projection.bias"] = Computed(
            (f"{theirs}_transform.bias", "token_type_embeddings.weight"), add_type
        )
        tensors |= layers(f"mmbert.fusion.{stream}_layers", f"{theirs}_layers", range(fusion_layers), CROSS_LAYER)
        tensors |= modules({f"mmbert.fusion.pooler.dense.{number}": f"{theirs}_pooler.dense"})
    out = Plan(config, tensors, absent("absent_text", "absent_image"), max_text_length=50)
    out.unused = {name: "of CLIP's text tower" for name in ("token_embedding", "positional_embedding", "ln_final")}
    out.unused = {f"vit_model.{name}": reason for name, reason in out.unused.items()}
    out.unused[f"{TEXT}.pooler."] = "METER does not read it"
    out.unused |= {f"{TEXT}.embeddings.{name}_ids": "constant" for name in ("position", "token_type")}
    clip_mean, clip_std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    out.image_settings = {"mean": clip_mean, "std": clip_std}
    _add_heads(out, checkpoint)
    return out


def _add_heads(plan: Plan, checkpoint: Checkpoint) -> None:
    """Add the heads of a task, or else those of pre-training."""
    state = checkpoint.state
    for name, task in CLASSIFIERS.items():
        if f"{name}.3.weight" in state:
            plan.config |= {
                "task": task, "labels": checkpoint.class_names(shape(state, f"{name}.3.weight")[0]), "objectives": {},
                "task_options": {"head_norm_eps": HEAD_EPS},
            }  # fmt: skip
            plan.tensors |= modules({f"task.head.{i}": f"{name}.{i}" for i in (0, 1, 3)})
            return
    objectives: dict[str, Any] = {}
    if "mlm_score.bias" in state:
        head = mlm_head(state, "mlm_score", f"{TEXT}.embeddings.word_embeddings.weight")
        objectives["mlm"] = head.options
        plan.tensors |= head.tensors
        plan.unused |= head.unused
    if "rank_output.weight" in state:  # one score, which becomes the log-odds of two classes
        objectives["itm"] = 1.0
        plan.unused["itm_score."] = "frozen, and replaced by rank_output"
        for kind in ("weight", "bias"):
            score = f"rank_output.{kind}"
            plan.tensors[f"objectives.itm.head.{kind}"] = Computed((score,), lambda x: torch.cat([x * 0, x]))
    elif "itm_score.fc.weight" in state:
        objectives["itm"] = 1.0
        plan.tensors |= modules({"objectives.itm.head": "itm_score.fc"})
    plan.has_head = bool(objectives)
    if objectives:
        plan.config["objectives"] = objectives
