"""Negative sampling for ITM: which pairs are positives, and the draw of a negative image for each text."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from mmbert.errors import UsageError, did_you_mean
from mmbert.model.objectives.base import Batch
from mmbert.model.tokens import NO_TEXT
from mmbert.runtime.distributed import all_gather, all_gather_ragged, rank


@dataclass(frozen=True)
class HardNegatives:
    """Fraction of the rows of a batch whose negative is drawn hard, which rises linearly from 0 in a warm-up."""

    hard: float = 1.0
    """Fraction of the rows after the warm-up."""
    warmup: float = 0.0
    """Fraction of the optimizer steps after a first stage in which it rises."""

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> "HardNegatives":
        """Build from a mapping.

        Raises:
            UsageError: An unknown key, or a value that is no fraction.
        """
        place, keys = "objectives.itm.negatives", [field.name for field in fields(cls)]
        for name, value in options.items():
            if name not in keys:
                raise UsageError(f"{place}: no key {name!r}; allowed are {', '.join(keys)}.{did_you_mean(name, keys)}")
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise UsageError(f"{place}.{name}={value!r}: a fraction from 0 to 1.")
        return cls(**options)

    def fraction(self, progress: Tensor | None) -> Tensor | float:
        """Compute the fraction at a point of training; see `EncodedBatch.progress`."""
        if progress is None or not self.warmup:
            return self.hard
        return self.hard * (progress / self.warmup).clamp(max=1)


def same_pair(batch: Batch) -> Tensor:
    """Mark the positive pairs of a batch: same image, or an image that has an equal caption.

    Args:
        batch: With `image_key` (B,), `text_key` (B,) and `image_text_keys` (B, C), all int64 hashes; the last lists
            every caption of the row's image and is padded with `NO_TEXT`.

    Returns:
        (B, B * world size) bool, True where a local text (row) describes an image (column).
    """
    image_key = all_gather(batch["image_key"])
    captions = all_gather_ragged(batch["image_text_keys"], pad=NO_TEXT)  # (B * world size, C)
    same_image = batch["image_key"][:, None] == image_key[None, :]
    equal_text = (batch["text_key"][:, None, None] == captions[None, :, :]).any(dim=-1)
    return same_image | equal_text


def sample_negatives(
    allowed: Tensor,
    *,
    generator: torch.Generator | None = None,
    similarities: Tensor | None = None,
    hard: Tensor | float | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw one negative image for each text.

    Gumbel-max sampling over the global batch: the draw depends on the seed and the batch, not on how rows are sharded
    over processes.

    Args:
        allowed: (B, B * world size) bool, True where the image (column) is a valid negative of the text (row).
        generator: CPU generator with the same state on every process. None: torch's global generator.
        similarities: (B, B * world size) logits; images are drawn in proportion to their softmax (hard negatives of
            ALBEF, arXiv:2107.07651, Sec. 3.2, which also draws texts for an image). None: uniform.
        hard: Fraction of the rows, drawn too, that read `similarities`; the others are uniform. None: all, without such
            a draw.

    Returns:
        (B,) int64 columns, and (B,) bool that is False where a row has no valid negative.
    """
    rows, columns = allowed.shape
    uniform = torch.rand(columns, columns, generator=generator, dtype=torch.float64)
    uniform = uniform[rank() * rows : (rank() + 1) * rows].to(allowed.device)
    gumbel = -torch.log(-torch.log(uniform.clamp(1e-12, 1 - 1e-12)))
    scores = gumbel if similarities is None else gumbel + similarities.double()
    if hard is not None:
        draws = torch.rand(columns, generator=generator, dtype=torch.float64)[rank() * rows : (rank() + 1) * rows]
        scores = torch.where((draws.to(allowed.device) < hard)[:, None], scores, gumbel)
    return scores.masked_fill(~allowed, -torch.inf).argmax(dim=1), allowed.any(dim=1)
