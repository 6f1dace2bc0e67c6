"""Replaced-token detection: tell the original tokens of a caption from sampled ones."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmbert.model.configuration import MMBertConfig
from mmbert.model.objectives.base import EncodedBatch, Objective, ObjectiveOutput, full_precision, no_autocast
from mmbert.model.tokens import IGNORE_INDEX, Reads
from mmbert.runtime.distributed import all_reduce_max, global_mean, rank, world_size

TEXT = Reads(text=True)
ROWS = 128
"""Masked tokens that are sampled at a time; a larger vocabulary takes memory in fp64."""


class ReplacedTokenDetection(Objective):
    """Replaced-token detection (RTD; ELECTRA, arXiv:2003.10555, Sec. 2): tell original from sampled tokens.

    Masked tokens are replaced by samples of the MLM head, and the text is encoded and fused with its image again. At
    each token a binary head predicts whether it is the original; a sample equal to the original counts as original.
    Deviation: the generator is the model itself, not a smaller one. As there, no gradient flows through the samples.
    Text positions of late fusion do not see the image, so the objective trains its text encoder only.
    """

    reads: Mapping[str, Reads] = {"masked": TEXT}
    requires = ("mlm",)

    def __init__(self, config: MMBertConfig):
        super().__init__()
        self.head = nn.Linear(config.hidden_size, 1)

    def forward(self, encoded: EncodedBatch) -> ObjectiveOutput:
        """Compute the binary cross-entropy; reads `input_ids`, `attention_mask` and `mlm_labels` (B, T).

        It is the mean over all tokens but [CLS], [SEP] and padding. Class 1 of the output is "original".
        """
        input_ids, mask = encoded.batch["input_ids"], encoded.batch["attention_mask"].bool()
        masked = encoded.batch["mlm_labels"] != IGNORE_INDEX
        replaced = input_ids.clone()
        replaced[masked] = sample_tokens(encoded.mlm_logits, draw_uniform(masked, encoded.generator)[masked])
        text = encoded.model.encode_text(replaced, mask.long(), encoded.batch.get("token_type_ids"))
        states = encoded.model.fuse(text, encoded.image, reads=TEXT).text.hidden_states
        ordinary = between_real(mask)
        logits = full_precision(self.head(states[ordinary])).squeeze(-1)  # (K,)
        is_original = (replaced == input_ids)[ordinary]
        with no_autocast(logits):
            total = F.binary_cross_entropy_with_logits(logits, is_original.to(logits.dtype), reduction="sum")
        found = logits.detach()
        return ObjectiveOutput(
            global_mean(total, ordinary.sum()),
            torch.stack([torch.zeros_like(found), found], dim=1),
            is_original.long(),
            (~ordinary.any(dim=1)).sum(),
        )


def between_real(mask: Tensor) -> Tensor:
    """Mark the tokens between the first and the last real one, [CLS] and [SEP], of a (B, T) bool mask."""
    real = F.pad(mask, (1, 1))
    return real[:, :-2] & mask & real[:, 2:]


def draw_uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw a number from [0, 1) for each position of a (B, T) tensor: (B, T) fp64.

    As `sample_negatives` does it, the draw is for the rows of all processes and their longest text, so it does not
    depend on how rows are sharded.
    """
    rows, length = like.shape
    (longest,) = all_reduce_max(length)
    uniform = torch.rand(world_size() * rows, longest, generator=generator, dtype=torch.float64)
    return uniform[rank() * rows : (rank() + 1) * rows, :length].to(like.device)


def sample_tokens(logits: Tensor, uniform: Tensor) -> Tensor:
    """Sample tokens by inverting the cumulative distribution.

    Args:
        logits: (K, V).
        uniform: (K,) numbers from [0, 1).

    Returns:
        (K,) int64 token ids.
    """
    found = [torch.zeros(0, dtype=torch.int64, device=logits.device)]
    for rows, u in zip(logits.split(ROWS), uniform.split(ROWS), strict=True):
        cumulative = rows.softmax(dim=-1).double().cumsum(dim=-1)
        index = torch.searchsorted(cumulative, u[:, None] * cumulative[:, -1:], right=True)
        found.append(index.squeeze(-1).clamp(max=logits.shape[1] - 1))
    return torch.cat(found)
