"""Image-text matching."""

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
    """Tells whether text and image belong together (ViLT, arXiv:2102.03334, Sec. 3.2).

    Each text meets its own image and one wrong image of the batch. An image that carries an equal caption is
    never wrong; a row without a valid wrong image is left out and counted.
    """

    def __init__(self, config: MMBertConfig, *, negatives: str = "random", text: str = "clean"):
        """Builds the head.

        Args:
            config: The model's configuration.
            negatives: "random", or "hard": drawn by contrastive similarity, which needs the objective itc.
            text: "clean", or "masked": reads the masked text that MLM has fused already, so that a step fuses twice
                instead of three times.
        """
        super().__init__()
        if negatives not in ("random", "hard"):
            raise UsageError(f"objectives.itm.negatives='{negatives}'; allowed are random, hard.")
        if text not in ("clean", "masked"):
            raise UsageError(f"objectives.itm.text='{text}'; allowed are clean, masked.")
        if negatives == "hard" and "itc" not in config.objective_options():
            raise UsageError("objectives.itm.negatives='hard' draws by contrastive similarity: add the objective itc.")
        self.negatives, self.text = negatives, text
        self.head = nn.Linear(config.hidden_size, 2)

    def logits(self, pooled: Tensor) -> Tensor:
        """(B, D) joint vectors to (B, 2) fp32 logits: wrong, right."""
        with no_autocast(pooled):
            return self.head(full_precision(pooled).to(self.head.weight.dtype))

    def score(self, pooled: Tensor) -> Tensor:
        """(B, D) joint vectors to (B,) log-odds that the pair belongs together."""
        logits = self.logits(pooled)
        return logits[:, 1] - logits[:, 0]

    def forward(self, encoded: EncodedBatch) -> ObjectiveOutput:
        """Reads the keys that `same_pair` names."""
        similarities = encoded.similarities if self.negatives == "hard" else None
        wrong, valid = sample_negatives(
            ~same_pair(encoded.batch), generator=encoded.generator, similarities=similarities
        )
        masked = self.text == "masked"
        text, right = (encoded.masked_text, encoded.masked_fused) if masked else (encoded.text, encoded.fused)
        images = Tokens(all_gather(encoded.image.hidden_states), all_gather(encoded.image.mask))
        if encoded.image.intermediate:
            images = images._replace(intermediate=tuple(all_gather(x) for x in encoded.image.intermediate))
        mismatched = encoded.model.fuse(text, images.rows(wrong))  # fused again, never encoded again
        logits = self.logits(torch.cat([right.pooled, mismatched.pooled]))  # (2B, 2)
        targets = torch.cat([torch.ones_like(wrong), torch.zeros_like(wrong)])
        counts = torch.cat([valid, valid])
        with no_autocast(logits):
            total = (F.cross_entropy(logits, targets, reduction="none") * counts).sum()
        loss = global_mean(total, counts.sum())
        return ObjectiveOutput(loss, logits.detach()[counts], targets[counts], (~valid).sum())
