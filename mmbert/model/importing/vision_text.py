"""VisionTextDualEncoder of transformers: BERT or RoBERTa with its pooler, and CLIP's ViT or a ViT, for ITC.

Its training of the text encoder against a fixed image encoder is LiT (arXiv:2111.07991).
"""

from mmbert.errors import UsageError
from mmbert.model.importing.base import Checkpoint, Computed, Plan, count_layers, shape
from mmbert.model.importing.bridgetower import ROBERTA_OFFSET
from mmbert.model.importing.names import BERT_LAYER, embeddings, layers
from mmbert.model.importing.two_towers import CLIP_IMAGES, plan_two_towers
from mmbert.model.importing.vits import Tower, clip_tower, vit_tower

TEXT, IMAGE = "text_model", "vision_model"
TEXT_OFFSETS = {"bert": 0, "roberta": ROBERTA_OFFSET}
"""Text encoder -> its first position."""
IMAGE_TOWERS = {"clip_vision_model": clip_tower, "vit": vit_tower}


def plan(checkpoint: Checkpoint) -> Plan:
    """Plan the import.

    Raises:
        UsageError: Another text or image encoder, or options of them that mmbert can't express.
    """
    text, image = (
        checkpoint._replace(config=checkpoint.value(f"{x}_config", {"model_type": default}))
        for x, default in (("text", "bert"), ("vision", "clip_vision_model"))
    )
    for part, allowed in ((text, TEXT_OFFSETS), (image, IMAGE_TOWERS)):
        kind = part.config.get("model_type")
        if kind not in allowed:
            raise UsageError(
                f"'{checkpoint.source}' has an encoder of type {kind!r}; of VisionTextDualEncoder mmbert imports "
                f"{', '.join(allowed)}."
            )
    kind = image.config["model_type"]
    nested = f"{IMAGE}.{IMAGE}"  # written by older versions of transformers
    prefix = nested if any(name.startswith(f"{nested}.") for name in checkpoint.state) else IMAGE
    out = plan_two_towers(checkpoint, _bert(text), IMAGE_TOWERS[kind](image, prefix))
    out.unused = {f"{TEXT}.embeddings.{name}_ids": "constant" for name in ("position", "token_type")}
    out.unused[f"{prefix}.embeddings.position_ids"] = "constant"
    if kind == "clip_vision_model":
        out.image_settings = CLIP_IMAGES
    return out


def _bert(part: Checkpoint) -> Tower:
    """Map the text encoder."""
    state, offset = part.state, TEXT_OFFSETS[part.config["model_type"]]
    part.require("position_embedding_type", "absolute", "absolute")
    positions = f"{TEXT}.embeddings.position_embeddings.weight"
    vocabulary, width = shape(state, f"{TEXT}.embeddings.word_embeddings.weight")
    depth, heads = count_layers(state, f"{TEXT}.encoder.layer."), part.value("num_attention_heads", 12)
    config = {
        "text_layers": depth, "text_hidden_size": width, "text_num_attention_heads": heads, "vocab_size": vocabulary,
        "text_intermediate_size": shape(state, f"{TEXT}.encoder.layer.0.intermediate.dense.weight")[0],
        "text_hidden_act": part.value("hidden_act", "gelu"),
        "text_layer_norm_eps": part.value("layer_norm_eps", 1e-12),
        "max_position_embeddings": shape(state, positions)[0] - offset,
        "type_vocab_size": shape(state, f"{TEXT}.embeddings.token_type_embeddings.weight")[0],
        "pad_token_id": part.value("pad_token_id", 1 if offset else 0),
    }  # fmt: skip
    tensors = {
        **embeddings(f"{TEXT}.embeddings"),
        "mmbert.text_encoder.bert.embeddings.position_embeddings.weight": Computed(
            (positions,), lambda table: table[offset:]
        ),
        **layers("mmbert.text_encoder.bert.encoder.layer", f"{TEXT}.encoder.layer", range(depth), BERT_LAYER),
    }
    return Tower(config, tensors, width, heads, f"{TEXT}.pooler.dense")
