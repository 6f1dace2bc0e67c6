"""Image-text contrastive learning."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmbert.errors import UsageError
from mmbert.model.configuration import MMBertConfig
from mmbert.model.objectives.base import EncodedBatch, Objective, ObjectiveOutput, full_precision, no_autocast
from mmbert.model.objectives.negatives import same_pair
from mmbert.model.tokens import Tokens
from mmbert.runtime.distributed import all_gather, global_mean, rank

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 0.5


class ImageTextContrast(Objective):
    """Image-text contrastive (ITC) loss between the encoders (CLIP arXiv:2103.00020; ALBEF arXiv:2107.07651).

    Without ALBEF's momentum encoders and queue. Deviation: rows with the same image or an equal caption are
    positives too, with the target spread evenly.
    """

    def __init__(self, config: MMBertConfig, *, embedding_size: int = 256, temperature: float = 0.07):
        """Build the two projections.

        Args:
            config: The model's configuration.
            embedding_size: Width of the common space, in features.
            temperature: Initial value of the learned temperature, from 0.01 to 0.5.

        Raises:
            UsageError: An option out of range, or an encoder without layers.
        """
        super().__init__()
        self.check_options(embedding_size=embedding_size, temperature=temperature)
        if config.text_layers == 0 or config.image_layers == 0:
            raise UsageError(
                "objectives.itc compares the outputs of the two encoders, but here "
                f"text_layers={config.text_layers} and image_layers={config.image_layers}: "
                "an encoder without layers has no contextual output. Give both at least 1 layer or disable itc "
                "(--model.objectives '{mlm: 1, itm: 1}')."
            )
        self.text_projection = nn.Linear(config.hidden_size, embedding_size)
        self.image_projection = nn.Linear(config.hidden_size, embedding_size)
        self.log_scale = nn.Parameter(Tensor([-math.log(temperature)]))

    @classmethod
    def check_options(cls, *, embedding_size: Any = 256, temperature: Any = 0.07) -> None:
        """Check the ranges of both options.

        Raises:
            UsageError: A value out of range.
        """
        if isinstance(embedding_size, bool) or not isinstance(embedding_size, int) or embedding_size < 1:
            raise UsageError(f"objectives.itc.embedding_size={embedding_size!r}: must be a whole number of 1 or more.")
        if not isinstance(temperature, int | float) or not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
            raise UsageError(
                f"objectives.itc.temperature={temperature!r}: must be a number from {MIN_TEMPERATURE} to "
                f"{MAX_TEMPERATURE}."
            )

    @property
    def scale(self) -> Tensor:
        """Inverse temperature, (1,)."""
        return self.log_scale.exp()

    @torch.no_grad()
    def after_step(self) -> None:
        """Clamp the temperature to its range, as CLIP does.

        The parameter is clamped rather than its use in the loss: there its gradient would be zero beyond a bound, and
        it would never return.
        """
        self.log_scale.clamp_(-math.log(MAX_TEMPERATURE), -math.log(MIN_TEMPERATURE))

    def embed_text(self, text: Tokens) -> Tensor:
        """Project (B, T, D) encoded texts to (B, embedding_size) unit vectors, fp32."""
        return self._unit_vectors(self.text_projection, text)

    def embed_image(self, image: Tokens) -> Tensor:
        """Project (B, P, D) encoded images to (B, embedding_size) unit vectors, fp32."""
        return self._unit_vectors(self.image_projection, image)

    @staticmethod
    def _unit_vectors(projection: nn.Linear, tokens: Tokens) -> Tensor:
        with no_autocast(tokens.first):
            return F.normalize(projection(full_precision(tokens.first).to(projection.weight.dtype)), dim=-1)

    def similarity(self, encoded: EncodedBatch) -> Tensor:
        """Return logits of local texts and all images, (B, B * world size)."""
        text, image = self.embed_text(encoded.text), self.embed_image(encoded.image)
        return self._logits(text, all_gather(image))

    def _logits(self, local: Tensor, gathered: Tensor) -> Tensor:
        with no_autocast(local):
            return self.scale * local @ gathered.T

    def forward(self, encoded: EncodedBatch) -> ObjectiveOutput:
        """Compute the symmetric cross-entropy; reads the keys of the batch that `same_pair` reads."""
        text, image = self.embed_text(encoded.text), self.embed_image(encoded.image)
        # Both directions need the positives of local rows among all; the relation is made symmetric.
        local = same_pair(encoded.batch)  # (B, B * world size)
        gathered = all_gather(local.to(torch.uint8)).bool()  # (B * world size, B * world size)
        gathered = gathered | gathered.T
        rows = slice(rank() * len(text), (rank() + 1) * len(text))
        positive = gathered[rows].to(text.dtype)
        share = positive / positive.sum(dim=1, keepdim=True)
        text_logits = self._logits(text, all_gather(image))
        image_logits = self._logits(image, all_gather(text))
        with no_autocast(text):
            total = -(share * (text_logits.log_softmax(dim=1) + image_logits.log_softmax(dim=1))).sum() / 2
        targets = torch.arange(len(text), device=text.device) + rank() * len(text)
        count = torch.tensor(len(text), device=text.device)
        return ObjectiveOutput(global_mean(total, count), text_logits.detach(), targets, torch.zeros_like(count))
