"""The value types that flow between encoders, fusion and heads.

Shape legend, used everywhere: B batch, T text tokens, P image tokens (prefix and patches), L either of them,
D width of the fusion part, H heads, V vocabulary, K selected rows or positions.
"""

from typing import NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100  # label of a position that is not predicted; what torch's cross entropy skips
NO_TEXT = -1  # pads lists of caption hashes, which are never negative


class Tokens(NamedTuple):
    """Token states of one modality with the mask that says which are real: the two never travel apart.

    An absent modality is a `Tokens` of length 0 (see `absent`), or rows whose mask is all False.
    """

    hidden_states: Tensor  # (B, L, D)
    mask: Tensor  # (B, L) bool, True = real token, False = padding
    intermediate: tuple[Tensor, ...] = ()  # (B, L, encoder width) each: unimodal layers a strategy asked for

    @property
    def first(self) -> Tensor:
        """The state that stands for the whole sequence: [CLS], class token or mean of patches, (B, D)."""
        return self.hidden_states[:, 0]

    def rows(self, index: Tensor) -> "Tokens":
        """Re-pairs samples without encoding them again; `index` is (K,) int64."""
        return Tokens(self.hidden_states[index], self.mask[index], tuple(x[index] for x in self.intermediate))

    @classmethod
    def absent(cls, batch: int, width: int, *, like: Tensor) -> "Tokens":
        """No tokens at all for `batch` samples, on the device and in the dtype of `like`."""
        mask = torch.zeros(batch, 0, dtype=torch.bool, device=like.device)
        return cls(like.new_zeros(batch, 0, width), mask)

    def with_fallback(self, vector: Tensor) -> "Tokens":
        """Puts `vector` (D,) first where this modality is absent, so that pooling always finds a state.

        Rows with tokens stay as they are; where the length is 0 it becomes 1.
        """
        batch = self.mask.shape[0]
        stand_in = vector.to(self.hidden_states.dtype).expand(batch, 1, -1)
        if self.mask.shape[1] == 0:
            return Tokens(stand_in, self.mask.new_ones(batch, 1))
        is_absent = ~self.mask.any(dim=1, keepdim=True)  # (B, 1)
        first = torch.where(is_absent.unsqueeze(-1), stand_in, self.hidden_states[:, :1])
        hidden_states = torch.cat([first, self.hidden_states[:, 1:]], dim=1)
        mask = torch.cat([self.mask[:, :1] | is_absent, self.mask[:, 1:]], dim=1)
        return Tokens(hidden_states, mask, self.intermediate)


class Fused(NamedTuple):
    """What every fusion strategy returns; objectives and tasks are heads on it."""

    text: Tokens  # (B, T, D) text positions after fusion: MLM reads these
    image: Tokens  # (B, P, D) image positions after fusion
    pooled: Tensor  # (B, D) joint vector: ITM and every task head read this
