"""The unimodal encoders: raw inputs to `Tokens`, each in its own width."""

from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from mmbert.errors import UsageError
from mmbert.model.configuration import MMBertConfig
from mmbert.model.layers import fused_attention_is_faster
from mmbert.model.tokens import Tokens


class Encoder(nn.Module):
    """What both encoders share: freezing, and keeping frozen parts in evaluation mode."""

    width: int
    """Features of a token."""

    def blocks(self) -> tuple[tuple[nn.Module, ...], nn.ModuleList | nn.Sequential]:
        """The modules of the embedding stage, and the list of layers."""
        raise NotImplementedError

    def freeze(self, what: str | int) -> None:
        """Takes parameters out of training.

        Args:
            what: "none"; "all"; or n, the embeddings and the first n layers.

        Raises:
            UsageError: Anything else, or more layers than there are.
        """
        embeddings, layers = self.blocks()
        if what not in ("none", "all") and not (isinstance(what, int) and 0 < what <= len(layers)):
            raise UsageError(f"freeze={what!r}: allowed are none, all, or a number of layers from 1 to {len(layers)}.")
        if what == "all":
            self._frozen = [self]
        else:
            self._frozen = [] if what == "none" else [*embeddings, *layers[: int(what)]]
        for parameter in self.parameters():
            parameter.requires_grad_(True)
        for module in self._frozen:
            module.requires_grad_(False)
        self._freeze_loose_parameters(frozen=what != "none")
        self.train(getattr(self, "_asked_to_train", self.training))

    def _freeze_loose_parameters(self, *, frozen: bool) -> None:
        """Freezes parameters of the embedding stage that belong to no module of their own."""

    def train(self, mode: bool = True) -> "Encoder":
        """Frozen parts stay in evaluation mode, so that dropout can't move them."""
        self._asked_to_train = mode  # `training` says False of an encoder that is frozen as a whole
        super().train(mode)
        for module in getattr(self, "_frozen", []):
            if module is self:
                super().train(False)
            else:
                module.eval()
        return self


class TextEncoder(Encoder):
    """A BERT (arXiv:1810.04805) of `text_layers` layers, without its pooler."""

    def __init__(self, config: MMBertConfig):
        super().__init__()
        assert config.text_hidden_size is not None  # filled in by MMBertConfig
        self.width = config.text_hidden_size
        self.bert = BertModel(
            BertConfig(
                vocab_size=config.vocab_size,
                hidden_size=self.width,
                num_hidden_layers=config.text_layers,
                num_attention_heads=config.text_num_attention_heads,  # pyright: ignore[reportArgumentType]
                intermediate_size=config.text_intermediate_size,  # pyright: ignore[reportArgumentType]
                hidden_dropout_prob=config.hidden_dropout_prob,
                attention_probs_dropout_prob=config.attention_probs_dropout_prob,
                max_position_embeddings=config.max_position_embeddings,
                layer_norm_eps=config.layer_norm_eps,
                initializer_range=config.initializer_range,
                pad_token_id=config.pad_token_id,
            ),
            add_pooling_layer=False,
        )

    def blocks(self) -> tuple[tuple[nn.Module, ...], nn.ModuleList | nn.Sequential]:
        """The embeddings and the list of layers."""
        return (self.bert.embeddings,), self.bert.encoder.layer

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, *, layers: Sequence[int] = ()) -> Tokens:
        """Encodes (B, T) token ids.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, T), 1 = real token; None = all real.
            layers: Layers, from 1, whose outputs are wanted in `Tokens.intermediate`.

        Raises:
            UsageError: More tokens than position embeddings.
        """
        longest = self.bert.config.max_position_embeddings
        if input_ids.shape[1] > longest:
            raise UsageError(
                f"input_ids has {input_ids.shape[1]} tokens, but max_position_embeddings={longest}; truncate the text."
            )
        wanted = "sdpa" if fused_attention_is_faster(input_ids.device) else "eager"
        if self.bert.config._attn_implementation != wanted:
            self.bert.set_attn_implementation(wanted)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        out = self.bert(input_ids=input_ids, attention_mask=mask, output_hidden_states=bool(layers))
        intermediate = tuple(out.hidden_states[i] for i in layers)  # hidden_states[0] are the embeddings
        return Tokens(out.last_hidden_state, mask.bool(), intermediate)


class ImageEncoder(Encoder):
    """Any ViT of timm with `image_layers` layers; its prefix tokens (class, registers) come first.

    A ViT without class token gets the mean of its patches as first token, so that `Tokens.first` always stands for the
    whole image.
    """

    def __init__(self, config: MMBertConfig):
        super().__init__()
        overrides: dict[str, Any] = {
            "depth": config.image_layers,
            "img_size": config.image_size,
            "patch_size": config.patch_size,
            "embed_dim": config.image_hidden_size,
            "num_heads": config.image_num_attention_heads,
        }
        self.vit: Any = create_vit(config.image_model, **{k: v for k, v in overrides.items() if v is not None})
        self.width = self.vit.num_features
        self.has_class_token = getattr(self.vit, "cls_token", None) is not None
        use_fused_attention(self.vit, fused_attention_is_faster(torch.device("cpu")))

    def blocks(self) -> tuple[tuple[nn.Module, ...], nn.ModuleList | nn.Sequential]:
        """The patch embedding with the norm that CLIP's ViTs have behind it, and the list of layers."""
        norm = getattr(self.vit, "norm_pre", None)
        return (self.vit.patch_embed, *([] if norm is None else [norm])), self.vit.blocks

    def _freeze_loose_parameters(self, *, frozen: bool) -> None:
        for parameter in self.vit.parameters(recurse=False):  # position table, class and register tokens
            parameter.requires_grad_(not frozen)

    def forward(self, pixel_values: Tensor, *, layers: Sequence[int] = ()) -> Tokens:
        """Encodes (B, 3, S, S) normalised images to (B, P, width) tokens, all real.

        Args:
            pixel_values: (B, 3, S, S) float.
            layers: Layers, from 1, whose outputs are wanted in `Tokens.intermediate`.

        Raises:
            UsageError: Images of another shape than (B, 3, `image_size`, `image_size`).
        """
        side = self.vit.patch_embed.img_size
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (3, *side):
            raise UsageError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; this model takes (B, 3, {side[0]}, {side[1]}): "
                "resize with MMBertProcessor or build the model with another image_size."
            )
        use_fused_attention(self.vit, fused_attention_is_faster(pixel_values.device))
        if layers:
            hidden_states, found = self.vit.forward_intermediates(
                pixel_values, indices=[i - 1 for i in layers], output_fmt="NLC", return_prefix_tokens=True
            )
            if self.vit.num_prefix_tokens:  # timm hands out (patches, prefix)
                found = [torch.cat([prefix, patches], dim=1) for patches, prefix in found]
            by_layer = dict(zip(sorted(set(layers)), found, strict=True))
            intermediate = tuple(self._with_first(by_layer[i]) for i in layers)
        else:
            hidden_states, intermediate = self.vit.forward_features(pixel_values), ()
        hidden_states = self._with_first(hidden_states)
        return Tokens(hidden_states, hidden_states.new_ones(hidden_states.shape[:2], dtype=torch.bool), intermediate)

    def _with_first(self, hidden_states: Tensor) -> Tensor:
        if self.has_class_token:
            return hidden_states
        patches = hidden_states[:, self.vit.num_prefix_tokens :]
        return torch.cat([patches.mean(dim=1, keepdim=True), hidden_states], dim=1)


def create_vit(name: str, *, pretrained: bool = False, **overrides: Any) -> Any:
    """Builds a headless ViT of timm.

    Raises:
        UsageError: timm does not know the name or can not fetch it, it is no ViT, or the overrides do not fit it.
    """
    vit: Any
    try:
        try:  # without pooling a ViT has no pooling weights, which nothing here would train
            vit = timm.create_model(name, pretrained=pretrained, num_classes=0, global_pool="", **overrides)
        except AssertionError:  # distilled ViTs insist on their own pooling; it has no weights
            vit = timm.create_model(name, pretrained=pretrained, num_classes=0, **overrides)
    except (OSError, RuntimeError, TypeError, AssertionError, ValueError) as error:  # OSError: no network
        raise UsageError(f"timm can't build image_model='{name}' with {overrides}: {error}") from error
    if not hasattr(vit, "blocks") or not hasattr(vit, "patch_embed") or not hasattr(vit, "num_prefix_tokens"):
        raise UsageError(f"image_model='{name}' is no ViT of timm: it has no patch_embed, blocks and prefix tokens.")
    size, patch = vit.patch_embed.img_size, vit.patch_embed.patch_size
    if size is not None and size[0] % patch[0]:
        raise UsageError(
            f"image_size={size[0]} is not a multiple of the patch size {patch[0]} of image_model='{name}'; "
            f"next are {size[0] // patch[0] * patch[0]} and {(size[0] // patch[0] + 1) * patch[0]}."
        )
    return vit


def use_fused_attention(vit: nn.Module, fused: bool) -> None:
    """Sets the attention path of every block of a timm ViT."""
    for module in vit.modules():
        if getattr(module, "fused_attn", fused) is not fused:
            setattr(module, "fused_attn", fused)  # noqa: B010 - pyright takes attributes of modules for tensors
