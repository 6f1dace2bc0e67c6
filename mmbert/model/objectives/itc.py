"""Image-text contrastive learning."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmbert.errors import UsageError
from mmbert.model.configuration import MMBertConfig
from mmbert.model.objectives.base import EncodedBatch, Objective, ObjectiveOutput, full_precision, no_autocast
from mmbert.model.objectives.closed_form import LinearMaps
from mmbert.model.objectives.late_interaction import (
    gather_vectors,
    late_interaction,
    pair_similarities,
    similarities,
)
from mmbert.model.objectives.negatives import same_pair
from mmbert.model.objectives.pooling import MODALITIES, POOLS, Pooling
from mmbert.model.tokens import Reads, Tokens
from mmbert.runtime.distributed import all_gather, global_mean, rank

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 0.5

INTERACTIONS = ("pooled", "tokens")
POOLERS = {"none": (), "text": ("text",), "image": ("image",), "both": ("text", "image")}
"""Value of the option `pooler` -> modalities with a pooler."""


class ImageTextContrast(Objective):
    """Image-text contrastive (ITC) loss between the encoders (CLIP arXiv:2103.00020; ALBEF arXiv:2107.07651).

    Without ALBEF's queue: all vectors are of the global batch. Deviation: rows with the same image or an equal caption
    are positives too, with the target spread evenly.

    With `interaction: tokens` there is a vector for each token instead, (B, L, E) with zeros at padding, and the logit
    of a query is the mean over its tokens of the largest product with a token of the other modality (FILIP,
    arXiv:2111.07783, Sec. 3). Where a pair has one score, it is the mean of both directions.
    """

    reads: Mapping[str, Reads] = {"clean": Reads()}
    has_soft_targets = True

    def __init__(
        self,
        config: MMBertConfig,
        *,
        embedding_size: int = 256,
        temperature: float = 0.07,
        pool: str | Mapping[str, str] = "first",
        normalize: bool = False,
        pooler: str = "none",
        init: str = "random",
        init_samples: int | None = None,
        ridge: float = 0.3,
        refit: bool = False,
        interaction: str = "pooled",
    ):
        """Build the two projections.

        Args:
            config: The model's configuration.
            embedding_size: Width of the common space, in features.
            temperature: Initial value of the learned temperature, from 0.01 to 0.5.
            pool: Features of a text or an image: "first", the first state ([CLS], class token); "mean", the mean of
                the states; or "first_and_mean", both side by side. `{text: ..., image: ...}`: one for each.
            normalize: Scale these features to unit length, so that in the closed form each text and image counts alike.
            pooler: Modalities whose features pass a linear layer and tanh, BERT's pooler, before the projection:
                "none", "text", "image" or "both" (VisionTextDualEncoder).
            init: Initial weights of the projections: "random"; or "closed_form", canonical correlation analysis of
                training pairs before the first step.
            init_samples: Largest number of training pairs, a fixed sample, for the closed form. None: all, at most
                20,000.
            ridge: Added to the diagonals of the closed form's covariances, as a multiple of their mean: a larger one
                fits the training pairs less closely.
            refit: Solve the closed form again before each validation, from the encoders as they are then, for
                evaluation only; training keeps its projections.
            interaction: "pooled", one vector of each text and image; or "tokens", a vector of each token, compared by
                late interaction. It takes more time and memory, and there is no image index and no export.

        Raises:
            UsageError: An option that is not allowed, or an encoder without layers.
        """
        super().__init__()
        self.check_options(
            embedding_size=embedding_size, temperature=temperature, pool=pool, normalize=normalize, pooler=pooler,
            init=init, init_samples=init_samples, ridge=ridge, refit=refit, interaction=interaction,
        )  # fmt: skip
        if (config.text_layers == 0 and not config.shared_text_layers) or config.image_layers == 0:
            raise UsageError(
                "objectives.itc compares the outputs of the two encoders, but here "
                f"text_layers={config.text_layers} and image_layers={config.image_layers}: "
                "an encoder without layers has no contextual output. Give both at least 1 layer or disable itc "
                "(--model.objectives '{mlm: 1, itm: 1}')."
            )
        self.pooling = Pooling.from_options(pool, normalize)
        self.init, self.init_samples, self.ridge = init, init_samples, ridge
        self.interaction = interaction
        self.is_trained = False
        """Whether the projections are those of a saved model, which no closed form replaces."""
        widths = {name: self.pooling.width(name, config.hidden_size) for name in MODALITIES}
        self.text_projection = nn.Linear(widths["text"], embedding_size)
        self.image_projection = nn.Linear(widths["image"], embedding_size)
        self.refit = refit
        for name, width in widths.items():
            self.register_buffer(f"refit_{name}_weight", torch.zeros(embedding_size, width) if refit else None)
            self.register_buffer(f"refit_{name}_bias", torch.zeros(embedding_size) if refit else None)
        self.log_scale = nn.Parameter(Tensor([-math.log(temperature)]))
        self.poolers = nn.ModuleDict({name: nn.Linear(widths[name], widths[name]) for name in POOLERS[pooler]})

    @classmethod
    def check_options(
        cls,
        *,
        embedding_size: Any = 256,
        temperature: Any = 0.07,
        pool: Any = "first",
        normalize: Any = False,
        pooler: Any = "none",
        init: Any = "random",
        init_samples: Any = None,
        ridge: Any = 0.3,
        refit: Any = False,
        interaction: Any = "pooled",
    ) -> None:
        """Check the values of the options.

        Raises:
            UsageError: A value that is not allowed.
        """
        if not _is_count(embedding_size):
            raise UsageError(f"objectives.itc.embedding_size={embedding_size!r}: must be a whole number of 1 or more.")
        if not isinstance(temperature, int | float) or not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
            raise UsageError(
                f"objectives.itc.temperature={temperature!r}: must be a number from {MIN_TEMPERATURE} to "
                f"{MAX_TEMPERATURE}."
            )
        pools = pool if isinstance(pool, Mapping) else dict.fromkeys(MODALITIES, pool)
        if {*pools} != {*MODALITIES} or any(value not in POOLS for value in pools.values()):
            raise UsageError(
                f"objectives.itc.pool={pool!r}; allowed are {', '.join(POOLS)}, or one of them for each of text and "
                "image, such as {text: mean, image: first_and_mean}."
            )
        if not isinstance(normalize, bool):
            raise UsageError(f"objectives.itc.normalize={normalize!r}; allowed are true, false.")
        if not isinstance(pooler, str) or pooler not in POOLERS:
            raise UsageError(f"objectives.itc.pooler={pooler!r}; allowed are {', '.join(POOLERS)}.")
        if init not in ("random", "closed_form"):
            raise UsageError(f"objectives.itc.init={init!r}; allowed are random, closed_form.")
        if init == "closed_form" and pooler != "none":
            raise UsageError(
                f"objectives.itc.init='closed_form' solves projections of the pooled states, but pooler={pooler!r} "
                "puts another layer before them; leave one of the two out."
            )
        if interaction not in INTERACTIONS:
            raise UsageError(f"objectives.itc.interaction={interaction!r}; allowed are {', '.join(INTERACTIONS)}.")
        unused = {
            "pool": (pool, "first"),
            "normalize": (normalize, False),
            "pooler": (pooler, "none"),
            "init": (init, "random"),
        }
        for name, (value, default) in unused.items():
            if interaction == "tokens" and value != default:
                raise UsageError(
                    f"objectives.itc.interaction='tokens' compares all tokens, without pooling and closed form, but "
                    f"{name}={value!r}; leave one of the two out."
                )
        if isinstance(ridge, bool) or not isinstance(ridge, int | float) or not 0 < ridge < math.inf:
            raise UsageError(f"objectives.itc.ridge={ridge!r}: must be a number above 0.")
        if not isinstance(refit, bool):
            raise UsageError(f"objectives.itc.refit={refit!r}; allowed are true, false.")
        if refit and init != "closed_form":
            raise UsageError(
                f"objectives.itc.refit solves the closed form again, but init={init!r}: add init: closed_form, or "
                "leave refit out."
            )
        if init_samples is not None and not _is_count(init_samples):
            raise UsageError(
                f"objectives.itc.init_samples={init_samples!r}: must be a whole number of 1 or more, or null."
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
        """Project (B, T, D) encoded texts to (B, embedding_size) unit vectors, fp32; of tokens (B, T, E)."""
        return self._embed("text", self.text_projection, text)

    def embed_image(self, image: Tokens) -> Tensor:
        """Project (B, P, D) encoded images to (B, embedding_size) unit vectors, fp32; of tokens (B, P, E)."""
        return self._embed("image", self.image_projection, image)

    def _embed(self, name: str, projection: nn.Linear, tokens: Tokens) -> Tensor:
        by_token = self.interaction == "tokens"
        features = full_precision(tokens.hidden_states) if by_token else self.pooling.features(name, tokens)
        with no_autocast(features):
            features = features.to(projection.weight.dtype)
            if name in self.poolers:
                features = torch.tanh(self.poolers[name](features))
            if self.refit and not self.training:
                weight, bias = (getattr(self, f"refit_{name}_{part}").to(features) for part in ("weight", "bias"))
                return F.normalize(F.linear(features, weight, bias), dim=-1)
            vectors = F.normalize(projection(features), dim=-1)
            return vectors.masked_fill(~tokens.mask.unsqueeze(-1), 0.0) if by_token else vectors

    def check_one_vector(self, purpose: str) -> None:
        """Check that a text or an image has one vector.

        Args:
            purpose: What needs it, for the message.

        Raises:
            UsageError: It has one for each token.
        """
        if self.interaction == "tokens":
            raise UsageError(
                f"{purpose} needs one vector of each image and text, but objectives.itc.interaction='tokens' of this "
                "model compares the vectors of all tokens; use evaluate or match, or train with interaction='pooled'."
            )

    @torch.no_grad()
    def set_refit(self, maps: LinearMaps) -> None:
        """Set the projections that evaluation reads, with `refit`."""
        for name, value in maps._asdict().items():
            buffer = getattr(self, f"refit_{name}")
            buffer.copy_(value)

    @torch.no_grad()
    def pair_logits(self, text: Tokens, image: Tokens) -> Tensor:
        """Return the contrastive logit of each text (B, T, D) with the image (B, P, D) of its row, (B,) fp32."""
        text_vectors, image_vectors = self.embed_text(text), self.embed_image(image)
        with no_autocast(text_vectors):
            return self.scale * pair_similarities(text_vectors, image_vectors)

    def similarity(self, encoded: EncodedBatch) -> Tensor:
        """Return logits of local texts and all images, (B, B * world size)."""
        text, image = self.embed_text(encoded.text), self.embed_image(encoded.image)
        with no_autocast(text):
            return similarities(self.scale * text, gather_vectors(image))

    def both_logits(self, encoded: EncodedBatch) -> tuple[Tensor, Tensor]:
        """Return logits of local texts and all images, and of local images and all texts, (B, B * world size) each."""
        text, image = self.embed_text(encoded.text), self.embed_image(encoded.image)
        return self.logits(text, gather_vectors(image)), self.logits(image, gather_vectors(text))

    def logits(self, local: Tensor, gathered: Tensor) -> Tensor:
        """Return the contrastive logits of vectors of one modality, the queries, and of the other, (B, N) fp32."""
        with no_autocast(local):
            local = self.scale * local
            return local @ gathered.T if local.ndim == 2 else late_interaction(local, gathered)

    def forward(self, encoded: EncodedBatch) -> ObjectiveOutput:
        """Compute the symmetric cross-entropy; reads the keys of the batch that `same_pair` reads."""
        text_logits, image_logits = self.both_logits(encoded)
        # Both directions need the positives of local rows among all; the relation is made symmetric.
        local = same_pair(encoded.batch)  # (B, B * world size)
        gathered = all_gather(local.to(torch.uint8)).bool()  # (B * world size, B * world size)
        gathered = gathered | gathered.T
        size = len(local)
        positive = gathered[rank() * size : (rank() + 1) * size].to(text_logits.dtype)
        share = positive / positive.sum(dim=1, keepdim=True)
        with no_autocast(text_logits):
            of_texts, of_images = text_logits.log_softmax(dim=1), image_logits.log_softmax(dim=1)
            total = -(share * (of_texts + of_images)).sum() / 2
            if encoded.soft_targets is not None:
                for_texts, for_images = self._similarity_targets(*encoded.soft_targets.predictions["itc"])
                soft = -(for_texts * of_texts + for_images * of_images).sum() / 2
                total = encoded.soft_targets.mix(total, soft)
        targets = torch.arange(size, device=local.device) + rank() * size
        count = torch.tensor(size, device=local.device)
        return ObjectiveOutput(global_mean(total, count), text_logits.detach(), targets, torch.zeros_like(count))

    def predictions(self, encoded: EncodedBatch) -> tuple[Tensor, ...]:
        """Return the vectors of texts and images, (B, embedding_size) each, or of their tokens."""
        return self.embed_text(encoded.text), self.embed_image(encoded.image)

    @torch.no_grad()
    def _similarity_targets(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return softmax similarities of a momentum model's vectors (B, E), of texts and of images with all others.

        The temperature is that of the trained model (arXiv:2107.07651, Eq. 1 and 6).
        """
        of_texts, of_images = self.logits(text, gather_vectors(image)), self.logits(image, gather_vectors(text))
        return of_texts.softmax(dim=1), of_images.softmax(dim=1)


def _is_count(value: Any) -> bool:
    """Whether an option is a whole number of 1 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
