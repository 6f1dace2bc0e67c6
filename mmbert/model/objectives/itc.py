"""Image-text contrastive learning."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmbert.errors import UsageError
from mmbert.model.configuration import MMBertConfig
from mmbert.model.objectives.base import EncodedBatch, Objective, ObjectiveOutput, full_precision, no_autocast
from mmbert.model.objectives.negatives import same_pair
from mmbert.model.tokens import Tokens
from mmbert.runtime.distributed import all_gather, global_mean, rank


class ImageTextContrast(Objective):
    """Pulls the towers' vectors of a pair together (CLIP arXiv:2103.00020; ALBEF arXiv:2107.07651).

    Without ALBEF's momentum encoders and queue. Deviation: rows with the same image or an equal caption are
    positives too, with the target spread evenly.
    """

    def __init__(self, config: MMBertConfig, *, embedding_size: int = 256, temperature: float = 0.07):
        """Builds the two projections.

        Args:
            config: The model's configuration.
            embedding_size: Width of the common space, in features.
            temperature: Start value of the learned temperature, kept within 0.01 and 0.5.
        """
        super().__init__()
        if not isinstance(temperature, int | float) or not 0.01 <= temperature <= 0.5:
            raise UsageError(f"objectives.itc.temperature={temperature!r}: a number from 0.01 to 0.5.")
        if config.text_layers == 0 or config.image_layers == 0:
            raise UsageError(
                "objectives.itc compares what each encoder says alone, but here "
                f"text_layers={config.text_layers} and image_layers={config.image_layers}: "
                "an encoder without layers says nothing alone. Give both at least 1 layer or leave itc out "
                "(--model.objectives '{mlm: 1, itm: 1}')."
            )
        self.text_projection = nn.Linear(config.hidden_size, embedding_size)
        self.image_projection = nn.Linear(config.hidden_size, embedding_size)
        self.log_scale = nn.Parameter(Tensor([-math.log(temperature)]))

    @property
    def scale(self) -> Tensor:
        """(1,) inverse temperature."""
        return self.log_scale.clamp(math.log(2.0), math.log(100.0)).exp()

    def embed_text(self, text: Tokens) -> Tensor:
        """(B, T, D) tokens of the text encoder to (B, embedding_size) unit vectors, fp32."""
        return self._unit(self.text_projection, text)

    def embed_image(self, image: Tokens) -> Tensor:
        """(B, P, D) tokens of the image encoder to (B, embedding_size) unit vectors, fp32."""
        return self._unit(self.image_projection, image)

    @staticmethod
    def _unit(projection: nn.Linear, tokens: Tokens) -> Tensor:
        with no_autocast(tokens.first):
            return F.normalize(projection(full_precision(tokens.first).to(projection.weight.dtype)), dim=-1)

    def similarity(self, encoded: EncodedBatch) -> Tensor:
        """(B, B of all processes) logits of own texts with all images."""
        text, image = self.embed_text(encoded.text), self.embed_image(encoded.image)
        return self._logits(text, all_gather(image))

    def _logits(self, own: Tensor, others: Tensor) -> Tensor:
        with no_autocast(own):
            return self.scale * own @ others.T

    def forward(self, encoded: EncodedBatch) -> ObjectiveOutput:
        """Reads the keys that `same_pair` names."""
        text, image = self.embed_text(encoded.text), self.embed_image(encoded.image)
        # Both directions need positives of own rows against all others; the relation is made symmetric.
        own = same_pair(encoded.batch)  # (B, B of all)
        everything = all_gather(own.to(torch.uint8)).bool()  # (B of all, B of all)
        everything = everything | everything.T
        rows = slice(rank() * len(text), (rank() + 1) * len(text))
        positive = everything[rows].to(text.dtype)
        share = positive / positive.sum(dim=1, keepdim=True)
        text_logits = self._logits(text, all_gather(image))
        image_logits = self._logits(image, all_gather(text))
        with no_autocast(text):
            total = -(share * (text_logits.log_softmax(dim=1) + image_logits.log_softmax(dim=1))).sum() / 2
        targets = torch.arange(len(text), device=text.device) + rank() * len(text)
        count = torch.tensor(len(text), device=text.device)
        return ObjectiveOutput(global_mean(total, count), text_logits.detach(), targets, torch.zeros_like(count))
