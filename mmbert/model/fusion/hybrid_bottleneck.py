"""Hybrid fusion through bottleneck tokens: two streams that exchange information through a few shared tokens."""

import torch
from torch import Tensor, nn

from mmbert.model.configuration import MMBertConfig
from mmbert.model.fusion.base import Fusion, read_tokens, upper_bert_layers
from mmbert.model.layers import Pooler, SelfAttentionLayer, build_layers
from mmbert.model.tokens import READ_ALL, Fused, Reads, Tokens


class HybridBottleneckFusion(Fusion):
    """Attention bottlenecks (MBT, arXiv:2107.00135, Eq. 8 and 9).

    In each layer either stream attends to itself and to the shared tokens; the two updated copies of these are
    averaged for the next layer. So information of the image reaches the text through `num_bottlenecks` vectors, from
    the second layer on: with `fusion_layers=1` the streams are combined in the pooler only.
    """

    pooled_vectors = 2

    num_bottlenecks = 4
    """Number of shared tokens, as in the paper."""

    def __init__(self, config: MMBertConfig):
        super().__init__(config)
        width, scale = config.hidden_size, config.initializer_range
        self.bottlenecks = nn.Parameter(torch.randn(self.num_bottlenecks, width) * scale)
        self.text_layers = build_layers(SelfAttentionLayer, config)
        self.image_layers = build_layers(SelfAttentionLayer, config)
        self.absent_text = nn.Parameter(torch.randn(width) * scale)
        self.absent_image = nn.Parameter(torch.randn(width) * scale)
        self.pooler = Pooler(config, vectors=self.pooled_vectors)

    def modules_from_bert(self) -> dict[str, str]:
        """See `Fusion`: the text stream; the image stream and the shared tokens start random."""
        return upper_bert_layers("text_layers", self.config)

    def forward(self, text: Tokens, image: Tokens, *, reads: Reads = READ_ALL) -> Fused:
        """See `Fusion`. An absent side has no part in the average; its pooled vector is learned."""
        shared = self.bottlenecks.to(text.hidden_states.dtype).expand(text.mask.shape[0], -1, -1)  # (B, bottlenecks, D)
        parts = torch.stack([text.mask.any(dim=1), image.mask.any(dim=1)]).to(shared.dtype)  # (2, B) 1 = present
        parts = (parts / parts.sum(dim=0).clamp(min=1))[..., None, None]
        for number, (text_layer, image_layer) in enumerate(zip(self.text_layers, self.image_layers, strict=True), 1):
            if number < len(self.text_layers):
                text, from_text = _exchange(text_layer, text, shared)
                image, from_image = _exchange(image_layer, image, shared)
                shared = parts[0] * from_text + parts[1] * from_image
            else:  # nobody reads the shared tokens after the last layer
                of_text, of_image = read_tokens(text, image, reads)
                text = text_layer(_with_shared(text, shared), queries=of_text)
                image = image_layer(_with_shared(image, shared), queries=of_image)
        return Fused.only(reads, text, image, lambda: self.pool(text, image))

    def pool(self, text: Tokens, image: Tokens) -> Tensor:
        """Combine the first tokens of both streams to the joint vector, (B, D)."""
        return self.pooler(text.with_fallback(self.absent_text).first, image.with_fallback(self.absent_image).first)


def _exchange(layer: nn.Module, tokens: Tokens, shared: Tensor) -> tuple[Tokens, Tensor]:
    """Run a layer of one stream over its own and the shared tokens, and return both."""
    states = layer(_with_shared(tokens, shared)).hidden_states
    own, shared = states.split([tokens.mask.shape[1], shared.shape[1]], dim=1)
    return Tokens(own, tokens.mask), shared


def _with_shared(tokens: Tokens, shared: Tensor) -> Tokens:
    """Append the shared tokens to those of a stream."""
    return Tokens(
        torch.cat([tokens.hidden_states, shared], dim=1),  # (B, L + bottlenecks, D)
        torch.cat([tokens.mask, tokens.mask.new_ones(shared.shape[:2])], dim=1),
    )
