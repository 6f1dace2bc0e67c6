"""Text and image encoder: model inputs to `Tokens`, each in its own width."""

import inspect
from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertModel
from transformers.activations import ACT2FN

from mmbert.errors import UsageError, did_you_mean
from mmbert.model.configuration import MMBertConfig
from mmbert.model.dropout import speed_up_dropout
from mmbert.model.layers import fused_attention_is_faster
from mmbert.model.options import TIMM_KEYS
from mmbert.model.patches import speed_up_patches
from mmbert.model.tokens import Tokens


class Encoder(nn.Module):
    """Base class of the encoders: freezes parameters, and keeps frozen modules in evaluation mode."""

    width: int
    """Width of its tokens, in features."""
    frozen: str | int = "none"
    """Argument of the last call of `freeze`."""

    def blocks(self) -> tuple[tuple[nn.Module, ...], nn.ModuleList | nn.Sequential]:
        """Return the modules of the embedding stage, and the list of layers."""
        raise NotImplementedError

    def freeze(self, what: str | int) -> None:
        """Exclude parameters from training.

        Args:
            what: "none"; "all"; or n for the embeddings and the first n layers.

        Raises:
            UsageError: Anything else, or more layers than there are.
        """
        self.frozen = what
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
        self._freeze_raw_parameters(frozen=what != "none")
        self.train(getattr(self, "_requested_training", self.training))

    def _freeze_raw_parameters(self, *, frozen: bool) -> None:
        """Set `requires_grad` of parameters of the embedding stage that belong to no submodule."""

    def train(self, mode: bool = True) -> "Encoder":
        """Set the training mode; frozen modules stay in evaluation mode, without dropout."""
        self._requested_training = mode  # `training` is False where the encoder is frozen completely
        super().train(mode)
        for module in getattr(self, "_frozen", []):
            if module is self:
                super().train(False)
            else:
                module.eval()
        return self


class TextEncoder(Encoder):
    """BERT (arXiv:1810.04805) of `text_layers` layers without its pooler."""

    def __init__(self, config: MMBertConfig):
        super().__init__()
        assert config.text_hidden_size is not None  # set by MMBertConfig
        check_activation(config)
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
                layer_norm_eps=config.text_layer_norm_eps or config.layer_norm_eps,
                initializer_range=config.initializer_range,
                pad_token_id=config.pad_token_id,
                type_vocab_size=config.type_vocab_size,
                hidden_act=config.text_hidden_act,
            ),
            add_pooling_layer=False,
        )
        speed_up_dropout(self.bert)

    @property
    def transformer(self) -> BertModel:
        """The model of transformers."""
        return self.bert

    @property
    def attentions(self) -> list[nn.Module]:
        """Modules that return (output, attention weights), one a layer."""
        return [layer.attention.self for layer in self.bert.encoder.layer]  # pyright: ignore

    def blocks(self) -> tuple[tuple[nn.Module, ...], nn.ModuleList | nn.Sequential]:
        """Return the embeddings and the list of layers."""
        return (self.bert.embeddings,), self.bert.encoder.layer

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        layers: Sequence[int] = (),
    ) -> Tokens:
        """Encode (B, T) token ids to (B, T, width) tokens.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, T), 1 = real token; None = all real.
            token_type_ids: (B, T) segments; None = all 0.
            layers: Layers, counted from 1, whose outputs are returned in `Tokens.intermediate`.

        Raises:
            UsageError: More tokens than position embeddings.
        """
        check_length(input_ids, self.bert.config.max_position_embeddings)
        implementation = "sdpa" if fused_attention_is_faster(input_ids.device) else "eager"
        if self.bert.config._attn_implementation != implementation:
            self.bert.set_attn_implementation(implementation)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        out = self.bert(
            input_ids=input_ids, attention_mask=mask, token_type_ids=token_type_ids, output_hidden_states=bool(layers)
        )
        intermediate = tuple(out.hidden_states[i] for i in layers)  # hidden_states[0] are the embeddings
        return Tokens(out.last_hidden_state, mask.bool(), intermediate)


def check_activation(config: MMBertConfig) -> None:
    """Check the activation of the text encoder.

    Raises:
        UsageError: `text_hidden_act` is not the name of one.
    """
    if config.text_hidden_act not in ACT2FN:
        raise UsageError(
            f"text_hidden_act='{config.text_hidden_act}' is no activation of transformers; allowed are "
            f"{', '.join(sorted(ACT2FN))}.{did_you_mean(config.text_hidden_act, ACT2FN)}"
        )


def put_first(hidden_states: Tensor, index: Tensor) -> Tensor:
    """Replace the first of (B, T, D) states by that of the token which represents the text, (B,) int64."""
    found = hidden_states.gather(1, index[:, None, None].expand(-1, 1, hidden_states.shape[-1]))  # (B, 1, D)
    return torch.cat([found, hidden_states[:, 1:]], dim=1)


def check_length(input_ids: Tensor, max_length: int) -> None:
    """Check that there is a position embedding for each of (B, T) tokens.

    Raises:
        UsageError: More tokens than `max_length`.
    """
    if input_ids.shape[1] > max_length:
        raise UsageError(
            f"input_ids has {input_ids.shape[1]} tokens, but max_position_embeddings={max_length}; truncate texts."
        )


class ImageEncoder(Encoder):
    """A timm ViT (arXiv:2010.11929) of `image_layers` layers; its prefix tokens (class, registers) come first.

    A ViT without class token gets the mean of its patches as first token, so that `Tokens.first` always represents the
    image.
    """

    def __init__(self, config: MMBertConfig):
        super().__init__()
        self.vit: Any = build_vit(config)
        self.width = self.vit.num_features
        self.has_class_token = getattr(self.vit, "cls_token", None) is not None
        arguments = inspect.signature(self.vit.forward_intermediates).parameters
        self.has_layer_outputs = "return_prefix_tokens" in arguments
        use_fused_attention(self.vit, fused_attention_is_faster(torch.device("cpu")))

    def blocks(self) -> tuple[tuple[nn.Module, ...], nn.ModuleList | nn.Sequential]:
        """Return the patch embedding with the norm that CLIP's ViTs apply to it, and the list of layers."""
        norm = getattr(self.vit, "norm_pre", None)
        return (self.vit.patch_embed, *([] if norm is None else [norm])), self.vit.blocks

    def _freeze_raw_parameters(self, *, frozen: bool) -> None:
        for parameter in self.vit.parameters(recurse=False):  # position embedding, class and register tokens
            parameter.requires_grad_(not frozen)

    def forward(self, pixel_values: Tensor, *, layers: Sequence[int] = ()) -> Tokens:
        """Encode (B, 3, S, S) normalised images to (B, P, width) tokens without padding.

        Args:
            pixel_values: (B, 3, S, S), cast to the data type of the weights.
            layers: Layers, counted from 1, whose outputs are returned in `Tokens.intermediate`.

        Raises:
            UsageError: Images of another shape than (B, 3, `image_size`, `image_size`), or layers that the ViT does not
                return.
        """
        check_image_size(pixel_values, side(self.vit.patch_embed.img_size))
        pixel_values = pixel_values.to(next(self.vit.parameters()).dtype)  # of a model in bfloat16, say
        use_fused_attention(self.vit, fused_attention_is_faster(pixel_values.device))
        if layers:
            if not self.has_layer_outputs:
                raise UsageError(
                    "this fusion reads single layers of the image encoder, which timm can't return with their prefix "
                    f"tokens for a {type(self.vit).__name__}; choose another fusion or image_model."
                )
            has_prefix = self.vit.num_prefix_tokens > 0
            hidden_states, found = self.vit.forward_intermediates(
                pixel_values, indices=[i - 1 for i in layers], output_fmt="NLC", return_prefix_tokens=has_prefix
            )
            if has_prefix:  # timm returns (patches, prefix)
                found = [torch.cat([prefix, patches], dim=1) for patches, prefix in found]
            by_layer = dict(zip(sorted(set(layers)), found, strict=True))
            intermediate = tuple(self._with_first_token(by_layer[i]) for i in layers)
        else:
            hidden_states, intermediate = self.vit.forward_features(pixel_values), ()
        expected = self.vit.patch_embed.num_patches + self.vit.num_prefix_tokens
        if hidden_states.shape[1] != expected:
            raise UsageError(
                f"this {type(self.vit).__name__} returns {hidden_states.shape[1]} tokens, but has {expected}: with "
                f"image_layers={len(self.vit.blocks)} it drops its class token. Choose another image_model or depth."
            )
        hidden_states = self._with_first_token(hidden_states)
        return Tokens(hidden_states, hidden_states.new_ones(hidden_states.shape[:2], dtype=torch.bool), intermediate)

    def encode_frozen(self, pixel_values: Tensor, depth: str | int, *, layers: Sequence[int] = ()) -> Tensor:
        """Compute what an encoder cache stores, for `continue_from`.

        Args:
            pixel_values: (B, 3, S, S), normalized.
            depth: "all", or n for the embeddings and the first n layers.
            layers: See `forward`.

        Returns:
            (B, P, width * K): the output of that part, then the `layers` below it, side by side.
        """
        if depth == "all":
            tokens = self(pixel_values, layers=layers)
            return torch.cat([tokens.hidden_states, *tokens.intermediate], dim=-1)
        numbers = [*self._lower_layers(int(depth), layers), int(depth)]
        has_prefix = self.vit.num_prefix_tokens > 0
        found = self.vit.forward_intermediates(
            pixel_values.to(next(self.vit.parameters()).dtype), indices=[i - 1 for i in numbers], output_fmt="NLC",
            return_prefix_tokens=has_prefix, intermediates_only=True, stop_early=True,
        )  # fmt: skip
        if has_prefix:
            found = [torch.cat([prefix, patches], dim=1) for patches, prefix in found]
        return torch.cat([found[-1], *found[:-1]], dim=-1)

    def continue_from(self, frozen_states: Tensor, depth: str | int, *, layers: Sequence[int] = ()) -> Tokens:
        """Compute the output of `forward` from that of `encode_frozen`."""
        states = frozen_states.to(next(self.vit.parameters()).dtype)
        hidden_states, *lower = (x.contiguous() for x in states.split(self.width, dim=-1))
        if depth == "all":
            intermediate = tuple(lower)
        else:
            use_fused_attention(self.vit, fused_attention_is_faster(states.device))
            by_layer = dict(zip(self._lower_layers(int(depth), layers), lower, strict=True))
            by_layer[int(depth)] = hidden_states
            for number, block in enumerate(self.vit.blocks[int(depth) :], int(depth) + 1):
                if self.vit.grad_checkpointing and self.training:
                    hidden_states = checkpoint(block, hidden_states, use_reentrant=False)
                else:
                    hidden_states = block(hidden_states)
                by_layer[number] = hidden_states
            hidden_states = self._with_first_token(self.vit.norm(hidden_states))
            intermediate = tuple(self._with_first_token(by_layer[i]) for i in layers)
        return Tokens(hidden_states, hidden_states.new_ones(hidden_states.shape[:2], dtype=torch.bool), intermediate)

    @staticmethod
    def _lower_layers(depth: int, layers: Sequence[int]) -> list[int]:
        return sorted({i for i in layers if i < depth})

    def _with_first_token(self, hidden_states: Tensor) -> Tensor:
        if self.has_class_token:
            return hidden_states
        patches = hidden_states[:, self.vit.num_prefix_tokens :]
        return torch.cat([patches.mean(dim=1, keepdim=True), hidden_states], dim=1)


def check_image_size(pixel_values: Tensor, size: int) -> None:
    """Check the shape of images.

    Raises:
        UsageError: It is not (B, 3, `size`, `size`).
    """
    if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (3, size, size):
        raise UsageError(
            f"pixel_values has shape {tuple(pixel_values.shape)}; this model takes (B, 3, {size}, {size}): "
            "resize with MMBertProcessor or build the model with another image_size."
        )


def build_vit(config: MMBertConfig) -> Any:
    """Build the ViT that a configuration describes, with random weights.

    Raises:
        UsageError: See `create_vit`; or the architecture does not take one of the sizes.
    """
    sizes = {name: getattr(config, key) for name, key in TIMM_KEYS.items() if getattr(config, key) is not None}
    vit = create_vit(config.image_model, **config.image_model_args, **sizes)
    if "embed_dim" in sizes and vit.num_features != sizes["embed_dim"]:
        # ConViT multiplies embed_dim by the number of heads; the width may still be that of the architecture.
        vit = create_vit(config.image_model, **config.image_model_args, **{**sizes, "embed_dim": None})
    if config.image_layer_norm_eps is not None:
        for module in vit.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = config.image_layer_norm_eps
    if not config.image_final_norm:
        vit.norm = nn.Identity()
    for name, value in vit_sizes(vit).items():
        if value is not None and sizes.get(name, value) != value:
            raise UsageError(
                f"{TIMM_KEYS[name]}={sizes[name]}, but image_model='{config.image_model}' builds {value}; leave it out "
                "or choose another image_model."
            )
    return vit


def vit_sizes(vit: Any) -> dict[str, int | None]:
    """Return the sizes of a ViT by timm's argument names; None where it has no such number."""
    attention = getattr(vit.blocks[0], "attn", None) if len(vit.blocks) else None
    return {
        "depth": len(vit.blocks),
        "img_size": side(vit.patch_embed.img_size),
        "patch_size": side(vit.patch_embed.patch_size),
        "embed_dim": vit.num_features,
        "num_heads": getattr(attention, "num_heads", None),
    }


def create_vit(name: str, **arguments: Any) -> Any:
    """Build a ViT of timm without classification head and pooling.

    Args:
        name: Name that `timm.create_model` takes.
        arguments: Further arguments of `timm.create_model`; None stands for the architecture's default.

    Raises:
        UsageError: timm does not know the name or can't fetch it, it is no ViT, or the arguments do not fit it.
    """
    arguments = {"global_pool": "", **arguments, "num_classes": 0}
    vit: Any
    try:
        try:
            vit = timm.create_model(name, **arguments)
        except AssertionError:  # some families insist on their own pooling
            if arguments["global_pool"] != "":
                raise
            vit = timm.create_model(name, **{**arguments, "global_pool": None})
    except (OSError, RuntimeError, TypeError, AssertionError, ValueError, KeyError) as error:  # OSError: no network
        shown = {key: value for key, value in arguments.items() if not key.startswith("pretrained")}
        reason = " ".join(str(error).split())
        raise UsageError(f"timm can't build image_model='{name}' with {shown}: {reason}") from error
    if not all(hasattr(vit, part) for part in ("blocks", "patch_embed", "num_prefix_tokens")):
        raise UsageError(f"image_model='{name}' is no ViT of timm: it has no patch_embed, blocks and prefix tokens.")
    for part in POOLING_PARTS:  # used behind the tokens only: parameters without gradient
        if isinstance(getattr(vit, part, None), nn.Module):
            setattr(vit, part, nn.Identity())
    speed_up_patches(vit.patch_embed)
    size, patch = side(vit.patch_embed.img_size), side(vit.patch_embed.patch_size)
    if size % patch:
        raise UsageError(
            f"image_size={size} is not a multiple of the patch size {patch} of image_model='{name}'; "
            f"next are {size // patch * patch} and {(size // patch + 1) * patch}."
        )
    return vit


def side(size: int | Sequence[int] | None) -> int:
    """Return the side, in pixels, of a square given as timm does: one number or two.

    Raises:
        UsageError: It is no square, or of no fixed size.
    """
    sides = {size} if isinstance(size, int) else {*(size or ())}
    if len(sides) != 1:
        raise UsageError(f"the image model has images or patches of {size}; both must be squares of a fixed size.")
    return sides.pop()


POOLING_PARTS = ("fc_norm", "attn_pool", "head", "head_dist")
"""Modules of timm's ViTs between tokens and class logits."""


def use_fused_attention(vit: nn.Module, fused: bool) -> None:
    """Choose between fused and plain attention in every block of a timm ViT."""
    for module in vit.modules():
        if getattr(module, "fused_attn", fused) is not fused:
            setattr(module, "fused_attn", fused)  # noqa: B010 - pyright takes attributes of modules for tensors
