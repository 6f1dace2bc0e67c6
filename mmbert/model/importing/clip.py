"""CLIP (arXiv:2103.00020) with the names of transformers: `late` without layers, and its causal text encoder."""

from mmbert.errors import UsageError
from mmbert.model.importing.base import Checkpoint, Plan, count_layers, shape
from mmbert.model.importing.names import layers, modules
from mmbert.model.importing.two_towers import CLIP_IMAGES, plan_two_towers
from mmbert.model.importing.vits import Tower, clip_tower

TEXT, IMAGE, OWN_TEXT = "text_model", "vision_model", "mmbert.text_encoder.clip"
LAYER = {
    name: name
    for name in (
        *(f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")),
        *("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"),
    )
}
"""Modules of a layer of CLIP's text encoder, in ours and in checkpoints."""


def plan(checkpoint: Checkpoint) -> Plan:
    """Plan the import of both encoders with their projections.

    Raises:
        UsageError: One encoder alone, a classifier of images, or an activation of images that mmbert does not have.
    """
    if "text_projection.weight" not in checkpoint.state or "visual_projection.weight" not in checkpoint.state:
        raise UsageError(
            f"'{checkpoint.source}' lacks one of the projections text_projection and visual_projection; of CLIP mmbert "
            "imports CLIPModel, text and image encoder with both."
        )
    text, image = (
        # Files of older versions of transformers have the values that hold in a second place.
        checkpoint._replace(config=checkpoint.value(f"{x}_config", {}) | checkpoint.value(f"{x}_config_dict", {}))
        for x in ("text", "vision")
    )
    out = plan_two_towers(checkpoint, _text_tower(text), clip_tower(image, IMAGE))
    out.unused = {f"{x}.embeddings.position_ids": "constant" for x in (TEXT, IMAGE)}
    out.image_settings, out.max_text_length = CLIP_IMAGES, out.config["max_position_embeddings"]
    return out


def _text_tower(part: Checkpoint) -> Tower:
    """Map the text encoder."""
    state = part.state
    positions = f"{TEXT}.embeddings.position_embedding.weight"
    vocabulary, width = shape(state, f"{TEXT}.embeddings.token_embedding.weight")
    depth, heads = count_layers(state, f"{TEXT}.encoder.layers."), part.value("num_attention_heads", 8)
    config = {
        "text_tower": "clip", "text_layers": depth, "text_hidden_size": width, "text_num_attention_heads": heads,
        "text_intermediate_size": shape(state, f"{TEXT}.encoder.layers.0.mlp.fc1.weight")[0],
        "text_hidden_act": part.value("hidden_act", "quick_gelu"), "vocab_size": vocabulary,
        "text_layer_norm_eps": part.value("layer_norm_eps", 1e-5),
        "max_position_embeddings": shape(state, positions)[0],
    }  # fmt: skip
    tensors = {
        f"{OWN_TEXT}.embeddings.token_embedding.weight": f"{TEXT}.embeddings.token_embedding.weight",
        f"{OWN_TEXT}.embeddings.position_embedding.weight": positions,
        **layers(f"{OWN_TEXT}.encoder.layers", f"{TEXT}.encoder.layers", range(depth), LAYER),
        **modules({f"{OWN_TEXT}.final_layer_norm": f"{TEXT}.final_layer_norm"}),
    }
    return Tower(config, tensors, width, heads)
