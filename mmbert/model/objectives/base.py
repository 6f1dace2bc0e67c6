"""What an objective gets and gives."""

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mmbert.model.tokens import Fused, Tokens

Batch = dict[str, Tensor]


class TextImageModel(Protocol):
    """What objectives need of a model; `mmbert.model.modeling.MMBertModel` is one."""

    @property
    def word_embeddings(self) -> Tensor:
        """The (V, text width) matrix of word embeddings."""
        ...

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tokens:
        """(B, T) token ids to (B, T, D) tokens."""
        ...

    def encode_image(self, pixel_values: Tensor) -> Tokens:
        """(B, 3, S, S) images to (B, P, D) tokens."""
        ...

    def fuse(self, text: Tokens, image: Tokens) -> Fused:
        """Fuses encoded texts with encoded images, row by row."""
        ...


class ObjectiveOutput(NamedTuple):
    """What an objective computes from one batch."""

    loss: Tensor  # () mean over the items that count, over all processes
    logits: Tensor  # (K, classes) fp32
    targets: Tensor  # (K,) int64
    left_out: Tensor  # () int64, rows that could not take part


class EncodedBatch:
    """One batch whose views are computed on first use and shared by every objective of the step.

    Args:
        model: Encodes and fuses.
        batch: See `mmbert.data.collate` for its keys.
        generator: Draws negatives; the same on every process.
        similarity: (B text vectors, B image vectors) to logits, from the contrastive objective if there is one.
    """

    def __init__(
        self,
        model: TextImageModel,
        batch: Batch,
        *,
        generator: torch.Generator | None = None,
        similarity: Callable[["EncodedBatch"], Tensor] | None = None,
    ):
        self.model, self.batch, self.generator, self._similarity = model, batch, generator, similarity

    @cached_property
    def image(self) -> Tokens:
        """Image after its encoder."""
        return self.model.encode_image(self.batch["pixel_values"])

    @cached_property
    def text(self) -> Tokens:
        """Clean text after its encoder."""
        return self.model.encode_text(self.batch["input_ids"], self.batch["attention_mask"])

    @cached_property
    def masked_text(self) -> Tokens:
        """Text with masked tokens after its encoder."""
        return self.model.encode_text(self.batch["mlm_input_ids"], self.batch["attention_mask"])

    @cached_property
    def fused(self) -> Fused:
        """Clean text with its own image."""
        return self.model.fuse(self.text, self.image)

    @cached_property
    def masked_fused(self) -> Fused:
        """Masked text with its own image."""
        return self.model.fuse(self.masked_text, self.image)

    @cached_property
    def similarities(self) -> Tensor | None:
        """(B, B of all processes) contrastive logits of own texts with all images; None without that objective."""
        return None if self._similarity is None else self._similarity(self).detach()


class Objective(nn.Module):
    """A head and its loss, in one file, listed in `mmbert.model.objectives.OBJECTIVES`.

    The constructor takes the model's configuration and the options that `config.objectives` gives, by name.
    """

    def forward(self, encoded: EncodedBatch) -> ObjectiveOutput:
        """Computes the loss of one batch."""
        raise NotImplementedError


def no_autocast(reference: Tensor) -> Any:
    """Context in which losses, similarities and matching logits are computed in fp32 (fp64 stays)."""
    return torch.autocast(device_type=reference.device.type, enabled=False)


def full_precision(x: Tensor) -> Tensor:
    """Half precision to fp32; fp32 and fp64 stay."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
