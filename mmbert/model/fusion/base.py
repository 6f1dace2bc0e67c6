"""The interface of a fusion strategy."""

from torch import nn

from mmbert.model.configuration import MMBertConfig
from mmbert.model.tokens import Fused, Tokens


class Fusion(nn.Module):
    """Where the modalities meet. A strategy is one subclass in one file, listed in `mmbert.model.fusion.FUSIONS`.

    It gets the encoders' outputs in the width of the fusion part and must cope with an absent modality: a `Tokens`
    of length 0, or rows whose mask is all False.
    """

    reads_text_layers: tuple[int, ...] = ()
    """Unimodal text layers wanted in `text.intermediate`, in this order; layer i is the output of layer i, from 1."""
    reads_image_layers: tuple[int, ...] = ()
    """The same for the image encoder."""
    min_layers: int = 0
    """Fewest `fusion_layers` with which the joint vector knows both modalities."""

    def __init__(self, config: MMBertConfig):
        super().__init__()
        self.config = config

    def forward(self, text: Tokens, image: Tokens) -> Fused:
        """Fuses (B, T, D) text tokens with (B, P, D) image tokens."""
        raise NotImplementedError
