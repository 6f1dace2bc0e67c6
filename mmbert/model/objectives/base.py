"""The interface of an objective: the encoded batch it reads, and the output it returns."""

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mmbert.model.tokens import READ_ALL, Fused, Reads, Tokens

Batch = dict[str, Tensor]


TEXT_KEYS = {"clean": "input_ids", "masked": "mlm_input_ids", "edited": "edited_input_ids"}
"""Texts that objectives read -> their keys in a batch."""


class TextImageModel(Protocol):
    """Protocol of the model that objectives and tasks call; `mmbert.model.backbone.MMBertModel` implements it."""

    @property
    def word_embeddings(self) -> Tensor:
        """Word embedding matrix, (V, text width)."""
        ...

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Rows and columns of the patches, which are the last tokens of an encoded image, row by row."""
        ...

    def encode_text(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tokens:
        """Encode (B, T) token ids to (B, T, D) tokens."""
        ...

    def encode_image(self, pixel_values: Tensor, image_mask: Tensor | None = None) -> Tokens:
        """Encode (B, 3, S, S) images to (B, P, D) tokens."""
        ...

    def encode_masked_image(self, pixel_values: Tensor, masked: Tensor, mask_token: Tensor) -> Tokens:
        """Encode images whose `masked` patches (B, number of patches) are replaced by the (W,) mask token."""
        ...

    def encode_batch_images(self, batch: Batch, *, prefix: str = "") -> Tokens:
        """Encode the images of a batch, be they pixels or hidden states of the encoder cache, to (B, P, D) tokens."""
        ...

    def fuse(self, text: Tokens, image: Tokens, *, reads: Reads = READ_ALL) -> Fused:
        """Fuse encoded texts with encoded images, row by row; the outputs that `reads` names."""
        ...


class ContrastiveHead(Protocol):
    """Protocol of the objective itc, whose logits other objectives read."""

    def similarity(self, encoded: "EncodedBatch") -> Tensor:
        """Compute logits of local texts and all images, (B, B * world size)."""
        ...

    def both_logits(self, encoded: "EncodedBatch") -> tuple[Tensor, Tensor]:
        """Compute the same, and logits of local images and all texts."""
        ...


class ObjectiveOutput(NamedTuple):
    """Loss, logits and targets of one objective on one batch."""

    loss: Tensor  # () mean over the predictions of all processes
    logits: Tensor  # (K, classes) fp32
    targets: Tensor  # (K,) int64
    left_out: Tensor  # () int64, rows of the batch without a prediction


class SoftTargets(NamedTuple):
    """Soft targets of a batch: predictions of a momentum model, mixed with the labels (ALBEF, arXiv:2107.07651)."""

    alpha: Tensor  # () fp32, weight of the soft targets; the labels have 1 - alpha
    predictions: Mapping[str, tuple[Tensor, ...]]  # objective -> what its `predictions` returned

    def mix(self, hard: Tensor, soft: Tensor) -> Tensor:
        """Mix the loss under the labels with that under the soft targets."""
        return (1 - self.alpha) * hard + self.alpha * soft


class EncodedBatch:
    """Lazily encoded batch: each encoding is computed on first use and shared by all objectives.

    Args:
        model: Encodes and fuses.
        batch: Tensors as `mmbert.data.pairs.Collate` builds them.
        generator: Draws ITM negatives; the same on every process. None: torch's global generator.
        heads: The objectives of the model by name, for those that read the head of another.
        reads: As `Objective.reads`, of all objectives together; see `combine_reads`. None: each text is encoded when it
            is used, and all outputs of its fusion are computed.
        soft_targets: Of a momentum model. None: the labels alone.
        progress: () fp32, fraction of the optimizer steps after a first stage that have been taken. None: outside of
            training, the end.
    """

    def __init__(
        self,
        model: TextImageModel,
        batch: Batch,
        *,
        generator: torch.Generator | None = None,
        heads: Mapping[str, Any] | None = None,
        reads: Mapping[str, Reads] | None = None,
        soft_targets: SoftTargets | None = None,
        progress: Tensor | None = None,
    ):
        self.model, self.batch, self.generator, self.heads = model, batch, generator, heads or {}
        self.contrast: ContrastiveHead | None = self.heads.get("itc")
        self.soft_targets, self.progress = soft_targets, progress
        self._reads = {name: reads[name] for name in TEXT_KEYS if name in reads} if reads else {}

    @cached_property
    def image(self) -> Tokens:
        """Encoded images, (B, P, D)."""
        return self.model.encode_batch_images(self.batch)

    @cached_property
    def text(self) -> Tokens:
        """Encoded texts, (B, T, D)."""
        return self._text("clean")

    @cached_property
    def masked_text(self) -> Tokens:
        """Encoded texts with masked tokens, (B, T, D)."""
        return self._text("masked")

    @cached_property
    def edited_text(self) -> Tokens:
        """Encoded edited captions, and the captions themselves where there is no edit, (B, T, D)."""
        return self._text("edited")

    def _text(self, name: str) -> Tokens:
        """Encode one of the texts in `TEXT_KEYS`; all that objectives declare are one call, which is faster."""
        if name not in self._reads:
            segments = self.batch.get("token_type_ids")
            return self.model.encode_text(self.batch[TEXT_KEYS[name]], self.batch["attention_mask"], segments)
        number, size = [*self._reads].index(name), len(self.batch["attention_mask"])
        return self._declared_texts.rows(slice(number * size, (number + 1) * size))

    @cached_property
    def _declared_texts(self) -> Tokens:
        """The encoded texts that objectives declare, one after the other, (number * B, T, D)."""
        input_ids = torch.cat([self.batch[TEXT_KEYS[name]] for name in self._reads])
        mask, segments = self.batch["attention_mask"], self.batch.get("token_type_ids")
        copies = (len(self._reads), 1)
        return self.model.encode_text(
            input_ids, mask.repeat(copies), None if segments is None else segments.repeat(copies)
        )

    @cached_property
    def fused(self) -> Fused:
        """Texts fused with their images."""
        return self.model.fuse(self.text, self.image, reads=self._reads.get("clean", READ_ALL))

    @cached_property
    def masked_fused(self) -> Fused:
        """Texts with masked tokens fused with their images."""
        return self.model.fuse(self.masked_text, self.image, reads=self._reads.get("masked", READ_ALL))

    @cached_property
    def mlm_logits(self) -> Tensor:
        """Logits of the objective mlm at masked positions, (K, V) without gradient; mlm sets it if it comes first."""
        return self.heads["mlm"].masked_logits(self).detach()

    @cached_property
    def similarities(self) -> Tensor | None:
        """Contrastive logits of local texts and all images, (B, B * world size); None without the objective itc."""
        return None if self.contrast is None else self.contrast.similarity(self).detach()


class Objective(nn.Module):
    """Base class of pretraining objectives: a head and its loss, listed in `mmbert.model.objectives.OBJECTIVES`.

    The constructor takes the model's configuration and the options of `config.objectives` as keyword arguments.
    """

    reads: Mapping[str, Reads] = {}
    """The texts that it reads, names in `TEXT_KEYS`, with what it reads of their fusion with the images: `Reads()` for
    the output of the encoder only. Nothing else is sure to be computed."""

    requires: tuple[str, ...] = ()
    """Objectives that must be enabled beside it, because it reads their heads."""

    has_soft_targets: bool = False
    """Whether it has `predictions`, and mixes those of `EncodedBatch.soft_targets` with its labels."""

    @classmethod
    def check_options(cls, **options: Any) -> None:
        """Check the values of the constructor's options.

        Raises:
            UsageError: A value that is not allowed.
        """

    def forward(self, encoded: EncodedBatch) -> ObjectiveOutput:
        """Compute the loss of one batch."""
        raise NotImplementedError

    def predictions(self, encoded: EncodedBatch) -> tuple[Tensor, ...]:
        """Predict a batch without its labels, as a momentum model does for the trained one; see `has_soft_targets`."""
        raise NotImplementedError

    def after_step(self) -> None:
        """Constrain parameters after an optimizer step; called by the models' `after_step`."""


def combine_reads(objectives: Iterable[Objective]) -> dict[str, Reads]:
    """Combine what several objectives read, text by text."""
    declared = [entry for objective in objectives for entry in objective.reads.items()]
    return {text: Reads.union(reads for other, reads in declared if other == text) for text in dict(declared)}


def no_autocast(reference: Tensor) -> Any:
    """Return a context without autocast, for losses, similarities and matching logits."""
    return torch.autocast(device_type=reference.device.type, enabled=False)


def full_precision(x: Tensor) -> Tensor:
    """Cast half precision to fp32; fp32 and fp64 are unchanged."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
