"""The fusion strategies. A new one is one file beside this, one line in the table, one YAML in `configs/fusion/`.

A strategy of a user's own needs none of them: it is named by its class, "my_fusion.GatedFusion".
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


def build_fusion(config: MMBertConfig) -> Fusion:
    """Builds the strategy that `config.fusion` names.

    Raises:
        UsageError: An unknown strategy, or a class that is not allowed, not there, or no `Fusion`.
    """
    if config.fusion not in FUSIONS and "." in config.fusion and DOTTED_NAME.fullmatch(config.fusion):
        return import_user_class(config.fusion, Fusion, key="fusion")(config)
    if config.fusion not in FUSIONS:
        raise UsageError(
            f"fusion='{config.fusion}' is no fusion strategy; allowed are {', '.join(FUSIONS)}."
            f"{did_you_mean(config.fusion, FUSIONS)}"
        )
    return FUSIONS[config.fusion](config)
