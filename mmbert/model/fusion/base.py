"""The interface of a fusion strategy."""

from torch import nn

from mmbert.model.configuration import MMBertConfig
from mmbert.model.tokens import READ_ALL, Fused, Reads, Tokens

BERT_NAMES = {
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.output": "attention.output.dense",
    "attention.norm": "attention.output.LayerNorm",
    "feed_forward.up": "intermediate.dense",
    "feed_forward.down": "output.dense",
    "feed_forward.norm": "output.LayerNorm",
}
"""Modules of `SelfAttentionLayer` and `CrossAttentionLayer` -> modules of transformers' `BertLayer`."""


def upper_bert_layers(name: str, config: MMBertConfig) -> dict[str, str]:
    """Map fusion layers to BERT's layers above those of the text encoder, for `Fusion.modules_from_bert`.

    Args:
        name: Attribute of the fusion with its `config.fusion_layers` layers, each with the modules of `BERT_NAMES`.
        config: The model's configuration.
    """
    return {
        f"{name}.{i}.{module}": f"encoder.layer.{config.text_layers + i}.{bert_module}"
        for i in range(config.fusion_layers)
        for module, bert_module in BERT_NAMES.items()
    }


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

    pooled_vectors: int = 1
    """Vectors that its `Pooler` combines."""

    def __init__(self, config: MMBertConfig):
        super().__init__()
        self.config = config

    def modules_from_bert(self) -> dict[str, str]:
        """Map modules of the fusion to the modules of transformers' `BertModel` that initialise them, by name.

        Used where a BERT is pretrained and `model.fusion_init` is bert; see `mmbert.model.warm_start`. Layers that the
        BERT does not have are left out, and so is its pooler unless the last fusion layer starts from its last layer.
        """
        return {}

    def encode_text(self, text: Tokens) -> Tokens:
        """Encode (B, T, D) tokens of the text encoder further, with layers that see no image; here there are none."""
        return text

    def forward(self, text: Tokens, image: Tokens, *, reads: Reads = READ_ALL) -> Fused:
        """Fuse (B, T, D) text tokens with (B, P, D) image tokens.

        Args:
            text: (B, T, D).
            image: (B, P, D).
            reads: The outputs that the caller reads. A strategy may do without this argument: it then computes all.
        """
        raise NotImplementedError


def read_tokens(text: Tokens, image: Tokens, reads: Reads) -> tuple[Tokens, Tokens]:
    """Select the tokens of two streams whose states after the last layer are read: all, the first, or none."""
    first = 1 if reads.pooled else 0
    return text if reads.text else text.prefix(first), image if reads.image else image.prefix(first)
