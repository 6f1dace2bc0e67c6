"""Image warm-up by caption n-grams: the image encoder alone predicts what the captions of its image mention."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmbert.errors import UsageError
from mmbert.model.configuration import MMBertConfig
from mmbert.model.layers import surely_all
from mmbert.model.objectives.base import EncodedBatch, Objective, ObjectiveOutput, full_precision, no_autocast
from mmbert.model.tokens import Tokens
from mmbert.runtime.distributed import global_mean


class CaptionNGrams(Objective):
    """Multi-label classification of caption n-grams by the best image token (multiple-instance learning).

    The logit of an n-gram ("red circle") is the largest over all image tokens, so each token learns what is at its
    place without any box (max pooling of instances as in Oquab et al., CVPR 2015, Sec. 3; caption words as labels as in
    Fang et al., arXiv:1411.4952, Sec. 3). It reads neither text nor fusion. `mmbert.fit` finds the n-grams in the
    training captions.
    """

    def __init__(self, config: MMBertConfig, *, longest: int = 3, min_fraction: float = 0.01):
        """Build the head for `config.ngrams`.

        Args:
            config: The model's configuration.
            longest: Words of the longest n-gram.
            min_fraction: Fraction of the training images that an n-gram must describe.

        Raises:
            UsageError: An option out of range.
        """
        super().__init__()
        self.check_options(longest=longest, min_fraction=min_fraction)
        self.longest, self.min_fraction = longest, min_fraction
        self.width = config.hidden_size
        self.head = nn.Linear(self.width, len(config.ngrams)) if config.ngrams else nn.Identity()

    @classmethod
    def check_options(cls, *, longest: Any = 3, min_fraction: Any = 0.01) -> None:
        """Check the ranges of both options.

        Raises:
            UsageError: A value out of range.
        """
        if isinstance(longest, bool) or not isinstance(longest, int) or longest < 1:
            raise UsageError(f"objectives.ngrams.longest={longest!r}: must be a whole number of 1 or more.")
        if isinstance(min_fraction, bool) or not isinstance(min_fraction, int | float) or not 0 < min_fraction < 1:
            raise UsageError(f"objectives.ngrams.min_fraction={min_fraction!r}: a fraction above 0, below 1.")

    @torch.no_grad()
    def start(self, frequencies: Sequence[float], *, std: float) -> None:
        """Build the head for the n-grams of the training data.

        Args:
            frequencies: Fraction of the training images that have each n-gram. The biases start at their log-odds, less
                1 because the largest of many logits is taken.
            std: Standard deviation of the weights.
        """
        self.head = nn.Linear(self.width, len(frequencies))
        nn.init.normal_(self.head.weight, std=std)
        prior = [min(max(f, 1e-4), 0.99) for f in frequencies]
        self.head.bias.copy_(torch.tensor([math.log(p / (1 - p)) - 1 for p in prior]))

    def logits(self, image: Tokens) -> Tensor:
        """Compute the logits of all n-grams from (B, P, D) encoded images: (B, number of n-grams) fp32."""
        logits = full_precision(self.head(image.hidden_states))
        if not surely_all(image.mask):  # regions that are padding
            logits = logits.masked_fill(~image.mask.unsqueeze(-1), torch.finfo(logits.dtype).min)
        return logits.amax(dim=1)

    def forward(self, encoded: EncodedBatch) -> ObjectiveOutput:
        """Compute the loss; reads `ngram_ids` (B, G), the n-grams of each image, padded with `NO_NGRAM`.

        The loss is the sum of the binary cross-entropies over the number of n-grams that are present, so its scale does
        not depend on how many there are. The accuracy is the recall of those present.
        """
        if isinstance(self.head, nn.Identity):
            raise UsageError("objectives.ngrams: the model has no n-grams; mmbert.fit finds them in the training data.")
        logits = self.logits(encoded.image)
        ids = encoded.batch["ngram_ids"]
        targets = logits.new_zeros(len(ids), logits.shape[1] + 1)
        targets = targets.scatter(1, ids % targets.shape[1], 1.0)[:, :-1]  # NO_NGRAM goes into the last column
        with no_autocast(logits):
            total = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
        loss = global_mean(total, targets.sum().long())
        present = logits.detach()[targets.bool()]
        left_out = (targets.sum(dim=1) == 0).sum()
        return ObjectiveOutput(
            loss, torch.stack([torch.zeros_like(present), present], dim=1), torch.ones_like(present).long(), left_out
        )
