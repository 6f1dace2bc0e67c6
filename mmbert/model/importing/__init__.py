"""Import of published checkpoints. To add a family: a file in this folder that plans it, and a line in `SOURCES`."""

from mmbert.errors import UsageError, did_you_mean
from mmbert.model.importing import albef, blip, bridgetower, clip, flava, meter, vilt, vision_text, visualbert
from mmbert.model.importing.base import Checkpoint, Plan, Source

__all__ = ["SOURCES", "Checkpoint", "Plan", "Source", "plan_import"]

SOURCES: dict[str, Source] = {
    "visual_bert": Source(visualbert.plan, "embeddings.visual_projection"),
    "albef": Source(albef.plan, "visual_encoder.pos_embed"),
    "bridgetower": Source(bridgetower.plan, "cross_modal_text_link_tower"),
    "meter": Source(meter.plan, "vit_model."),
    "vilt": Source(vilt.plan, "text_embeddings.word_embeddings.weight"),
    "blip": Source(blip.plan),
    "clip": Source(clip.plan),
    "flava": Source(flava.plan),
    "vision-text-dual-encoder": Source(vision_text.plan),
}
"""`model_type` of config.json, or a name for checkpoints without one -> family."""


def plan_import(checkpoint: Checkpoint) -> Plan:
    """Plan the import of a checkpoint of one of `SOURCES`.

    Raises:
        UsageError: Another model, or one with a part that mmbert can't express.
    """
    where = f"'{checkpoint.source}'"
    kind = checkpoint.config.get("model_type")
    if kind == "mmbert":
        raise UsageError(f"{where} is a model of mmbert already; load it with mmbert.load.")
    if kind is None:
        found = [name for name, source in SOURCES.items() if any(source.marks(x) for x in checkpoint.state)]
        if len(found) != 1:
            raise UsageError(
                f"{where} has no config.json, and the names of its {len(checkpoint.state)} tensors, such as "
                f"'{next(iter(checkpoint.state), '')}', match no model that mmbert imports: {', '.join(SOURCES)}."
            )
        kind = found[0]
    if kind not in SOURCES:
        raise UsageError(
            f"{where} is a {kind}; mmbert imports {', '.join(SOURCES)}.{did_you_mean(str(kind), SOURCES)} A BERT or a "
            "ViT alone is loaded by model.text_pretrained or model.image_pretrained."
        )
    return SOURCES[kind].plan(checkpoint)
