"""VisualBERT (arXiv:1908.03557) with the names of transformers: early fusion of words and region features."""

from mmbert.errors import UsageError
from mmbert.model.fusion.base import BERT_NAMES
from mmbert.model.importing.base import Checkpoint, Computed, Plan, count_layers, flip_rows, shape
from mmbert.model.importing.names import absent, embeddings, layers, mlm_head, modules

HEADS = {
    "VisualBertModel": None,
    "VisualBertForPreTraining": "mlm",
    "VisualBertForQuestionAnswering": "vqa",
    "VisualBertForVisualReasoning": "decision",
}


def plan(checkpoint: Checkpoint) -> Plan:
    """Plan the import. The model reads region features as `pixel_values`, with `image_mask`; see `image_features`.

    Raises:
        UsageError: A head that mmbert can't express, or `bypass_transformer`.
    """
    state = checkpoint.state
    prefix = "visual_bert." if any(name.startswith("visual_bert.") for name in state) else ""
    head = checkpoint.head or ("VisualBertForPreTraining" if "cls.predictions.bias" in state else "VisualBertModel")
    if head not in HEADS:
        raise UsageError(f"'{checkpoint.source}' is a {head}; of VisualBERT mmbert imports {', '.join(HEADS)}.")
    checkpoint.require("hidden_act", "gelu", "gelu")
    checkpoint.require("bypass_transformer", False, False)
    words = f"{prefix}embeddings.word_embeddings.weight"
    vocabulary, width = shape(state, words)
    count = count_layers(state, f"{prefix}encoder.layer.")
    config = {
        "fusion": "early", "text_layers": 0, "image_layers": 0, "fusion_layers": count, "hidden_size": width,
        "num_attention_heads": checkpoint.value("num_attention_heads", 12), "vocab_size": vocabulary,
        "intermediate_size": shape(state, f"{prefix}encoder.layer.0.intermediate.dense.weight")[0],
        "max_position_embeddings": shape(state, f"{prefix}embeddings.position_embeddings.weight")[0],
        "type_vocab_size": shape(state, f"{prefix}embeddings.token_type_embeddings.weight")[0],
        "layer_norm_eps": checkpoint.value("layer_norm_eps", 1e-12),
        "pad_token_id": checkpoint.value("pad_token_id", 1),
        "image_features": shape(state, f"{prefix}embeddings.visual_projection.weight")[1], "project_image": True,
    }  # fmt: skip
    types, positions = (f"{prefix}embeddings.visual_{name}_embeddings.weight" for name in ("token_type", "position"))
    tensors = {
        **embeddings(f"{prefix}embeddings"),
        **modules(
            {
                "mmbert.image_projection": f"{prefix}embeddings.visual_projection",
                "mmbert.fusion.image_norm": f"{prefix}embeddings.LayerNorm",
                "mmbert.fusion.pooler.dense": f"{prefix}pooler.dense",
            }
        ),
        # Every region has type 1 and position 0, without `image_text_alignment`.
        "mmbert.fusion.image_type": Computed((types, positions), lambda types, positions: types[1] + positions[0]),
        **layers("mmbert.fusion.layers", f"{prefix}encoder.layer", range(count), BERT_NAMES),
    }
    out = Plan(config, tensors, absent("absent_text"))
    out.unused[f"{prefix}embeddings.position_ids"] = "constant"
    if HEADS[head] in ("vqa", "decision"):
        task, classes = HEADS[head], shape(state, "cls.weight")[0]
        config |= {"task": task, "labels": checkpoint.class_names(classes), "objectives": {}}
        config["task_options"] = {"head": "linear", **({"loss": "softmax"} if task == "vqa" else {})}
        tensors |= modules({"task.head.0": "cls"})
        if task == "vqa":  # reads the token before [SEP]
            config |= {"pooler": "none", "early_pool": "last"}
            for kind in ("weight", "bias"):
                del tensors[f"mmbert.fusion.pooler.dense.{kind}"]
            out.unused[f"{prefix}pooler."] = "VisualBERT's VQA head does not read it"
        return out
    if HEADS[head] is None:
        out.has_head = False
        return out
    mlm = mlm_head(state, "cls.predictions", words)
    out.tensors |= mlm.tensors
    out.unused |= mlm.unused
    config["objectives"] = {"mlm": mlm.options, "itm": 1.0}
    for kind in ("weight", "bias"):  # class 0 of the original is a match
        out.tensors[f"objectives.itm.head.{kind}"] = Computed((f"cls.seq_relationship.{kind}",), flip_rows)
    return out
