"""Trace relevance through a forward pass of any fusion strategy, for the rule in `relevance.py`.

Two passes. The first records the attention weights and their gradients. The second finds out which rows of hidden
states each attention reads, whatever a fusion does between its layers (concatenate, split, average, normalise): the
output of every attention block and feed-forward block becomes a leaf of autograd, so that the gradient of a later
input with respect to these leaves is zero but for the rows that it was made from.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmbert.inference.explanation.relevance import RelevanceRows, attend_relevance, mean_positive_attention
from mmbert.model.layers import Attention, FeedForward, record_attention
from mmbert.model.modeling import MMBertModel

ROWS_PER_CALL = 64
"""Rows whose sources are found in one backward call: bounds its memory."""


class Trace(NamedTuple):
    """Relevance by attention for one score."""

    score: Tensor  # ()
    text: Tensor  # (T,)
    image: Tensor  # (P,) tokens of the ViT: class token and registers, then patches
    is_cross_modal: bool  # whether attention moved relevance between the modalities


def trace(core: MMBertModel, run: Callable[[], Tensor]) -> Trace:
    """Compute a score, and the relevance of every input token for it.

    Args:
        core: In evaluation mode.
        run: Encodes one text and one image with `core` and returns the () score.
    """
    with torch.enable_grad():
        first = _Weights(core)
        with first.hooks():
            score = run()
        weights = [w for w in first.weights if w is not None]
        gradients = iter(torch.autograd.grad(score, weights, allow_unused=True) if weights else ())
        maps = [None if w is None else _map(w, next(gradients)) for w in first.weights]
        second = _Sources(core, maps, first.num_text, first.num_image)
        with second.hooks():
            rows = second.sources(run().reshape(1, 1, 1))
    text, image = (rows.relevance - rows.initial)[0].split([first.num_text, first.num_image])
    return Trace(score.detach(), text, image, second.is_cross_modal)


def _map(weights: Tensor, gradient: Tensor | None) -> Tensor:
    gradient = torch.zeros_like(weights) if gradient is None else gradient  # the score does not read its output
    return mean_positive_attention(weights[0].detach().float(), gradient[0].float())


@contextmanager
def replaced_inputs(
    core: MMBertModel, text: Callable[[Tensor], Tensor], image: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Replace the input embeddings of a text (B, T, width) and of an image (B, P, width) by functions of them."""
    embeddings: Any = core.text_encoder.blocks()[0][0]
    blocks = core.image_encoder.vit.blocks
    handles = [
        embeddings.register_forward_hook(lambda module, args, output: text(output)),
        (blocks[0] if len(blocks) else blocks).register_forward_pre_hook(
            lambda module, args: (image(args[0]), *args[1:])
        ),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Pass:
    """Base class of both passes: calls `attended` behind each layer with attention, in the order of their calls."""

    def __init__(self, core: MMBertModel):
        self.core = core
        self.layers: list[nn.Module] = [
            *core.text_encoder.blocks()[1],
            *core.image_encoder.vit.blocks,
            *[module for module in core.fusion.modules() if isinstance(module, Attention)],
        ]

    @contextmanager
    def hooks(self) -> Iterator[None]:
        with ExitStack() as stack:
            recorded = stack.enter_context(record_attention())
            stack.enter_context(replaced_inputs(self.core, self.text_input, self.image_input))

            def hook(module: nn.Module, function: Callable[..., Any], **options: Any) -> None:
                stack.callback(module.register_forward_hook(function, **options).remove)

            for module in self.core.text_encoder.attentions:
                hook(module, lambda module, args, output: recorded.append(output[1]))
            for layer in self.layers:
                for name, module in layer.named_modules():
                    if name.endswith("attn_drop"):  # applied to the weights of timm's ViTs
                        hook(module, lambda module, args, output: recorded.append(output))

                def behind(module: nn.Module, args: Any, named: Any, output: Any) -> Any:
                    weights = recorded.pop() if len(recorded) == 1 else None
                    recorded.clear()
                    context = named.get("context", args[1] if len(args) > 1 else None)
                    states = args[0] if context is None or not isinstance(module, Attention) else context.hidden_states
                    if isinstance(output, tuple):  # of DeBERTa's layers: the states, and their attention weights
                        return (self.attended(args[0], states, weights, output[0]), *output[1:])
                    return self.attended(args[0], states, weights, output)

                hook(layer, behind, with_kwargs=True)
            for module in self.core.fusion.modules():
                if isinstance(module, FeedForward):
                    hook(module, lambda module, args, output: self.transformed(args[0], output))
            yield

    def text_input(self, embeddings: Tensor) -> Tensor:
        raise NotImplementedError

    def image_input(self, embeddings: Tensor) -> Tensor:
        raise NotImplementedError

    def attended(self, states: Tensor, context: Tensor, weights: Tensor | None, output: Tensor) -> Tensor:
        """Return the output of a layer that is called with `states` (1, L, D) and attends to `context` (1, S, D)."""
        raise NotImplementedError

    def transformed(self, states: Tensor, output: Tensor) -> Tensor:
        """Return the output of a feed-forward block."""
        return output


class _Weights(_Pass):
    """First pass: records the attention weights."""

    def __init__(self, core: MMBertModel):
        super().__init__(core)
        self.weights: list[Tensor | None] = []
        self.num_text = self.num_image = 0

    def text_input(self, embeddings: Tensor) -> Tensor:
        self.num_text = embeddings.shape[1]
        return embeddings.detach().requires_grad_()  # so that weights have gradients where all parameters are frozen

    def image_input(self, embeddings: Tensor) -> Tensor:
        self.num_image = embeddings.shape[1]
        return embeddings.detach().requires_grad_()

    def attended(self, states: Tensor, context: Tensor, weights: Tensor | None, output: Tensor) -> Tensor:
        self.weights.append(weights)
        return output


class _Sources(_Pass):
    """Second pass: every output becomes a leaf with the relevance of its rows."""

    def __init__(self, core: MMBertModel, maps: list[Tensor | None], num_text: int, num_image: int):
        super().__init__(core)
        self.maps, self.num_text = iter(maps), num_text
        self.inputs = torch.eye(num_text + num_image, device=core.word_embeddings.device).split([num_text, num_image])
        self.leaves: list[tuple[Tensor, RelevanceRows]] = []
        self.is_cross_modal = False

    def text_input(self, embeddings: Tensor) -> Tensor:
        return self._leaf(embeddings, RelevanceRows(self.inputs[0], self.inputs[0]))

    def image_input(self, embeddings: Tensor) -> Tensor:
        return self._leaf(embeddings, RelevanceRows(self.inputs[1], self.inputs[1]))

    def attended(self, states: Tensor, context: Tensor, weights: Tensor | None, output: Tensor) -> Tensor:
        rows, attention = self.sources(states), next(self.maps)
        if attention is not None:
            after = attend_relevance(rows, self.sources(context), attention, self.num_text)
            for part in (slice(0, self.num_text), slice(self.num_text, None)):
                gained = (after.relevance[:, part] > 0).any(dim=1) & (rows.relevance[:, part] == 0).all(dim=1)
                self.is_cross_modal |= bool((gained & (rows.initial.sum(dim=1) > 0)).any())
            rows = after
        return self._leaf(output, rows)

    def transformed(self, states: Tensor, output: Tensor) -> Tensor:
        return self._leaf(output, self.sources(states))

    def _leaf(self, states: Tensor, rows: RelevanceRows) -> Tensor:
        leaf = states.detach().requires_grad_()
        self.leaves.append((leaf, rows))
        return leaf

    def sources(self, states: Tensor) -> RelevanceRows:
        """Return the mean of the rows that each row of `states` (1, L, D) was made from; zeros where there are none.

        Of several rows each weighs as much as the norm of the gradient with respect to it.
        """
        for leaf, rows in self.leaves:
            if leaf is states:
                return rows
        length = states.shape[1]
        direction = torch.randn(states.shape[2], generator=torch.Generator().manual_seed(0)).to(states)
        weights = [states.new_zeros(length, leaf.shape[1]) for leaf, _ in self.leaves]
        if states.requires_grad:
            for rows in torch.arange(length).split(ROWS_PER_CALL):
                selected = torch.zeros(len(rows), *states.shape, device=states.device, dtype=states.dtype)
                selected[torch.arange(len(rows)), 0, rows] = direction  # one row in each
                found = torch.autograd.grad(
                    states, [leaf for leaf, _ in self.leaves], selected,
                    retain_graph=True, allow_unused=True, is_grads_batched=True,
                )  # fmt: skip
                for weight, gradient in zip(weights, found, strict=True):
                    if gradient is not None:  # (rows, 1, M, width)
                        weight[rows] = gradient[:, 0].norm(dim=-1)
        total = torch.cat(weights, dim=1).sum(dim=1, keepdim=True)
        total = total.masked_fill(total == 0, 1)
        parts = [rows.select((w / total).float()) for w, (_, rows) in zip(weights, self.leaves, strict=True)]
        return RelevanceRows(*(torch.stack(part).sum(dim=0) for part in zip(*parts, strict=True)))
