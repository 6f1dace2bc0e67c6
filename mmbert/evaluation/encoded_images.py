"""Images of a split, each encoded once for all of its pairs and questions, as right and as wrong image."""

import torch
from torch import Tensor

from mmbert.data.samples import image_digests
from mmbert.model.modeling import MMBertModel
from mmbert.model.tokens import Tokens

MAX_BYTES = 2 << 30
"""Memory that the encoded images of a split take at most; beyond it the oldest are encoded again when needed."""


class EncodedImages:
    """Encoded images by the digest of their pixels.

    Args:
        model: In evaluation mode, with the same weights in every call.
        max_bytes: Memory to take; 0 keeps nothing.
    """

    def __init__(self, model: MMBertModel, *, max_bytes: int = MAX_BYTES):
        self.model, self.max_bytes = model, max_bytes
        self.num_encoded = 0
        """Images that were encoded so far."""
        self._found: dict[int, tuple[Tokens, int]] = {}  # digest -> encoded batch, row; the oldest first
        self._bytes = 0

    def encode(self, batch: dict[str, Tensor], *, prefix: str = "") -> Tokens:
        """Encode the images of a batch that were not encoded before; see `MMBertModel.encode_batch_images`.

        Args:
            batch: Without `image_digest` it is computed here.
            prefix: Of the keys, "wrong_" for the wrong images.

        Returns:
            (B, P, D) tokens of all images of the batch.
        """
        digests: list[int] = digests_of(batch, prefix).tolist()
        new = {digest: row for row, digest in enumerate(digests) if digest not in self._found}
        if new:
            key = image_key(batch, prefix)
            rows = torch.tensor([*new.values()], device=batch[key].device)
            tokens = self.model.encode_batch_images({key: batch[key][rows]}, prefix=prefix)
            self._found |= {digest: (tokens, row) for row, digest in enumerate(new)}
            self._bytes += len(new) * _row_bytes(tokens)
            self.num_encoded += len(new)
        found = [self._found[digest] for digest in digests]
        hidden_states = torch.stack([tokens.hidden_states[row] for tokens, row in found])
        layers = range(len(found[0][0].intermediate))
        intermediate = tuple(torch.stack([tokens.intermediate[i][row] for tokens, row in found]) for i in layers)
        while self._bytes > self.max_bytes:
            tokens, _ = self._found.pop(next(iter(self._found)))
            self._bytes -= _row_bytes(tokens)
        return Tokens(hidden_states, hidden_states.new_ones(hidden_states.shape[:2], dtype=torch.bool), intermediate)


def digests_of(batch: dict[str, Tensor], prefix: str = "") -> Tensor:
    """Return the digests of a batch's images, (B,) int64: those that `Collate` computed, or computed here."""
    found = batch.get(f"{prefix}image_digest")
    return image_digests(batch[image_key(batch, prefix)]) if found is None else found


def image_key(batch: dict[str, Tensor], prefix: str = "") -> str:
    """Return the key of the images in a batch."""
    key = f"{prefix}pixel_values"
    return key if key in batch else f"{prefix}image_hidden_states"


def _row_bytes(tokens: Tokens) -> int:
    return sum(x[0].numel() * x.element_size() for x in (tokens.hidden_states, *tokens.intermediate))
