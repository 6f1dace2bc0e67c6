"""Late bilinear fusion: a bilinear product of the pooled vectors of two separate encoders."""

import torch
from torch import Tensor, nn

from mmbert.model.configuration import MMBertConfig
from mmbert.model.dropout import Dropout
from mmbert.model.fusion.base import Fusion
from mmbert.model.layers import Pooler
from mmbert.model.tokens import READ_ALL, Fused, Reads, Tokens


class LateBilinearFusion(Fusion):
    """Low-rank bilinear product of the two pooled vectors (MLB, arXiv:1610.04325, Eq. 5, with the biases of Sec. 3.1).

    P^T (tanh(U^T x) * tanh(V^T y)) + b, with an elementwise product; the rank is twice `hidden_size`, so that the
    layers after it are as wide as in `late`, and P is the pooler's matrix (a tanh follows, as in every strategy). As in
    `late` masked language modelling can't use the image, and `fusion_layers` counts hidden layers of an MLP before the
    pooler; 0 is the paper's.
    """

    pooled_vectors = 2

    def __init__(self, config: MMBertConfig):
        super().__init__(config)
        width, rank = config.hidden_size, 2 * config.hidden_size
        self.absent_text = nn.Parameter(torch.randn(width) * config.initializer_range)
        self.absent_image = nn.Parameter(torch.randn(width) * config.initializer_range)
        self.text_factors = nn.Linear(width, rank)
        self.image_factors = nn.Linear(width, rank)
        self.mlp = nn.Sequential()
        for _ in range(config.fusion_layers):
            self.mlp.append(nn.Linear(rank, rank))
            self.mlp.append(nn.GELU())
            self.mlp.append(Dropout(config.hidden_dropout_prob))
        self.pooler = Pooler(config, vectors=self.pooled_vectors)

    def forward(self, text: Tokens, image: Tokens, *, reads: Reads = READ_ALL) -> Fused:
        """See `Fusion`. An absent side's pooled vector is learned."""
        return Fused.only(reads, text, image, lambda: self.pool(text, image))

    def pool(self, text: Tokens, image: Tokens) -> Tensor:
        """Combine the first tokens of both encoders to the joint vector, (B, D)."""
        text_factors = torch.tanh(self.text_factors(text.with_fallback(self.absent_text).first))  # (B, rank)
        image_factors = torch.tanh(self.image_factors(image.with_fallback(self.absent_image).first))
        return self.pooler(self.mlp(text_factors * image_factors))
