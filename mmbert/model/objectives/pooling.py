"""Features of texts and images that ITC projects, pooled from the tokens of the encoders."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmbert.model.objectives.base import full_precision, no_autocast
from mmbert.model.tokens import Tokens

MODALITIES = ("text", "image")
POOLS = ("first", "mean", "first_and_mean")


class Pooling(NamedTuple):
    """How the tokens of texts and of images are pooled to the features that ITC projects."""

    text: str  # one of `POOLS`
    image: str  # one of `POOLS`
    to_unit_length: bool = False

    @classmethod
    def from_options(cls, pool: str | Mapping[str, str], normalize: bool) -> "Pooling":
        """Read the options `pool` and `normalize` of the objective itc."""
        pools = (pool, pool) if isinstance(pool, str) else (pool["text"], pool["image"])
        return cls(*pools, to_unit_length=normalize)

    def width(self, modality: str, hidden_size: int) -> int:
        """Return the number of features of a modality."""
        return hidden_size * (2 if getattr(self, modality) == "first_and_mean" else 1)

    def features(self, modality: str, tokens: Tokens) -> Tensor:
        """Pool (B, L, D) encoded texts or images to (B, D) or, with first_and_mean, (B, 2D) features, fp32."""
        with no_autocast(tokens.hidden_states):
            features = pool_tokens(tokens, getattr(self, modality))
            return F.normalize(features, dim=-1) if self.to_unit_length else features


def pool_tokens(tokens: Tokens, pool: str) -> Tensor:
    """Pool (B, L, D) encoded texts or images to (B, D) or, with first_and_mean, (B, 2D) features, fp32."""
    with no_autocast(tokens.hidden_states):
        first = full_precision(tokens.first)
        if pool == "first":
            return first
        weights = tokens.mask.unsqueeze(-1).to(first.dtype)  # (B, L, 1)
        mean = (full_precision(tokens.hidden_states) * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
        return mean if pool == "mean" else torch.cat([first, mean], dim=-1)
