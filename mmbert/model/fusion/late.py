"""Late fusion: an MLP on the pooled vectors of two separate encoders."""

import torch
from torch import Tensor, nn

from mmbert.model.configuration import MMBertConfig
from mmbert.model.dropout import Dropout
from mmbert.model.fusion.base import Fusion
from mmbert.model.layers import Pooler
from mmbert.model.tokens import READ_ALL, Fused, Reads, Tokens


class LateFusion(Fusion):
    """Concatenation of the two pooled vectors, then a small MLP; there is no attention between modalities.

    So masked language modelling can't use the image, by construction. `fusion_layers` counts hidden layers of
    the MLP before the pooler; with 0 of them and the contrastive objective this is a dual encoder like CLIP
    (arXiv:2103.00020).
    """

    pooled_vectors = 2

    def __init__(self, config: MMBertConfig):
        super().__init__(config)
        width = config.hidden_size
        self.absent_text = nn.Parameter(torch.randn(width) * config.initializer_range)
        self.absent_image = nn.Parameter(torch.randn(width) * config.initializer_range)
        self.mlp = nn.Sequential()
        for _ in range(config.fusion_layers):
            self.mlp.append(nn.Linear(2 * width, 2 * width))
            self.mlp.append(nn.GELU())
            self.mlp.append(Dropout(config.hidden_dropout_prob))
        self.pooler = Pooler(config, vectors=self.pooled_vectors)

    def forward(self, text: Tokens, image: Tokens, *, reads: Reads = READ_ALL) -> Fused:
        """See `Fusion`. An absent side's pooled vector is learned."""
        return Fused.only(reads, text, image, lambda: self.pool(text, image))

    def pool(self, text: Tokens, image: Tokens) -> Tensor:
        """Combine the first tokens of both encoders to the joint vector, (B, D)."""
        vectors = [text.with_fallback(self.absent_text).first, image.with_fallback(self.absent_image).first]
        return self.pooler(self.mlp(torch.cat(vectors, dim=-1)))
