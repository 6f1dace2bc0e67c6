"""Image-text matching."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmbert.errors import UsageError
from mmbert.model.configuration import MMBertConfig
from mmbert.model.objectives.base import EncodedBatch, Objective, ObjectiveOutput, full_precision, no_autocast
from mmbert.model.objectives.negatives import same_pair, sample_negatives
from mmbert.model.tokens import Tokens
from mmbert.runtime.distributed import all_gather, global_mean


class ImageTextMatching(Objective):
    """Image-text matching (ITM): classify matched and mismatched pairs (ViLT, arXiv:2102.03334, Sec. 3.2).

    Each text is paired with its own image and with one negative image of the batch. An image that has an equal caption
    is never a negative; a row without a valid negative is left out of the loss and counted.
    """

    def __init__(self, config: MMBertConfig, *, negatives: str = "random", text: str = "clean"):
        """Build the head.

        Args:
            config: The model's configuration.
            negatives: "random", or "hard": drawn by contrastive similarity, which needs the objective itc.
            text: "clean", or "masked": reads the masked text that MLM has already fused, so that a step fuses twice
                instead of three times.

        Raises:
            UsageError: A value that is not allowed, or hard negatives without the objective itc.
        """
        super().__init__()
        self.check_options(negatives=negatives, text=text)
        if negatives == "hard" and "itc" not in config.objective_options():
            raise UsageError(
                "objectives.itm.negatives='hard' draws negatives by contrastive similarity: add the objective itc."
            )
        self.negatives, self.text = negatives, text
        self.head = nn.Linear(config.hidden_size, 2)

    @classmethod
    def check_options(cls, *, negatives: Any = "random", text: Any = "clean") -> None:
        """Check the values of both options.

        Raises:
            UsageError: A value that is not allowed.
        """
        if negatives not in ("random", "hard"):
            raise UsageError(f"objectives.itm.negatives='{negatives}'; allowed are random, hard.")
        if text not in ("clean", "masked"):
            raise UsageError(f"objectives.itm.text='{text}'; allowed are clean, masked.")

    def logits(self, pooled: Tensor) -> Tensor:
        """Classify (B, D) joint vectors: (B, 2) fp32 logits of mismatched, matched."""
        with no_autocast(pooled):
            return self.head(full_precision(pooled).to(self.head.weight.dtype))

    def score(self, pooled: Tensor) -> Tensor:
        """Score (B, D) joint vectors: (B,) log-odds that a pair is matched."""
        logits = self.logits(pooled)
        return logits[:, 1] - logits[:, 0]

    def forward(self, encoded: EncodedBatch) -> ObjectiveOutput:
        """Compute the loss of matched and mismatched pairs; reads the keys of the batch that `same_pair` reads."""
        similarities = encoded.similarities if self.negatives == "hard" else None
        negatives, valid = sample_negatives(
            ~same_pair(encoded.batch), generator=encoded.generator, similarities=similarities
        )
        masked = self.text == "masked"
        text, matched = (encoded.masked_text, encoded.masked_fused) if masked else (encoded.text, encoded.fused)
        images = Tokens(all_gather(encoded.image.hidden_states), all_gather(encoded.image.mask))
        if encoded.image.intermediate:
            images = images._replace(intermediate=tuple(all_gather(x) for x in encoded.image.intermediate))
        mismatched = encoded.model.fuse(text, images.rows(negatives))  # fused again, not encoded again
        logits = self.logits(torch.cat([matched.pooled, mismatched.pooled]))  # (2B, 2)
        targets = torch.cat([torch.ones_like(negatives), torch.zeros_like(negatives)])
        counts = torch.cat([valid, valid])
        with no_autocast(logits):
            total = (F.cross_entropy(logits, targets, reduction="none") * counts).sum()
        loss = global_mean(total, counts.sum())
        return ObjectiveOutput(loss, logits.detach()[counts], targets[counts], (~valid).sum())
