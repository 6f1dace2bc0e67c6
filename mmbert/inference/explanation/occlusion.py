"""Scores of a text and an image with some tokens and image regions removed."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmbert.data.processor import MMBertProcessor
from mmbert.inference.explanation.targets import Target

FORWARD_BATCH = 64
"""Pairs per forward pass: bounds the memory."""


class Occlusion:
    """One text and one image whose parts can be removed: tokens become [MASK], patches the image's median color.

    The median color is that of the background where there is one, so a removed object leaves no new edges there.

    Args:
        core: Encodes both.
        processor: The model's.
        target: The score.
        pixels: (3, S, S) uint8 image.
        grid: Rows and columns of patches.
    """

    def __init__(self, core: Any, processor: MMBertProcessor, target: Target, pixels: Tensor, grid: tuple[int, int]):
        self.core, self.processor, self.target, self.pixels, self.grid = core, processor, target, pixels, grid
        tokenizer: Any = processor.tokenizer
        special = {tokenizer.cls_token_id, tokenizer.sep_token_id, processor.mask_token_id}
        self.token_places = [i for i, token in enumerate(target.input_ids) if token not in special]
        """Positions that can be removed: neither [CLS], [SEP] nor the word to predict."""
        self.median = pixels.flatten(1).float().median(dim=1).values.to(torch.uint8)  # (3,)

    @torch.no_grad()
    def scores(self, texts: Sequence[Sequence[bool]], patches: Tensor, pairs: Tensor) -> Tensor:
        """Compute the scores of pairs of partly removed texts and images.

        Args:
            texts: For each variant of the text, which of `token_places` are kept.
            patches: (M, rows * columns) bool, for each variant of the image which patches are kept.
            pairs: (K, 2) int64, numbers of text and image variant.

        Returns:
            (K,) scores of `Target.score`, on the CPU.
        """
        device = self.core.word_embeddings.device
        rows = []
        for kept in texts:
            row = [*self.target.input_ids]
            for place, keep in zip(self.token_places, kept, strict=True):
                row[place] = row[place] if keep else self.processor.mask_token_id
            rows.append(row)
        ids, images = torch.tensor(rows, device=device), self.remove(patches)
        text = _concatenate([self.core.encode_text(part) for part in ids.split(FORWARD_BATCH)])
        image = _concatenate([
            self.core.encode_image(self.processor.image_settings.normalize(part.to(device)))
            for part in images.split(FORWARD_BATCH)
        ])  # fmt: skip
        parts = [part.to(device) for part in pairs.split(FORWARD_BATCH)]
        return torch.cat([self.target.score(text.rows(part[:, 0]), image.rows(part[:, 1])).cpu() for part in parts])

    def remove(self, patches: Tensor) -> Tensor:
        """Return (M, 3, S, S) uint8 copies of the image without the patches that are False in (M, rows * columns)."""
        rows, columns = self.grid
        height, width = (side // count for side, count in zip(self.pixels.shape[1:], self.grid, strict=True))
        kept = patches.reshape(-1, 1, rows, columns).repeat_interleave(height, 2).repeat_interleave(width, 3)
        return torch.where(kept, self.pixels, self.median[:, None, None])


def _concatenate(parts: Sequence[Any]) -> Any:
    first = parts[0]
    if len(parts) == 1:
        return first
    layers = tuple(torch.cat(layer) for layer in zip(*(part.intermediate for part in parts), strict=True))
    return type(first)(torch.cat([p.hidden_states for p in parts]), torch.cat([p.mask for p in parts]), layers)


def shapley_values(
    value: Callable[[np.ndarray], np.ndarray], count: int, *, samples: int, seed: int = 0
) -> tuple[np.ndarray, bool]:
    """Compute Shapley values (see MM-SHAP, arXiv:2212.08158, Eq. 1) exactly, or sample permutations of the players.

    Args:
        value: (K, count) bool coalitions -> (K,) values.
        count: Number of players, at least one.
        samples: Permutations to sample, each followed by its reverse, which reduces the variance. Where all coalitions
            are no more work, the values are exact.
        seed: Seed of the permutations.

    Returns:
        (samples, count) estimates, of which the mean is the Shapley value and each sums to value(all) - value(none);
        one row if they are exact. And whether they are.
    """
    if 2**count <= samples * (count + 1):
        return _exact_shapley_values(value, count)[None], True
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(count) for _ in range((samples + 1) // 2)]
    orders = np.stack([order for pair in zip(orders, (o[::-1] for o in orders), strict=True) for order in pair])
    ranks = orders.argsort(axis=1)  # (samples, count) position of each player
    joined = ranks[:, None, :] < np.arange(count + 1)[None, :, None]  # (samples, count + 1, count)
    distinct, index = np.unique(joined.reshape(-1, count), axis=0, return_inverse=True)
    values = value(distinct)[index.reshape(len(orders), count + 1)]
    gains = np.diff(values, axis=1)  # of the player at each position
    return np.take_along_axis(gains, ranks, axis=1), False


def _exact_shapley_values(value: Callable[[np.ndarray], np.ndarray], count: int) -> np.ndarray:
    coalitions = (np.arange(2**count)[:, None] >> np.arange(count)) & 1 == 1  # row i holds the bits of i
    values, sizes = value(coalitions), coalitions.sum(axis=1)
    # A coalition of k players precedes a given one in k! (n - k - 1)! of n! permutations.
    ways = np.array([1 / (count * np.prod([(count - 1 - i) / (i + 1) for i in range(k)])) for k in range(count)])
    found = np.empty(count)
    for player in range(count):
        without = np.flatnonzero(~coalitions[:, player])
        found[player] = (ways[sizes[without]] * (values[without | (1 << player)] - values[without])).sum()
    return found
