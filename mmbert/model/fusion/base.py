"""The interface of a fusion strategy."""

from torch import nn

from mmbert.model.configuration import MMBertConfig
from mmbert.model.tokens import Fused, Tokens


class Fusion(nn.Module):
    """Base class of fusion strategies, listed in `mmbert.model.fusion.FUSIONS`.

    A fusion gets the encoders' outputs, projected to its width. Either modality may be absent: `Tokens` of length 0, or
    rows whose mask is all False.
    """

    reads_text_layers: tuple[int, ...] = ()
    """Layers of the text encoder, counted from 1, whose outputs are passed in `text.intermediate`, in this order."""
    reads_image_layers: tuple[int, ...] = ()
    """Layers of the image encoder, passed in `image.intermediate`."""
    min_layers: int = 0
    """Smallest number of `fusion_layers` with which the joint vector depends on both modalities."""

    def __init__(self, config: MMBertConfig):
        super().__init__()
        self.config = config

    def forward(self, text: Tokens, image: Tokens) -> Fused:
        """Fuse (B, T, D) text tokens with (B, P, D) image tokens."""
        raise NotImplementedError
