"""Text encoder of FLAVA: BERT's embeddings, then bidirectional layers with the LayerNorms first."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmbert.errors import UsageError
from mmbert.model.configuration import MMBertConfig
from mmbert.model.encoders import TextEncoder, check_length
from mmbert.model.layers import Attention, FeedForward, FusionLayer
from mmbert.model.tokens import Tokens


class FlavaTextLayer(FusionLayer):
    """Self-attention, then feed-forward, each with the LayerNorm before it; equals transformers' `FlavaLayer`."""

    def __init__(self, config: MMBertConfig):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)

    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        """Apply the layer to (B, T, width) states with a (B, T) mask, True = real token."""
        return self.run(self._block, hidden_states, mask)

    def _block(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        return self.feed_forward(self.attention(hidden_states, Tokens(hidden_states, mask)))


class FlavaTextEncoder(TextEncoder):
    """Text encoder of FLAVA (arXiv:2112.04482, Sec. 3.1): `text_layers` layers of a ViT over BERT's embeddings.

    A LayerNorm follows the last layer. The text is in the state of [CLS].
    """

    def __init__(self, config: MMBertConfig):
        sizes = copy.copy(config)
        sizes.text_layers = 0
        super().__init__(sizes)
        if config.text_hidden_act != "gelu":
            raise UsageError(f"text_hidden_act='{config.text_hidden_act}': text_tower='flava' has gelu only.")
        assert config.text_num_attention_heads is not None  # set by MMBertConfig
        sizes.fusion_norm, sizes.hidden_size = "pre", self.width
        sizes.num_attention_heads, sizes.intermediate_size = (
            config.text_num_attention_heads,
            config.text_intermediate_size,
        )
        sizes.layer_norm_eps = config.text_layer_norm_eps or config.layer_norm_eps
        self.layers = nn.ModuleList(FlavaTextLayer(sizes) for _ in range(config.text_layers))
        self.norm = nn.LayerNorm(self.width, eps=sizes.layer_norm_eps)

    def blocks(self) -> tuple[tuple[nn.Module, ...], nn.ModuleList | nn.Sequential]:
        """Return the embeddings and the list of layers."""
        return (self.bert.embeddings,), self.layers

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        layers: Sequence[int] = (),
    ) -> Tokens:
        """See `TextEncoder`; the states in `Tokens.intermediate` are those before the last LayerNorm."""
        check_length(input_ids, self.bert.config.max_position_embeddings)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        states = [self.bert.embeddings(input_ids=input_ids, token_type_ids=token_type_ids)]
        for layer in self.layers:
            states.append(layer(states[-1], mask.bool()))
        return Tokens(self.norm(states[-1]), mask.bool(), tuple(states[i] for i in layers))
