"""Contrastive models of two encoders without a fusion: what CLIP and VisionTextDualEncoder have in common."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmbert.model.importing.base import Checkpoint, Computed, Plan, shape
from mmbert.model.importing.names import absent
from mmbert.model.importing.vits import Tower

CLIP_IMAGES = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
"""Mean and standard deviation by which CLIP normalises images."""


def plan_two_towers(checkpoint: Checkpoint, text: Tower, image: Tower) -> Plan:
    """Plan `late` fusion without layers, and the objective itc.

    Both projections read states as wide as the wider encoder. Those of the other are filled with zeros by its
    projection, which changes nothing, and lets a pooler follow.

    Args:
        checkpoint: With the projections and the temperature.
        text: The text encoder.
        image: The image encoder.
    """
    theirs = {"text": "text_projection.weight", "image": "visual_projection.weight"}
    towers = {"text": text, "image": image}
    wider = text if text.width >= image.width else image
    pooled = [name for name, tower in towers.items() if tower.pooler is not None]
    itc: dict[str, Any] = {"weight": 1.0, "embedding_size": shape(checkpoint.state, theirs["text"])[0]}
    if pooled:
        itc["pooler"] = "both" if len(pooled) == 2 else pooled[0]
    config = {
        **image.config, **text.config, "fusion": "late", "fusion_layers": 0, "pooler": "none",
        "hidden_size": wider.width, "num_attention_heads": wider.heads, "objectives": {"itc": itc},
    }  # fmt: skip
    tensors = {**text.tensors, **image.tensors}
    for name, tower in towers.items():
        tensors |= _side(name, theirs[name], tower, wider.width)
    tensors["objectives.itc.log_scale"] = Computed(("logit_scale",), lambda x: x.reshape(1))
    return Plan(config, tensors, absent("absent_text", "absent_image"))


def _side(name: str, theirs: str, tower: Tower, width: int) -> dict[str, str | Computed]:
    """Map projection and pooler of one encoder to states of `width` features."""
    extra = width - tower.width

    def widen(x: Tensor) -> Tensor:
        return F.pad(x, (0, extra))

    own = f"objectives.itc.{name}_projection"
    found: dict[str, str | Computed] = {
        f"{own}.weight": Computed((theirs,), widen),
        f"{own}.bias": Computed((theirs,), lambda x: torch.zeros(len(x))),
    }
    if extra:
        found[f"mmbert.{name}_projection.weight"] = Computed((theirs,), lambda x: torch.eye(width, x.shape[1]))
        found[f"mmbert.{name}_projection.bias"] = Computed((theirs,), lambda x: torch.zeros(width))
    if tower.pooler is not None:
        pooler = f"objectives.itc.poolers.{name}"
        found[f"{pooler}.weight"] = Computed((f"{tower.pooler}.weight",), lambda x: F.pad(x, (0, extra, 0, extra)))
        found[f"{pooler}.bias"] = Computed((f"{tower.pooler}.bias",), widen)
    return found
