"""Image-text matching."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmbert.errors import UsageError
from mmbert.model.configuration import MMBertConfig
from mmbert.model.fusion import joint_size
from mmbert.model.objectives.base import EncodedBatch, Objective, ObjectiveOutput, full_precision, no_autocast
from mmbert.model.objectives.negatives import HardNegatives, same_pair, sample_negatives
from mmbert.model.tokens import Reads, Tokens
from mmbert.runtime.distributed import all_gather, all_reduce_max, global_mean, rank, world_size

POOLED = Reads(pooled=True)


class ImageTextMatching(Objective):
    """Image-text matching (ITM): classify matched and mismatched pairs (ViLT, arXiv:2102.03334, Sec. 3.2).

    Each text is paired with its own image and with one negative image of the batch, each image also with one negative
    text if `negative_texts` is set (ALBEF, arXiv:2107.07651, Sec. 3.2). An image that has an equal caption is never a
    negative; a row without a valid negative is left out of the loss and counted.
    """

    def __init__(
        self,
        config: MMBertConfig,
        *,
        negatives: str | Mapping[str, float] = "random",
        text: str = "clean",
        negative_texts: bool = False,
        residual: bool = False,
        edited: float = 0.0,
        calibrate: bool = False,
    ):
        """Build the head.

        Args:
            config: The model's configuration.
            negatives: "random"; or "hard": drawn by contrastive similarity, which needs the objective itc; or a mapping
                such as `{"hard": 0.5, "warmup": 0.2}` for a fraction of the rows, see `HardNegatives`.
            text: "clean", or "masked": reads the masked text that MLM has already fused, so that a step fuses twice
                instead of three times.
            negative_texts: Pair each image with a negative text too; matched and mismatched pairs weigh the same.
            residual: Add a learned multiple of the contrastive logit to that of a match, so that the fusion corrects
                the contrastive ranking; needs the objective itc.
            edited: Fraction of the texts whose mismatched pair is an edited caption with their own image, instead of
                the text with another image (cf. NegCLIP, arXiv:2210.01936); see `mmbert.data.edits`.
            calibrate: Fit scales and bias of the logit to validation pairs before each validation, for evaluation only
                (Platt scaling): after hard negatives, say, the trained bias is not that of random pairs.

        Raises:
            UsageError: A value that is not allowed, or hard negatives or a residual without the objective itc.
        """
        super().__init__()
        self.check_options(
            negatives=negatives, text=text, negative_texts=negative_texts, residual=residual, edited=edited,
            calibrate=calibrate,
        )  # fmt: skip
        if "itc" not in config.objective_options():
            if negatives != "random":
                raise UsageError(
                    f"objectives.itm.negatives={negatives!r} draws negatives by contrastive similarity: add the "
                    "objective itc."
                )
            if residual:
                raise UsageError("objectives.itm.residual reads the contrastive similarity: add the objective itc.")
        self.is_hard, self.text, self.negative_texts, self.edited = negatives != "random", text, negative_texts, edited
        self.hard_rows = HardNegatives.parse(negatives) if isinstance(negatives, Mapping) else None
        self.reads = {text: POOLED, **({"edited": Reads()} if edited else {})}
        self.head = nn.Linear(joint_size(config), 2)
        self.residual_factor = nn.Parameter(torch.ones(1)) if residual else None
        self.calibration: Tensor | None
        self.register_buffer("calibration", torch.tensor([1.0, 1.0, 0.0]) if calibrate else None)
        """Factors of the fusion's and of the contrastive logit, and a bias, which evaluation reads."""

    @classmethod
    def check_options(
        cls,
        *,
        negatives: Any = "random",
        text: Any = "clean",
        negative_texts: Any = False,
        residual: Any = False,
        edited: Any = 0.0,
        calibrate: Any = False,
    ) -> None:
        """Check the values of the options.

        Raises:
            UsageError: A value that is not allowed.
        """
        if isinstance(negatives, Mapping):
            HardNegatives.parse(negatives)
        elif negatives not in ("random", "hard"):
            raise UsageError(
                f"objectives.itm.negatives='{negatives}'; allowed are random, hard and a mapping such as "
                "{hard: 0.5, warmup: 0.2}."
            )
        if text not in ("clean", "masked"):
            raise UsageError(f"objectives.itm.text='{text}'; allowed are clean, masked.")
        for name, value in (("negative_texts", negative_texts), ("residual", residual), ("calibrate", calibrate)):
            if not isinstance(value, bool):
                raise UsageError(f"objectives.itm.{name}={value!r}; allowed are true, false.")
        if isinstance(edited, bool) or not isinstance(edited, int | float) or not 0 <= edited <= 1:
            raise UsageError(f"objectives.itm.edited={edited!r}: a fraction from 0 to 1.")
        if edited and (text == "masked" or residual):
            other = "text='masked'" if text == "masked" else "residual=True"
            raise UsageError(f"objectives.itm.edited={edited} does not go with {other}: leave one of them out.")

    def logits(self, pooled: Tensor, similarity: Tensor | None = None) -> Tensor:
        """Classify joint vectors.

        Args:
            pooled: (B, D).
            similarity: (B,) contrastive logits of the pairs; read with `residual` only.

        Returns:
            (B, 2) fp32 logits of mismatched, matched.
        """
        with no_autocast(pooled):
            logits = self.head(full_precision(pooled).to(self.head.weight.dtype))
            if self.residual_factor is None and self.calibration is None:
                return logits
            match = logits.new_zeros(len(logits))
            if self.residual_factor is not None:
                assert similarity is not None
                match = self.residual_factor * similarity.to(logits.dtype)
            if self.calibration is not None and not self.training:
                of_fusion, of_contrast, bias = self.calibration.to(logits.dtype)
                logits, match = of_fusion * logits, of_contrast * match + bias
            return logits + torch.stack([torch.zeros_like(match), match], dim=1)

    def score(self, pooled: Tensor, similarity: Tensor | None = None) -> Tensor:
        """Score joint vectors: (B,) log-odds that a pair is matched; see `logits`."""
        logits = self.logits(pooled, similarity)
        return logits[:, 1] - logits[:, 0]

    def forward(self, encoded: EncodedBatch) -> ObjectiveOutput:
        """Compute the loss of matched and mismatched pairs; reads the keys of the batch that `same_pair` reads."""
        is_pair = same_pair(encoded.batch)  # (B, B * world size), texts x images
        reads_similarity = self.residual_factor is not None
        similarities = encoded.similarities if self.is_hard or reads_similarity else None
        hard = None if self.hard_rows is None else self.hard_rows.fraction(encoded.progress)
        wrong_image, valid = sample_negatives(
            ~is_pair, generator=encoded.generator, similarities=similarities if self.is_hard else None, hard=hard
        )
        masked = self.text == "masked"
        text, matched = (encoded.masked_text, encoded.masked_fused) if masked else (encoded.text, encoded.fused)
        own = torch.arange(len(valid), device=valid.device)
        first = rank() * len(valid)
        other_text = text
        if self.edited:
            is_edited = encoded.batch["is_edited"]
            other_text, wrong_image = encoded.edited_text, torch.where(is_edited, own + first, wrong_image)
            valid = valid | is_edited
        # Fused again, not encoded again.
        mismatched = encoded.model.fuse(other_text, gather_tokens(encoded.image).rows(wrong_image), reads=POOLED)
        pooled = [matched.pooled, mismatched.pooled]
        match, used = [torch.ones_like(own), torch.zeros_like(own)], [valid, valid]
        logit = [] if similarities is None else [similarities[own, own + first], similarities[own, wrong_image]]
        if self.negative_texts:
            of_images = gather_columns(is_pair)  # (B, B * world size), images x texts
            by_image = None if similarities is None else gather_columns(similarities)
            wrong_text, has_text = sample_negatives(
                ~of_images, generator=encoded.generator, similarities=by_image if self.is_hard else None, hard=hard
            )
            other_texts = gather_tokens(text).rows(wrong_text)
            pooled.append(encoded.model.fuse(other_texts, encoded.image, reads=POOLED).pooled)
            match, used = [*match, torch.zeros_like(own)], [*used, has_text]
            logit += [] if by_image is None else [by_image[own, wrong_text]]
        logits = self.logits(torch.cat(pooled), torch.cat(logit) if reads_similarity else None)  # (2B or 3B, 2)
        targets, counts = torch.cat(match), torch.cat(used)
        weights = counts.to(logits.dtype)
        if self.negative_texts:
            weights = torch.where(targets == 1, weights, weights / 2)
        with no_autocast(logits):
            total = (F.cross_entropy(logits, targets, reduction="none") * weights).sum()
        loss = global_mean(total, weights.sum())
        return ObjectiveOutput(loss, logits.detach()[counts], targets[counts], (~valid).sum())


def gather_tokens(tokens: Tokens) -> Tokens:
    """All-gather tokens over the processes, padded to the longest: (B * world size, L, D)."""
    if world_size() == 1:
        return tokens
    (longest,) = all_reduce_max(tokens.mask.shape[1])
    extra = longest - tokens.mask.shape[1]

    def gather(states: Tensor) -> Tensor:
        return all_gather(F.pad(states, (0, 0, 0, extra)))

    mask = all_gather(F.pad(tokens.mask, (0, extra)).to(torch.uint8)).bool()
    return Tokens(gather(tokens.hidden_states), mask, tuple(gather(x) for x in tokens.intermediate))


def gather_columns(matrix: Tensor) -> Tensor:
    """Return this process's columns of a (B, B * world size) matrix from all processes, as rows of the same shape."""
    rows = all_gather(matrix.to(torch.uint8) if matrix.dtype is torch.bool else matrix)
    return rows[:, rank() * len(matrix) : (rank() + 1) * len(matrix)].T.to(matrix.dtype)
