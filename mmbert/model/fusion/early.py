"""Early fusion: one sequence of all tokens."""

import torch
from torch import nn

from mmbert.model.configuration import MMBertConfig
from mmbert.model.fusion.base import Fusion, upper_bert_layers
from mmbert.model.layers import Pooler, SelfAttentionLayer
from mmbert.model.tokens import READ_ALL, Fused, Reads, Tokens


class EarlyFusion(Fusion):
    """Single stream: from the first fusion layer on, every token attends to every token of both modalities.

    With a deep image encoder this is VisualBERT (arXiv:1908.03557) on ViT features; with `text_layers=image_layers=0`
    raw patch embeddings meet word embeddings as in ViLT (arXiv:2102.03334); with two deep encoders it is the
    "merged attention" of METER (arXiv:2111.02387).
    """

    min_layers = 1

    def __init__(self, config: MMBertConfig):
        super().__init__(config)
        # BERT's embeddings already hold the text's type embedding; VisualBERT adds one to the image and normalises.
        self.image_type = nn.Parameter(torch.randn(config.hidden_size) * config.initializer_range)
        self.image_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.absent_text = nn.Parameter(torch.randn(config.hidden_size) * config.initializer_range)
        self.layers = nn.ModuleList(SelfAttentionLayer(config) for _ in range(config.fusion_layers))
        self.pooler = Pooler(config)

    def modules_from_bert(self) -> dict[str, str]:
        """See `Fusion`: all layers and the pooler, as in VisualBERT."""
        # VisualBERT's embeddings of both modalities share a LayerNorm, and are followed by its first layer.
        norm = {"image_norm": "embeddings.LayerNorm"} if self.config.text_layers == 0 else {}
        return {**upper_bert_layers("layers", self.config), "pooler.dense": "pooler.dense", **norm}

    def forward(self, text: Tokens, image: Tokens, *, reads: Reads = READ_ALL) -> Fused:
        """See `Fusion`. Without text a learned token replaces [CLS]."""
        with_text = text.with_fallback(self.absent_text)
        image_states = self.image_norm(image.hidden_states + self.image_type)
        joint = Tokens(
            torch.cat([with_text.hidden_states, image_states], dim=1),  # (B, T+P, D)
            torch.cat([with_text.mask, image.mask], dim=1),
        )
        text_length = with_text.mask.shape[1]
        num_read = joint.mask.shape[1] if reads.image else text_length if reads.text else 1
        for number, layer in enumerate(self.layers, start=1):
            joint = layer(joint, queries=joint.prefix(num_read) if number == len(self.layers) else joint)
        states = joint.hidden_states
        fused_text = Tokens(states[:, : text.mask.shape[1]], text.mask)
        fused_image = Tokens(states[:, text_length:], image.mask)
        return Fused.only(reads, fused_text, fused_image, lambda: self.pooler(joint.first))
