"""Region features of an object detector in place of images."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmbert.errors import UsageError
from mmbert.model.configuration import MMBertConfig
from mmbert.model.encoders import Encoder
from mmbert.model.tokens import Tokens


class NoVit(nn.Module):
    """Stand-in for the ViT of a model without images, which has no layers."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()

    @property
    def patch_embed(self) -> Any:
        """Patches, which explanations read.

        Raises:
            UsageError: Always.
        """
        raise UsageError("this model reads region features instead of images (image_features): it has no patches.")

    @property
    def pretrained_cfg(self) -> Any:
        """Preprocessing, which runs read.

        Raises:
            UsageError: Always.
        """
        raise UsageError("model.image_features: a run reads images; region features are for calls from Python.")


class FeatureEncoder(Encoder):
    """Identity on region features, which `image_features` gives in place of images (VisualBERT, arXiv:1908.03557)."""

    def __init__(self, config: MMBertConfig):
        super().__init__()
        assert config.image_features is not None
        self.width = config.image_features
        self.vit = NoVit()

    def blocks(self) -> tuple[tuple[nn.Module, ...], nn.ModuleList | nn.Sequential]:
        """Return nothing: there are no layers."""
        return (), self.vit.blocks

    def forward(self, features: Tensor, mask: Tensor | None = None, *, layers: Sequence[int] = ()) -> Tokens:
        """Return (B, P, width) region features as tokens.

        Args:
            features: (B, P, width).
            mask: (B, P), 1 = real region; None = all real.
            layers: Not used: there are none.

        Raises:
            UsageError: Features of another shape, such as images.
        """
        if features.ndim != 3 or features.shape[-1] != self.width:
            raise UsageError(
                f"pixel_values has shape {tuple(features.shape)}; this model reads (B, regions, {self.width}) features "
                "of an object detector instead of images (image_features)."
            )
        if mask is None:
            mask = features.new_ones(features.shape[:2], dtype=torch.bool)
        return Tokens(features, mask.bool())
