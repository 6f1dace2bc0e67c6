"""Transformer layers of the fusion part, post-LayerNorm as in BERT (arXiv:1810.04805), and their attention."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmbert.model.configuration import MMBertConfig
from mmbert.model.dropout import Dropout
from mmbert.model.dropout import dropout as apply_dropout
from mmbert.model.tokens import Tokens


def fused_attention_is_faster(device: torch.device) -> bool:
    """Choose between fused and plain attention, for BERT, the ViT and the fusion layers.

    On a CPU, plain `softmax(q k^T) v` is faster than torch's fused kernel at these sequence lengths, because of its
    backward pass; `benchmarks/attention.py` measures both. Only plain attention has weights to record.
    """
    return device.type != "cpu" and _recorded_weights.get() is None


_recorded_weights: ContextVar[list[Tensor] | None] = ContextVar("recorded_weights", default=None)


@contextmanager
def record_attention() -> Iterator[list[Tensor]]:
    """Record the weights of every call of `attend` in this block, with their graph; BERT and the ViT run plain too.

    Yields:
        List that grows by (B, H, L, S) weights with each call.
    """
    weights: list[Tensor] = []
    token = _recorded_weights.set(weights)
    try:
        yield weights
    finally:
        _recorded_weights.reset(token)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, dropout: float = 0.0) -> Tensor:
    """Scaled dot-product attention (arXiv:1706.03762, Eq. 1) in which an empty context contributes zero.

    Args:
        query: (B, H, L, D/H).
        key: (B, H, S, D/H) of the context.
        value: (B, H, S, D/H) of the context.
        mask: (B, S) bool, True = a real token of the context.
        dropout: Fraction of attention weights to drop.

    Returns:
        (B, H, L, D/H); exact zeros in rows whose context has no real token.
    """
    visible = mask[:, None, None, :]  # (B, 1, 1, S)
    if fused_attention_is_faster(query.device) and mask.shape[1] > 0:
        has_context = visible.any(dim=-1, keepdim=True)  # (B, 1, 1, 1)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=visible | ~has_context, dropout_p=dropout)
        return torch.where(has_context, out, 0.0)
    scores = query @ key.transpose(-1, -2)  # (B, H, L, S)
    scores /= math.sqrt(query.shape[-1])  # in place, as a copy of the scores costs as much as their softmax
    if not surely_all(mask):  # half of the smallest number: the sum does not overflow, and softmax makes exact zeros
        smallest = torch.finfo(scores.dtype).min
        scores += torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, smallest / 2)[:, None, None, :]
    weights = scores.softmax(dim=-1)
    has_context = mask.any(dim=1)[:, None, None, None]
    if not surely_all(has_context):
        weights = weights.masked_fill(~has_context, 0.0)  # zero, not uniform
    weights = apply_dropout(weights, dropout)
    recorded = _recorded_weights.get()
    if recorded is not None:
        recorded.append(weights)
    return weights @ value


def surely_all(condition: Tensor) -> bool:
    """Tell whether all of `condition` is true, where that is known without waiting for a GPU or breaking a graph."""
    return condition.device.type == "cpu" and not torch.compiler.is_compiling() and bool(condition.all())


class Attention(nn.Module):
    """Multi-head attention with output projection, residual and LayerNorm: BERT's attention block.

    With `fusion_norm` pre the LayerNorm is applied to the inputs; a context of another stream has one of its own.

    Args:
        config: The model's configuration.
        is_cross: Whether the context is another stream.
    """

    def __init__(self, config: MMBertConfig, *, is_cross: bool = False):
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.attention_dropout = config.attention_probs_dropout_prob
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.norm_first = config.fusion_norm == "pre"
        if self.norm_first and is_cross:
            self.context_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.is_cross = is_cross

    def forward(self, hidden_states: Tensor, context: Tokens) -> Tensor:
        """Attend from `hidden_states` (B, L, D) to `context` (B, S, D); an empty context adds zero to the residual."""
        residual = hidden_states
        if self.norm_first:
            context_norm = self.context_norm if self.is_cross else self.norm
            context = context._replace(hidden_states=context_norm(context.hidden_states))
            hidden_states = self.norm(hidden_states)
        query, key, value = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, L or S, D/H)
            for linear, x in (
                (self.query, hidden_states),
                (self.key, context.hidden_states),
                (self.value, context.hidden_states),
            )
        )
        attended = attend(query, key, value, context.mask, dropout=self.attention_dropout if self.training else 0.0)
        attended = self.output(attended.transpose(1, 2).flatten(2))  # (B, L, D)
        has_context = context.mask.any(dim=1)[:, None, None]
        if not surely_all(has_context):  # without any context the output bias must not be added either
            attended = torch.where(has_context, attended, 0.0)
        output = residual + self.dropout(attended)
        return output if self.norm_first else self.norm(output)


class FeedForward(nn.Module):
    """Position-wise feed-forward block with residual and LayerNorm."""

    def __init__(self, config: MMBertConfig):
        super().__init__()
        assert config.intermediate_size is not None
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.norm_first = config.fusion_norm == "pre"

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Apply the block: (B, L, D) to (B, L, D)."""
        if self.norm_first:
            return hidden_states + self.dropout(self.down(F.gelu(self.up(self.norm(hidden_states)))))
        return self.norm(hidden_states + self.dropout(self.down(F.gelu(self.up(hidden_states)))))


class FusionLayer(nn.Module):
    """Base class of the fusion layers, with activation checkpointing where `checkpointing` is set."""

    checkpointing = False
    final_norm: nn.Module | None
    """LayerNorm of the output, in the last layer of a stream where `fusion_final_norm` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.register_module("final_norm", None)

    def run(self, block: Callable[..., Tensor], *args: object) -> Tensor:
        """Run `block(*args)`, with activation checkpointing in training if it is enabled."""
        if self.checkpointing and self.training and torch.is_grad_enabled():
            states: Tensor = checkpoint(block, *args, use_reentrant=False)  # pyright: ignore[reportAssignmentType]
        else:
            states = block(*args)
        return states if self.final_norm is None else self.final_norm(states)


class SelfAttentionLayer(FusionLayer):
    """Self-attention, then feed-forward; equals transformers' `BertLayer`."""

    def __init__(self, config: MMBertConfig):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)

    def forward(self, tokens: Tokens, *, queries: Tokens | None = None) -> Tokens:
        """Apply the layer: (B, L, D) to (B, L, D), with the same mask.

        Args:
            tokens: (B, L, D).
            queries: Those of the tokens whose new states are read: (B, L', D). None: all.
        """
        queries = tokens if queries is None else queries
        if queries.mask.shape[1] == 0:
            return queries
        return queries._replace(hidden_states=self.run(self._block, queries.hidden_states, tokens))

    def _block(self, queries: Tensor, tokens: Tokens) -> Tensor:
        return self.feed_forward(self.attention(queries, tokens))


class CrossAttentionLayer(FusionLayer):
    """Self-attention, then attention to the other stream, then feed-forward (METER, arXiv:2111.02387)."""

    def __init__(self, config: MMBertConfig):
        super().__init__()
        self.attention = Attention(config)
        self.cross_attention = Attention(config, is_cross=True)
        self.feed_forward = FeedForward(config)
        self.skips_absent = config.shared_text_layers

    def forward(self, tokens: Tokens, *, context: Tokens | None, queries: Tokens | None = None) -> Tokens:
        """Apply the layer: (B, L, D) to (B, L, D), with the same mask.

        Args:
            tokens: (B, L, D).
            context: (B, S, D); None: skip the attention to the other stream.
            queries: Those of the tokens whose new states are read: (B, L', D). None: all.
        """
        queries = tokens if queries is None else queries
        if queries.mask.shape[1] == 0:
            return queries
        return queries._replace(hidden_states=self.run(self._block, queries.hidden_states, tokens, context))

    def _block(self, queries: Tensor, tokens: Tokens, context: Tokens | None) -> Tensor:
        hidden_states = self.attention(queries, tokens)
        if context is not None:
            crossed = self.cross_attention(hidden_states, context)
            if self.skips_absent:  # no LayerNorm either
                crossed = torch.where(context.mask.any(dim=1)[:, None, None], crossed, hidden_states)
            hidden_states = crossed
        return self.feed_forward(hidden_states)


def build_layers(kind: type[FusionLayer], config: MMBertConfig) -> nn.ModuleList:
    """Build the `fusion_layers` layers of a stream, the last with a LayerNorm where `fusion_final_norm` is set."""
    layers = nn.ModuleList(kind(config) for _ in range(config.fusion_layers))  # pyright: ignore[reportCallIssue]
    if config.fusion_final_norm and len(layers) > 0:
        layers[-1].final_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
    return layers


class Pooler(nn.Module):
    """Joint vector of one or more pooled vectors, as `config.pooler` says: linear, then tanh, as BERT's pooler."""

    def __init__(self, config: MMBertConfig, *, vectors: int = 1):
        super().__init__()
        self.kind, width = config.pooler, config.hidden_size
        if self.kind == "tanh":
            self.dense: nn.Module = nn.Linear(vectors * width, width)
        elif self.kind == "separate":
            self.dense = nn.ModuleList(nn.Linear(width, width) for _ in range(vectors))

    def forward(self, *vectors: Tensor) -> Tensor:
        """Combine vectors of (B, D) each, or (B, vectors * D), to a joint vector of `joint_size` features."""
        joined = torch.cat(vectors, dim=-1)
        if self.kind == "none":
            return joined
        if self.kind == "tanh":
            return torch.tanh(self.dense(joined))
        parts = joined.chunk(len(self.dense), dim=-1)  # pyright: ignore[reportArgumentType]
        return torch.cat([torch.tanh(f(x)) for f, x in zip(self.dense, parts, strict=True)], dim=-1)  # pyright: ignore
