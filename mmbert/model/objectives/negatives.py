"""Which image may serve as a wrong one for a text, and the draw among those."""

import torch
from torch import Tensor

from mmbert.model.objectives.base import Batch
from mmbert.model.tokens import NO_TEXT
from mmbert.runtime.distributed import all_gather, all_gather_ragged, rank


def same_pair(batch: Batch) -> Tensor:
    """True where an own text (row) describes an image (column): same image, or the image carries an equal caption.

    Args:
        batch: With `image_key` (B,), `text_key` (B,) and `image_text_keys` (B, C), all int64 hashes; the last lists
            every caption of the row's image and is padded with `NO_TEXT`.

    Returns:
        (B, B of all processes) bool.
    """
    image_key = all_gather(batch["image_key"])
    carried = all_gather_ragged(batch["image_text_keys"], pad=NO_TEXT)  # (B of all, C)
    same_image = batch["image_key"][:, None] == image_key[None, :]
    equal_text = (batch["text_key"][:, None, None] == carried[None, :, :]).any(dim=-1)
    return same_image | equal_text


def sample_negatives(
    allowed: Tensor, *, generator: torch.Generator | None = None, similarities: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draws one wrong image for each text.

    The draw is a Gumbel-max over the batch of all processes, so it depends on the generator's seed and the batch but
    not on how rows are spread over processes.

    Args:
        allowed: (B, B of all processes) bool, True where the image (column) is a valid negative of the text (row).
        generator: CPU generator, the same on every process; None draws from torch's global state.
        similarities: (B, B of all processes) logits; given, likelier images are drawn more often (hard negatives as
            in ALBEF, arXiv:2107.07651, Sec. 3.2, which draws texts for an image too).

    Returns:
        (B,) int64 columns, and (B,) bool that is False where a row has no valid negative.
    """
    rows, columns = allowed.shape
    uniform = torch.rand(columns, columns, generator=generator, dtype=torch.float64)
    uniform = uniform[rank() * rows : (rank() + 1) * rows].to(allowed.device)
    gumbel = -torch.log(-torch.log(uniform.clamp(1e-12, 1 - 1e-12)))
    scores = gumbel if similarities is None else gumbel + similarities.double()
    return scores.masked_fill(~allowed, -torch.inf).argmax(dim=1), allowed.any(dim=1)
