"""Contribution of text and image to one prediction, by Shapley values (MM-SHAP, arXiv:2212.08158)."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmbert.data.processor import MMBertProcessor
from mmbert.errors import UsageError
from mmbert.inference.explanation.occlusion import Occlusion, shapley_values
from mmbert.inference.explanation.targets import Target


@dataclass(frozen=True)
class ModalityShares:
    """Shares of text and image in one score; they sum to 1."""

    target: str
    """The score: "itm", "itc", a label or a word."""
    text: float
    """Sum of the absolute Shapley values of the tokens, divided by that of tokens and image regions (Eq. 2 to 4)."""
    image: float
    standard_error: float
    """Of either share; 0 where all coalitions were evaluated."""
    token_values: dict[int, float]
    """Position of a token -> its Shapley value, in units of the score (log-odds, log-probability or cosine)."""
    region_values: np.ndarray
    """(rows, columns) Shapley values of the image's regions."""
    difference: float
    """Score minus the score with everything removed, which all values sum to."""


def region_grid(grid: tuple[int, int], limit: int) -> tuple[int, int]:
    """Choose rows and columns of image regions, whole patches each: the finest grid with at most `limit` regions."""
    for factor in range(1, max(grid) + 1):
        if all(side % factor == 0 for side in grid) and math.prod(side // factor for side in grid) <= limit:
            return grid[0] // factor, grid[1] // factor
    return 1, 1


def compute_shares(
    core: Any, processor: MMBertProcessor, target: Target, pixels: Tensor, *, samples: int, seed: int
) -> ModalityShares:
    """Compute the shares of text and image in one score.

    Args:
        core: The model without its heads, in evaluation mode.
        processor: The model's.
        target: The score.
        pixels: (3, S, S) uint8 image.
        samples: Permutations to sample, rounded up to an even number.
        seed: Seed of the permutations.

    Raises:
        UsageError: The text has no token, or none but the masked word.
    """
    patches = core.image_encoder.vit.patch_embed.grid_size
    occlusion = Occlusion(core, processor, target, pixels, patches)
    if not occlusion.token_places:
        raise UsageError(
            f"the text has no token whose share in the score {target.name} could be computed; expected one or more "
            "besides a masked word. Give a text with more words."
        )
    # About as many regions as tokens, as in the paper, so that neither modality has more parts to share among.
    occlusion.grid = region_grid(patches, max(4, 2 * len(occlusion.token_places)))
    num_tokens, num_regions = len(occlusion.token_places), math.prod(occlusion.grid)

    def value(coalitions: np.ndarray) -> np.ndarray:
        kept = torch.from_numpy(coalitions)
        texts, text_index = kept[:, :num_tokens].unique(dim=0, return_inverse=True)
        images, image_index = kept[:, num_tokens:].unique(dim=0, return_inverse=True)
        found = occlusion.scores(texts.tolist(), images, torch.stack([text_index, image_index], dim=1))
        return found.double().numpy()

    estimates, is_exact = shapley_values(value, num_tokens + num_regions, samples=samples, seed=seed)
    values = estimates.mean(axis=0)
    share = _text_share(values, num_tokens)
    error = 0.0
    if not is_exact:  # jackknife over pairs of a permutation and its reverse
        pairs = estimates.reshape(-1, 2, estimates.shape[1]).mean(axis=1)
        others = (pairs.sum(axis=0) - pairs) / (len(pairs) - 1)
        left_out = np.array([_text_share(row, num_tokens) for row in others])
        error = math.sqrt((len(pairs) - 1) * left_out.var())
    return ModalityShares(
        occlusion.target.name,
        share,
        1 - share,
        error,
        dict(zip(occlusion.token_places, values[:num_tokens].tolist(), strict=True)),
        values[num_tokens:].reshape(occlusion.grid),
        float(values.sum()),
    )


def _text_share(values: np.ndarray, num_tokens: int) -> float:
    total = np.abs(values).sum()
    return float(np.abs(values[:num_tokens]).sum() / total) if total > 0 else 0.5
