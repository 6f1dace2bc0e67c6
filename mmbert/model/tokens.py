"""Value types passed between encoders, fusion and heads.

Shape legend, used everywhere: B batch, T text tokens, P image tokens (prefix and patches), L either,
D width of the fusion part, H heads, V vocabulary, K selected rows or positions.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100  # label of a position that is not predicted; what torch's cross entropy skips
NO_NGRAM = -1  # pads lists of n-gram numbers
NO_BOX = -1  # pads the classes of boxes
NOT_LABELLED = -2  # class of the only box of an image whose boxes are not known
NO_TEXT = -1  # pads lists of caption hashes, which are never negative


class Tokens(NamedTuple):
    """Hidden states of one modality with their padding mask.

    An absent modality has length 0 (see `absent`), or rows whose mask is all False.
    """

    hidden_states: Tensor  # (B, L, D)
    mask: Tensor  # (B, L) bool, True = real token, False = padding
    intermediate: tuple[Tensor, ...] = ()  # (B, L, encoder width) each: encoder layers that the fusion reads

    @property
    def first(self) -> Tensor:
        """State that represents the sequence: [CLS], class token or mean of patches, (B, D)."""
        return self.hidden_states[:, 0]

    def prefix(self, length: int) -> "Tokens":
        """Select the first `length` tokens; a single one counts as real where any token is, see `with_fallback`."""
        mask = self.mask.any(dim=1, keepdim=True) if length == 1 <= self.mask.shape[1] else self.mask[:, :length]
        return Tokens(self.hidden_states[:, :length], mask)

    def rows(self, index: Tensor | slice) -> "Tokens":
        """Select rows, for other pairs without encoding again; `index` is (K,) int64, or a slice."""
        if isinstance(index, slice):
            return Tokens(self.hidden_states[index], self.mask[index], tuple(x[index] for x in self.intermediate))
        # Not x[index], whose gradient adds up repeated rows in the order in which threads reach them.
        states, *others = (x.index_select(0, index) for x in (self.hidden_states, *self.intermediate))
        return Tokens(states, self.mask.index_select(0, index), tuple(others))

    @classmethod
    def absent(cls, batch: int, width: int, *, like: Tensor) -> "Tokens":
        """Return tokens of length 0 for `batch` samples, on the device and in the dtype of `like`."""
        mask = torch.zeros(batch, 0, dtype=torch.bool, device=like.device)
        return cls(like.new_zeros(batch, 0, width), mask)

    def with_fallback(self, vector: Tensor) -> "Tokens":
        """Use `vector` (D,) as first token where this modality is absent, so that there is always one to pool.

        Rows with tokens are unchanged; length 0 becomes 1.
        """
        batch = self.mask.shape[0]
        fallback = vector.to(self.hidden_states.dtype).expand(batch, 1, -1)
        if self.mask.shape[1] == 0:
            return Tokens(fallback, self.mask.new_ones(batch, 1))
        is_absent = ~self.mask.any(dim=1, keepdim=True)  # (B, 1)
        first = torch.where(is_absent.unsqueeze(-1), fallback, self.hidden_states[:, :1])
        hidden_states = torch.cat([first, self.hidden_states[:, 1:]], dim=1)
        mask = torch.cat([self.mask[:, :1] | is_absent, self.mask[:, 1:]], dim=1)
        return Tokens(hidden_states, mask, self.intermediate)


class Reads(NamedTuple):
    """Which outputs of a fusion its caller reads; a strategy need not compute the others."""

    text: bool = False
    image: bool = False
    pooled: bool = False

    @classmethod
    def union(cls, several: Iterable["Reads"]) -> "Reads":
        """Combine what several callers read."""
        return cls(*map(any, zip(*several, strict=True)))


READ_ALL = Reads(text=True, image=True, pooled=True)


class NotComputed:
    """Value of an output that the caller of the fusion said it would not read."""

    def __getattr__(self, name: str) -> Any:
        """Raise on any use.

        Raises:
            AttributeError: Always.
        """
        raise AttributeError(f"no '{name}': this output was not computed; name it in `reads` of the fusion's call.")


NOT_COMPUTED: Any = NotComputed()


class Fused(NamedTuple):
    """Output of a fusion strategy, which objectives and tasks read.

    An output that its caller said it would not read is `NOT_COMPUTED`; see `Reads`.
    """

    text: Tokens  # (B, T, D) text positions after fusion, read by MLM
    image: Tokens  # (B, P, D) image positions after fusion
    pooled: Tensor  # (B, D) joint vector, read by ITM and the tasks

    @classmethod
    def only(cls, reads: Reads, text: Tokens, image: Tokens, pool: Callable[[], Tensor]) -> "Fused":
        """Hold the outputs that are read; `pool` computes the joint vector, and is called only if it is."""
        return cls(
            text if reads.text else NOT_COMPUTED,
            image if reads.image else NOT_COMPUTED,
            pool() if reads.pooled else NOT_COMPUTED,
        )
