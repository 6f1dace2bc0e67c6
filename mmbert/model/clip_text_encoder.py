"""Text encoder of CLIP: causal attention, LayerNorms first, the text in the state of its last token."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from mmbert.errors import UsageError
from mmbert.model.configuration import MMBertConfig
from mmbert.model.encoders import Encoder, check_activation, check_length, put_first
from mmbert.model.layers import fused_attention_is_faster
from mmbert.model.tokens import Tokens


class ClipTextEncoder(Encoder):
    """Text encoder of CLIP (arXiv:2103.00020, Sec. 2.4) of `text_layers` layers.

    Each token sees itself and the tokens before it, so the last real one, [SEP] or CLIP's end of text, represents the
    text. Its state replaces that of the first token, which sees nothing else and is the same for all texts; so
    `Tokens.first` always represents the text. There is dropout on attention weights only, and no token types.
    """

    def __init__(self, config: MMBertConfig):
        super().__init__()
        assert config.text_hidden_size is not None  # set by MMBertConfig
        check_activation(config)
        self.width = config.text_hidden_size
        self.clip = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=config.vocab_size,
                hidden_size=self.width,
                num_hidden_layers=config.text_layers,
                num_attention_heads=config.text_num_attention_heads,  # pyright: ignore[reportArgumentType]
                intermediate_size=config.text_intermediate_size,  # pyright: ignore[reportArgumentType]
                attention_dropout=config.attention_probs_dropout_prob,
                max_position_embeddings=config.max_position_embeddings,
                layer_norm_eps=config.text_layer_norm_eps or config.layer_norm_eps,
                initializer_range=config.initializer_range,
                hidden_act=config.text_hidden_act,
                pad_token_id=config.pad_token_id,
                bos_token_id=0,  # read by CLIP's own pooling only, whose output is not used
                eos_token_id=0,
            )
        )

    @property
    def transformer(self) -> CLIPTextModel:
        """The model of transformers."""
        return self.clip

    @property
    def attentions(self) -> list[nn.Module]:
        """Modules that return (output, attention weights), one a layer."""
        return [layer.self_attn for layer in self.clip.encoder.layers]  # pyright: ignore

    def blocks(self) -> tuple[tuple[nn.Module, ...], nn.ModuleList | nn.Sequential]:
        """Return the embeddings and the list of layers."""
        return (self.clip.embeddings,), self.clip.encoder.layers

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        layers: Sequence[int] = (),
    ) -> Tokens:
        """Encode (B, T) token ids to (B, T, width) tokens, of which the first has the state of the last real one.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, T), 1 = real token; None = all real.
            token_type_ids: None.
            layers: Layers, counted from 1, whose outputs are returned in `Tokens.intermediate`.

        Raises:
            UsageError: More tokens than position embeddings, or token types.
        """
        if token_type_ids is not None:
            raise UsageError("token_type_ids: the text encoder text_tower='clip' has no token types; leave them out.")
        check_length(input_ids, self.clip.config.max_position_embeddings)
        implementation = "sdpa" if fused_attention_is_faster(input_ids.device) else "eager"
        if self.clip.config._attn_implementation != implementation:
            self.clip.set_attn_implementation(implementation)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        out = self.clip(input_ids=input_ids, attention_mask=mask, output_hidden_states=bool(layers))
        real = mask.bool()
        places = torch.arange(mask.shape[1], device=mask.device)
        last = torch.where(real, places, 0).amax(dim=1)  # (B,)
        intermediate = tuple(put_first(out.hidden_states[i], last) for i in layers)  # [0] are the embeddings
        return Tokens(put_first(out.last_hidden_state, last), real, intermediate)
