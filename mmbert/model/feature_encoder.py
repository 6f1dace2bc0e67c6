"""Region features of an object detector in place of images."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmbert.errors import UsageError
from mmbert.model.configuration import MMBertConfig
from mmbert.model.encoders import Encoder
from mmbert.model.tokens import Tokens


class FeatureEncoder(Encoder):
    """Identity on region features, which `image_features` gives in place of images (VisualBERT, arXiv:1908.03557)."""

    def __init__(self, config: MMBertConfig):
        super().__init__()
        assert config.image_features is not None
        self.width = config.image_features
        self.vit = nn.Module()  # without weights
        self.vit.blocks = nn.ModuleList()

    def blocks(self) -> tuple[tuple[nn.Module, ...], nn.ModuleList | nn.Sequential]:
        """Return nothing: there are no layers."""
        return (), nn.ModuleList()

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
