"""Hybrid fusion with bridges: each fusion layer also reads one layer of either encoder."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmbert.model.configuration import MMBertConfig
from mmbert.model.fusion.base import Fusion, read_tokens, upper_bert_layers
from mmbert.model.layers import CrossAttentionLayer, Pooler, build_layers
from mmbert.model.tokens import READ_ALL, Fused, Reads, Tokens


class HybridBridgeFusion(Fusion):
    """Co-attention as in `hybrid`, fed by the encoders' upper layers (BridgeTower, arXiv:2206.08657, Sec. 3).

    With N fusion layers over L unimodal ones, fusion layer 1 starts from unimodal layer L-N+1, and each further one
    reads LayerNorm(previous fusion layer + W * next unimodal layer), up to the encoder's output. An encoder of fewer
    layers is read from its first (one of 0 layers: its embeddings), and fusion layers beyond its last have no bridge.

    Deviations: every bridge has a W of its own (the paper's share one a modality), whose bias stands for the type
    embedding; a lower layer is normalised without weights before W (the authors' code puts those of the ViT through its
    last LayerNorm; BERT's are normalised already).
    """

    pooled_vectors = 2

    def __init__(self, config: MMBertConfig):
        super().__init__(config)
        assert config.text_hidden_size is not None  # set by MMBertConfig
        assert config.image_hidden_size is not None  # set by MMBertModel
        self.text_bridges = Bridges(
            config, layers=config.text_layers, width=config.text_hidden_size, norm=config.bridge_text_norm
        )
        self.image_bridges = Bridges(config, layers=config.image_layers, width=config.image_hidden_size)
        self.reads_text_layers, self.reads_image_layers = self.text_bridges.lower, self.image_bridges.lower
        self.text_layers = build_layers(CrossAttentionLayer, config)
        self.image_layers = build_layers(CrossAttentionLayer, config)
        self.absent_text = nn.Parameter(torch.randn(config.hidden_size) * config.initializer_range)
        self.absent_image = nn.Parameter(torch.randn(config.hidden_size) * config.initializer_range)
        self.pooler = Pooler(config, vectors=self.pooled_vectors)

    def modules_from_bert(self) -> dict[str, str]:
        """See `Fusion`: the text stream; bridges, cross-attention and the image stream start random."""
        return upper_bert_layers("text_layers", self.config)

    def forward(self, text: Tokens, image: Tokens, *, reads: Reads = READ_ALL) -> Fused:
        """See `Fusion`. An absent side contributes zero to the other stream; its pooled vector is learned."""
        text_unimodal, image_unimodal = self.text_bridges.unimodal(text), self.image_bridges.unimodal(image)
        for i, (text_layer, image_layer) in enumerate(zip(self.text_layers, self.image_layers, strict=True)):
            text = self.text_bridges(i, text_unimodal, previous=text)
            image = self.image_bridges(i, image_unimodal, previous=image)
            of_text, of_image = read_tokens(text, image, reads) if i + 1 == len(self.text_layers) else (text, image)
            text, image = (
                text_layer(text, context=image, queries=of_text),
                image_layer(image, context=text, queries=of_image),
            )
        return Fused.only(reads, text, image, lambda: self.pool(text, image))

    def pool(self, text: Tokens, image: Tokens) -> Tensor:
        """Combine the first tokens of both streams to the joint vector, (B, D)."""
        return self.pooler(text.with_fallback(self.absent_text).first, image.with_fallback(self.absent_image).first)


class Bridges(nn.Module):
    """Bridges of one stream, one for each fusion layer that has a unimodal layer to read.

    Args:
        config: The model's configuration.
        layers: Unimodal layers of the encoder.
        width: Width of the encoder, in features.
        norm: How lower layers are normalised; see `bridge_text_norm`.
    """

    def __init__(self, config: MMBertConfig, *, layers: int, width: int, norm: str = "plain"):
        super().__init__()
        count = min(config.fusion_layers, max(layers, 1))
        self.lower = tuple(range(layers - count + 1, layers))
        """Unimodal layers, counted from 1, that are read besides the encoder's output."""
        widths = [width] * len(self.lower) + [config.hidden_size] * min(count, 1)
        self.eps, self.norm = config.layer_norm_eps, norm
        self.projections = nn.ModuleList(nn.Linear(width, config.hidden_size) for width in widths)
        self.norms = nn.ModuleList(nn.LayerNorm(config.hidden_size, eps=self.eps) for _ in widths)

    def unimodal(self, tokens: Tokens) -> list[Tensor]:
        """Return the inputs of the bridges from the lowest layer up: (B, L, width) each, then the output (B, L, D)."""
        if tokens.mask.shape[1] == 0:
            return []  # an absent modality has no lower layers either
        if self.norm == "none":
            return [*tokens.intermediate, tokens.hidden_states]
        return [*(F.layer_norm(x, x.shape[-1:], eps=self.eps) for x in tokens.intermediate), tokens.hidden_states]

    def forward(self, number: int, unimodal: list[Tensor], *, previous: Tokens) -> Tokens:
        """Compute the input of fusion layer `number`, counted from 0: (B, L, D)."""
        if number >= min(len(unimodal), len(self.norms)):
            return previous
        states = self.projections[number](unimodal[number])
        if number > 0:  # the first starts from its unimodal layer alone
            states = previous.hidden_states + states
        return Tokens(self.norms[number](states), previous.mask)
