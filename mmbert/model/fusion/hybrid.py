"""Hybrid fusion: two streams with cross-attention to each other in every fusion layer."""

import torch
from torch import Tensor, nn

from mmbert.model.configuration import MMBertConfig
from mmbert.model.fusion.base import Fusion, read_tokens, upper_bert_layers
from mmbert.model.layers import CrossAttentionLayer, Pooler, build_layers
from mmbert.model.tokens import READ_ALL, Fused, Reads, Tokens


class HybridFusion(Fusion):
    """Co-attention (METER, arXiv:2111.02387): unimodal layers first, then two streams with separate weights.

    Both streams read the other's previous layer. With the contrastive objective on the towers this is "align before
    fuse" (ALBEF, arXiv:2107.07651). METER's type embeddings are left out, because the streams have separate weights.
    """

    pooled_vectors = 2

    def __init__(self, config: MMBertConfig):
        super().__init__(config)
        self.text_layers = build_layers(CrossAttentionLayer, config)
        self.image_layers = build_layers(CrossAttentionLayer, config)
        self.absent_text = nn.Parameter(torch.randn(config.hidden_size) * config.initializer_range)
        self.absent_image = nn.Parameter(torch.randn(config.hidden_size) * config.initializer_range)
        self.pooler = Pooler(config, vectors=self.pooled_vectors)

    def modules_from_bert(self) -> dict[str, str]:
        """See `Fusion`: the text stream; cross-attention and the image stream start random."""
        return upper_bert_layers("text_layers", self.config)

    def forward(self, text: Tokens, image: Tokens, *, reads: Reads = READ_ALL) -> Fused:
        """See `Fusion`. An absent side contributes zero to the other stream; its pooled vector is learned."""
        for number, (text_layer, image_layer) in enumerate(zip(self.text_layers, self.image_layers, strict=True), 1):
            of_text, of_image = read_tokens(text, image, reads) if number == len(self.text_layers) else (text, image)
            text, image = (
                text_layer(text, context=image, queries=of_text),
                image_layer(image, context=text, queries=of_image),
            )
        return Fused.only(reads, text, image, lambda: self.pool(text, image))

    def pool(self, text: Tokens, image: Tokens) -> Tensor:
        """Combine the first tokens of both streams to the joint vector, (B, D)."""
        return self.pooler(text.with_fallback(self.absent_text).first, image.with_fallback(self.absent_image).first)
