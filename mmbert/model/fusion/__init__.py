"""Fusion strategies. To add one: a file in this folder, a line in `FUSIONS`, and a YAML in `configs/fusion/`.

A custom fusion outside of mmbert needs none of these: `config.fusion` names its class, "my_fusion.GatedFusion".
"""

from mmbert.errors import UsageError, did_you_mean
from mmbert.model.configuration import MMBertConfig
from mmbert.model.fusion.base import Fusion
from mmbert.model.fusion.early import EarlyFusion
from mmbert.model.fusion.hybrid import HybridFusion
from mmbert.model.fusion.hybrid_bottleneck import HybridBottleneckFusion
from mmbert.model.fusion.hybrid_bridge import HybridBridgeFusion
from mmbert.model.fusion.hybrid_cross import HybridCrossFusion
from mmbert.model.fusion.late import LateFusion
from mmbert.model.fusion.late_bilinear import LateBilinearFusion
from mmbert.runtime.allowed_imports import DOTTED_NAME, import_user_class

FUSIONS: dict[str, type[Fusion]] = {
    "early": EarlyFusion,
    "late": LateFusion,
    "late_bilinear": LateBilinearFusion,
    "hybrid": HybridFusion,
    "hybrid_cross": HybridCrossFusion,
    "hybrid_bottleneck": HybridBottleneckFusion,
    "hybrid_bridge": HybridBridgeFusion,
}


def validate_fusion_name(name: str) -> None:
    """Check that `name` is in `FUSIONS` or has the form "module.Class"; nothing is imported.

    Raises:
        UsageError: It is neither.
    """
    if name not in FUSIONS and not ("." in name and DOTTED_NAME.fullmatch(name)):
        raise UsageError(
            f"fusion='{name}' is no fusion strategy; allowed are {', '.join(FUSIONS)}, or a class such as "
            f"my_fusion.GatedFusion.{did_you_mean(name, FUSIONS)}"
        )


def joint_size(config: MMBertConfig) -> int:
    """Return the width of the joint vector, in features; that of a custom fusion is `hidden_size`."""
    is_pooled = config.pooler == "tanh" or config.fusion not in FUSIONS
    return config.hidden_size * (1 if is_pooled else FUSIONS[config.fusion].pooled_vectors)


def build_fusion(config: MMBertConfig) -> Fusion:
    """Build the fusion strategy that `config.fusion` names.

    Raises:
        UsageError: An unknown strategy; a custom class that is not allowed, not found, or not a `Fusion`.
    """
    validate_fusion_name(config.fusion)
    if config.fusion in FUSIONS:
        return FUSIONS[config.fusion](config)
    return import_user_class(config.fusion, Fusion, key="fusion")(config)
