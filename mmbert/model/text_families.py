"""Text encoders of further families of transformers: DistilBERT, ModernBERT, and DeBERTa-v2 and v3."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from mmbert.errors import UsageError, did_you_mean
from mmbert.model.configuration import MMBertConfig
from mmbert.model.dropout import speed_up_dropout
from mmbert.model.encoders import Encoder, check_activation, check_length, put_first
from mmbert.model.layers import fused_attention_is_faster
from mmbert.model.tokens import Tokens


class Family(NamedTuple):
    """What differs between the families: names of parts, and keys of their configuration in transformers."""

    model: str  # name of the model's class in transformers
    layers: str  # its list of layers
    attention: str  # of a layer: the module that returns (output, attention weights)
    word_embeddings: str  # a tensor that every file of the family has
    keys: dict[str, str]  # keys of the configuration -> keys of `Architecture`
    dropouts: dict[str, str]  # the same for dropout, which is an option of training and not read from a checkpoint
    arguments: tuple[str, ...] = ()  # keys that change the outputs and have no key in `Architecture`: `text_model_args`
    unused: tuple[str, ...] = ()  # keys of a saved configuration without effect on the outputs
    unused_tensors: tuple[str, ...] = ()  # tensors that a file may have although the encoder does not read them
    shared: tuple[str, ...] = ()  # modules beside the embeddings that all layers read, frozen together with these
    embeds_positions: bool = False  # whether the embeddings alone, without layers, know the order of the tokens

    @property
    def model_class(self) -> type[PreTrainedModel]:
        """Class of the model."""
        return getattr(transformers, self.model)

    @property
    def config_class(self) -> Any:
        """Class of its configuration."""
        return self.model_class.config_class


COMMON_KEYS = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "pad_token_id": "pad_token_id",
}
"""`Family.keys` of all families."""

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
"""Keys of token ids that no encoder reads."""

FAMILIES: dict[str, Family] = {
    "distilbert": Family(
        "DistilBertModel", layers="transformer.layer", attention="attention",
        word_embeddings="embeddings.word_embeddings.weight", embeds_positions=True,
        keys={"dim": "text_hidden_size", "n_heads": "text_num_attention_heads", "hidden_dim": "text_intermediate_size",
              "n_layers": "text_layers", "activation": "text_hidden_act"},
        dropouts={"dropout": "hidden_dropout_prob", "attention_dropout": "attention_probs_dropout_prob"},
        unused=("sinusoidal_pos_embds", "qa_dropout", "seq_classif_dropout", "tie_weights_"),
    ),
    "modernbert": Family(
        "ModernBertModel", layers="layers", attention="attn", word_embeddings="embeddings.tok_embeddings.weight",
        keys={"hidden_size": "text_hidden_size", "num_attention_heads": "text_num_attention_heads",
              "intermediate_size": "text_intermediate_size", "num_hidden_layers": "text_layers",
              "hidden_activation": "text_hidden_act", "norm_eps": "text_layer_norm_eps"},
        dropouts={"embedding_dropout": "hidden_dropout_prob", "mlp_dropout": "hidden_dropout_prob",
                  "attention_dropout": "attention_probs_dropout_prob"},
        arguments=("layer_types", "rope_parameters", "local_attention", "norm_bias", "attention_bias", "mlp_bias"),
        unused=("decoder_bias", "classifier_pooling", "classifier_bias", "classifier_activation", "cls_token_id",
                "deterministic_flash_attn", "sparse_prediction", "sparse_pred_ignore_index", "reference_compile",
                "repad_logits_with_grad", "initializer_cutoff_factor", "layer_norm_eps",
                # Older names of arguments, which transformers converts.
                "global_attn_every_n_layers", "global_rope_theta", "local_rope_theta", "rope_scaling"),
    ),
    "deberta-v2": Family(
        "DebertaV2Model", layers="encoder.layer", attention="attention.self",
        word_embeddings="embeddings.word_embeddings.weight", shared=("encoder.rel_embeddings", "encoder.LayerNorm"),
        keys={"hidden_size": "text_hidden_size", "num_attention_heads": "text_num_attention_heads",
              "intermediate_size": "text_intermediate_size", "num_hidden_layers": "text_layers",
              "hidden_act": "text_hidden_act", "layer_norm_eps": "text_layer_norm_eps"},
        dropouts={key: key for key in ("hidden_dropout_prob", "attention_probs_dropout_prob")},
        arguments=("relative_attention", "max_relative_positions", "position_buckets", "norm_rel_ebd", "share_att_key",
                   "pos_att_type", "position_biased_input", "type_vocab_size", "conv_kernel_size", "conv_groups",
                   "conv_act", "attention_head_size"),
        unused=("legacy", "pooler_dropout", "pooler_hidden_act", "pooler_hidden_size"),
        unused_tensors=("embeddings.position_embeddings.weight",),  # of v3, where the layers alone know positions
    ),
}  # fmt: skip
"""Value of `text_tower` -> family. The name is that of `model_type` in config.json."""


class FamilyTextEncoder(Encoder):
    """Text encoder of one of the `FAMILIES`, of `text_layers` layers: the model of transformers without heads.

    DistilBERT (arXiv:1910.01108), ModernBERT (arXiv:2412.13663) and DeBERTa (arXiv:2006.03654; v3: arXiv:2111.09543).
    Positions count real tokens, so padding may be on either side: the state of the first real token stands in front,
    where `Tokens.first` reads it.
    """

    def __init__(self, config: MMBertConfig):
        super().__init__()
        assert config.text_hidden_size is not None  # set by MMBertConfig
        check_activation(config)
        self.width, self.family = config.text_hidden_size, FAMILIES[config.text_tower]
        if config.text_layers == 0 and not self.family.embeds_positions:
            raise UsageError(
                f"text_layers=0: text_tower='{config.text_tower}' reads the order of the tokens in its layers, not in "
                "its embeddings; set text_layers to 1 or more."
            )
        self.transformer: Any = self.family.model_class(family_config(config))
        eps = config.text_layer_norm_eps or config.layer_norm_eps
        for module in self.transformer.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = eps  # DistilBERT's configuration has no key for it
        speed_up_dropout(self.transformer)

    @property
    def attentions(self) -> list[nn.Module]:
        """Modules that return (output, attention weights), one a layer."""
        return [layer.get_submodule(self.family.attention) for layer in self.blocks()[1]]

    def blocks(self) -> tuple[tuple[nn.Module, ...], nn.ModuleList | nn.Sequential]:
        """Return the embeddings and the list of layers."""
        layers: Any = self.transformer.get_submodule(self.family.layers)
        return (self.transformer.embeddings,), layers

    def _freeze_raw_parameters(self, *, frozen: bool) -> None:
        for name, module in self.transformer.named_modules():
            if name in self.family.shared:
                module.requires_grad_(not frozen)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        layers: Sequence[int] = (),
    ) -> Tokens:
        """Encode (B, T) token ids to (B, T, width) tokens, of which the first has the state of the first real one.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, T), 1 = real token; None = all real.
            token_type_ids: (B, T) segments, for a DeBERTa that embeds them; None = all 0.
            layers: Layers, counted from 1, whose outputs are returned in `Tokens.intermediate`.

        Raises:
            UsageError: More tokens than `max_position_embeddings`, or token types that the model does not embed.
        """
        model = self.transformer
        check_length(input_ids, model.config.max_position_embeddings)
        options: dict[str, Any] = {}
        if token_type_ids is not None:
            if not getattr(model.config, "type_vocab_size", 0):
                raise UsageError(f"token_type_ids: a {type(model).__name__} has no token types; leave them out.")
            options["token_type_ids"] = token_type_ids
        fused = fused_attention_is_faster(input_ids.device)
        if model._supports_sdpa:
            implementation = "sdpa" if fused else "eager"
            if model.config._attn_implementation != implementation:
                model.set_attn_implementation(implementation)
        else:
            options["output_attentions"] = not fused  # else DeBERTa's modules return no weights that could be recorded
        mask = input_ids.new_ones(input_ids.shape) if attention_mask is None else attention_mask.long()
        counts = mask.cumsum(dim=1)
        out = model(
            input_ids=input_ids, attention_mask=mask, position_ids=(counts - 1).clamp(min=0),
            output_hidden_states=bool(layers), **options,
        )  # fmt: skip
        first = (counts == 0).sum(dim=1).clamp(max=input_ids.shape[1] - 1)  # (B,)
        intermediate = tuple(put_first(out.hidden_states[i], first) for i in layers)  # [0] are the embeddings
        return Tokens(put_first(out.last_hidden_state, first), mask.bool(), intermediate)


def family_config(config: MMBertConfig) -> PreTrainedConfig:
    """Build the configuration of transformers that a configuration of mmbert describes.

    Raises:
        UsageError: A key of `text_model_args` that is not allowed, or a value that transformers does not take.
    """
    family, given = FAMILIES[config.text_tower], config.text_model_args or {}
    keys = {**COMMON_KEYS, **family.keys, **family.dropouts}
    for name in given:
        if name in keys:
            raise UsageError(f"text_model_args.{name}: use the key {keys[name]} instead.")
        if name not in family.arguments:
            raise UsageError(
                f"text_model_args.{name}: text_tower='{config.text_tower}' takes "
                f"{', '.join(family.arguments) or 'none'}.{did_you_mean(name, family.arguments)}"
            )
    values = {name: getattr(config, key) for name, key in keys.items() if key != "text_layer_norm_eps"}  # set later
    values |= dict.fromkeys(SPECIAL_TOKENS)
    try:
        return family.config_class(**values, initializer_range=config.initializer_range, **given)
    except (StrictDataclassError, TypeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(
            f"text_tower='{config.text_tower}' with text_model_args={given}: transformers' configuration is not valid: "
            f"{reason}"
        ) from error
