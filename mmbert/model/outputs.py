"""Outputs of the models as transformers' `ModelOutput`s, and the recording of hidden states and attention weights."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from mmbert.model.layers import FusionLayer, record_attention
from mmbert.model.objectives.base import ObjectiveOutput

_recording: ContextVar[bool] = ContextVar("recording", default=False)


@dataclass
class MMBertOutput(ModelOutput):
    """Output of `MMBertModel`. An absent modality has length 0.

    `hidden_states` and `attentions` are in the order of the computation: the text encoder's embeddings and layers,
    the blocks of the image encoder, the layers of the fusion (in two streams text before image, in each layer
    self-attention before cross-attention). Their widths, lengths and numbers of heads differ.
    """

    last_hidden_state: Tensor | None = None  # (B, T, D) text positions after the fusion
    image_last_hidden_state: Tensor | None = None  # (B, P, D) image positions after the fusion
    pooler_output: Tensor | None = None  # (B, D) joint vector
    hidden_states: tuple[Tensor, ...] | None = None  # (B, L, width) each
    attentions: tuple[Tensor, ...] | None = None  # (B, H, L, S) each

    @property
    def pooled(self) -> Tensor | None:
        """Joint vector, under the name that `Fused` has for it."""
        return self.pooler_output


@dataclass
class PreTrainingOutput(ModelOutput):
    """Output of `MMBertForPreTraining`: the logits of each head, or on a training batch `objectives` alone."""

    loss: Tensor | None = None  # () weighted sum of the losses
    mlm_logits: Tensor | None = None  # (B, T, V)
    itm_logits: Tensor | None = None  # (B, 2) mismatched, matched
    logits_per_image: Tensor | None = None  # (B, B) contrastive, images x texts
    logits_per_text: Tensor | None = None  # (B, B) contrastive, texts x images
    hidden_states: tuple[Tensor, ...] | None = None  # see `MMBertOutput`
    attentions: tuple[Tensor, ...] | None = None
    objectives: dict[str, ObjectiveOutput] | None = None


@dataclass
class TaskOutput(ModelOutput):
    """Output of `MMBertForTask`."""

    loss: Tensor | None = None  # ()
    logits: Tensor | None = None  # (B, labels)
    hidden_states: tuple[Tensor, ...] | None = None  # see `MMBertOutput`
    attentions: tuple[Tensor, ...] | None = None
    objectives: dict[str, ObjectiveOutput] | None = None


class Recorded:
    """Hidden states and attention weights of one forward pass; None: not requested."""

    def __init__(self, hidden_states: list[Tensor] | None, attentions: list[Tensor] | None):
        self._hidden_states, self._attentions = hidden_states, attentions

    def outputs(self) -> dict[str, tuple[Tensor, ...] | None]:
        """Return the fields of an output."""
        both = {"hidden_states": self._hidden_states, "attentions": self._attentions}
        return {name: None if found is None else tuple(found) for name, found in both.items()}


def is_recording() -> bool:
    """Whether the states of all positions are wanted, even those that no head reads."""
    return _recording.get()


@contextmanager
def record_states(model: Any, *, hidden_states: bool, attentions: bool) -> Iterator[Recorded]:
    """Record what `MMBertOutput` documents in every forward pass of this block.

    Args:
        model: An `MMBertModel`.
        hidden_states: Record the output of each layer.
        attentions: Record the weights of each attention; all of them are computed plainly then.
    """
    if not (hidden_states or attentions):
        yield Recorded(None, None)
        return
    states: list[Tensor] = []
    token = _recording.set(True)
    try:
        with ExitStack() as stack:
            weights = stack.enter_context(record_attention()) if attentions else []

            def keep(module: nn.Module, kept: list[Tensor], item: int | None = None) -> None:
                def hook(module: nn.Module, args: Any, output: Any) -> None:
                    kept.append(output if item is None or isinstance(output, Tensor) else output[item])

                stack.callback(module.register_forward_hook(hook).remove)

            text, vit = model.text_encoder, model.image_encoder.vit
            if hidden_states:
                fusion_layers = [m for m in model.fusion.modules() if isinstance(m, FusionLayer)]
                embeddings, layers = text.blocks()
                for layer in (*embeddings, *layers, *vit.blocks, *fusion_layers):
                    keep(layer, states, item=0)
            if attentions:
                for module in text.attentions:
                    keep(module, weights, item=1)
                for name, module in vit.named_modules():
                    if name.endswith("attn_drop"):  # applied to the weights
                        keep(module, weights)
            yield Recorded(states if hidden_states else None, weights if attentions else None)
    finally:
        _recording.reset(token)
