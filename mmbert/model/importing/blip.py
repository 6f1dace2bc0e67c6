"""BLIP (arXiv:2201.12086) for retrieval, with the names of transformers: `hybrid_cross` with shared text layers."""

import torch

from mmbert.errors import UsageError
from mmbert.model.importing.albef import CROSS_LAYER
from mmbert.model.importing.base import Checkpoint, Computed, Plan, count_layers, shape
from mmbert.model.importing.names import absent, embeddings, layers, modules
from mmbert.model.importing.two_towers import CLIP_IMAGES
from mmbert.model.importing.vits import OWN, sizes

BERT, VIT, LAYERS = "text_encoder", "vision_model", "text_encoder.encoder.layer"
VIT_LAYER = {
    "norm1": "layer_norm1", "norm2": "layer_norm2", "attn.qkv": "self_attn.qkv", "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
}  # fmt: skip
"""Modules of a block of timm's ViT -> of BLIP's."""


def plan(checkpoint: Checkpoint) -> Plan:
    """Plan the import of a model for retrieval: ITM, and the vectors of ITC.

    Raises:
        UsageError: A model that generates text, an image encoder wider than the text's, or another activation.
    """
    state = checkpoint.state
    if "itm_head.weight" not in state:
        raise UsageError(
            f"'{checkpoint.source}' has no itm_head; of BLIP mmbert imports BlipForImageTextRetrieval. The others "
            "generate texts with a decoder, or have no head."
        )
    text, vision = (checkpoint._replace(config=checkpoint.value(f"{x}_config", {})) for x in ("text", "vision"))
    for part in (text, vision):
        part.require("hidden_act", "gelu", "gelu")
    vocabulary, width = shape(state, f"{BERT}.embeddings.word_embeddings.weight")
    image_width, _, patch, _ = shape(state, f"{VIT}.embeddings.patch_embedding.weight")
    if image_width != width:
        raise UsageError(
            f"'{checkpoint.source}': the cross-attention of the texts, of width {width}, reads an image encoder of "
            f"width {image_width}; mmbert imports BLIP with equal widths only."
        )
    depth, image_depth = count_layers(state, f"{LAYERS}."), count_layers(state, f"{VIT}.encoder.layers.")
    heads = vision.value("num_attention_heads", 12)
    inner = shape(state, f"{VIT}.encoder.layers.0.mlp.fc1.weight")[0]
    positions = shape(state, f"{VIT}.embeddings.position_embedding")[1]
    words, places = f"{BERT}.embeddings.word_embeddings.weight", f"{BERT}.embeddings.position_embeddings.weight"
    config = {
        **sizes(width, depth=image_depth, patch=patch, positions=positions, heads=heads, inner=inner),
        "image_model": "vit_base_patch16_224", "image_layer_norm_eps": vision.value("layer_norm_eps", 1e-5),
        "fusion": "hybrid_cross", "shared_text_layers": True, "pooler": "none", "text_layers": 0,
        "fusion_layers": depth, "hidden_size": width, "num_attention_heads": text.value("num_attention_heads", 8),
        "intermediate_size": shape(state, f"{LAYERS}.0.intermediate.dense.weight")[0], "vocab_size": vocabulary,
        "layer_norm_eps": text.value("layer_norm_eps", 1e-12), "max_position_embeddings": shape(state, places)[0],
        "type_vocab_size": 1, "pad_token_id": text.value("pad_token_id", 0),
        "objectives": {
            "itm": {"weight": 1.0, "negatives": "hard"},
            "itc": {"weight": 1.0, "embedding_size": shape(state, "text_proj.weight")[0]},
        },
    }  # fmt: skip
    own = "mmbert.text_encoder.bert.embeddings"
    tensors = {
        **embeddings(f"{BERT}.embeddings"),
        f"{own}.token_type_embeddings.weight": Computed((words,), lambda words: torch.zeros(1, words.shape[1])),
        **layers("mmbert.fusion.layers", LAYERS, range(depth), CROSS_LAYER),
        f"{OWN}.cls_token": f"{VIT}.embeddings.class_embedding",
        f"{OWN}.pos_embed": f"{VIT}.embeddings.position_embedding",
        **modules({f"{OWN}.patch_embed.proj": f"{VIT}.embeddings.patch_embedding"}),
        **layers(f"{OWN}.blocks", f"{VIT}.encoder.layers", range(image_depth), VIT_LAYER),
        **modules(
            {
                f"{OWN}.norm": f"{VIT}.post_layernorm",
                "objectives.itm.head": "itm_head",
                "objectives.itc.text_projection": "text_proj",
                "objectives.itc.image_projection": "vision_proj",
            }
        ),
    }
    out = Plan(config, tensors, absent("absent_text"), image_settings=CLIP_IMAGES, max_text_length=35)
    out.new["objectives.itc.log_scale"] = "temperature of training, which these files lack"
    out.unused[f"{BERT}.embeddings.position_ids"] = "constant"
    return out
