"""Compute an explanation: relevance of every token and image patch, and how they depend on each other."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmbert.data.processor import MMBertProcessor
from mmbert.errors import UsageError, did_you_mean
from mmbert.inference.explanation.explanation import Explanation
from mmbert.inference.explanation.gradients import gradient_relevance
from mmbert.inference.explanation.modality import region_grid
from mmbert.inference.explanation.occlusion import Occlusion
from mmbert.inference.explanation.targets import Target
from mmbert.inference.explanation.trace import trace

METHODS = ("attention", "gradient", "integrated_gradients")
MAX_LINKED_REGIONS = 64
"""Image regions whose interaction with each token is computed; finer grids are merged."""


def patch_grid(core: Any) -> tuple[int, int]:
    """Return rows and columns of an image's patches."""
    rows, columns = core.image_encoder.vit.patch_embed.grid_size
    return int(rows), int(columns)


def explain(
    core: Any,
    processor: MMBertProcessor,
    target: Target,
    pixels: Tensor,
    *,
    text: str = "",
    method: str | None = None,
    links: bool = True,
) -> Explanation:
    """Compute the relevance of tokens and image patches for a score.

    Args:
        core: The model without its heads, in evaluation mode.
        processor: The model's.
        target: The score.
        pixels: (3, S, S) uint8 image.
        text: The text, for display.
        method: A name in `METHODS`; None: attention where it connects the modalities, else gradient.
        links: Compute the interactions of tokens and image regions, too.

    Raises:
        UsageError: An unknown method, or captum is not installed.
    """
    if method is not None and method not in METHODS:
        raise UsageError(f"method={method!r}: allowed are {', '.join(METHODS)}.{did_you_mean(method, METHODS)}")
    grid, device = patch_grid(core), core.word_embeddings.device
    occlusion = Occlusion(core, processor, target, pixels, grid)
    images = torch.stack([pixels, occlusion.remove(torch.zeros(1, math.prod(grid), dtype=torch.bool))[0]])
    given, blank = processor.image_settings.normalize(images.to(device)).split(1)
    ids = torch.tensor([target.input_ids], device=device)
    traced = trace(core, lambda: target.score(core.encode_text(ids), core.encode_image(given))[0])
    method = method or ("attention" if traced.is_cross_modal else "gradient")
    if method == "attention":
        of_text, of_patches = traced.text, traced.image[-math.prod(grid) :].reshape(grid)
    else:
        masked = [processor.mask_token_id if i in occlusion.token_places else x for i, x in enumerate(ids[0].tolist())]
        of_text, of_pixels = gradient_relevance(
            core, target, masked, given, blank, integrated=method == "integrated_gradients"
        )
        of_patches = of_pixels.unflatten(1, (grid[1], -1)).unflatten(0, (grid[0], -1)).sum(dim=(1, 3))
    return Explanation(
        target=target.name,
        score=target.display(traced.score).item(),
        kind=target.kind,
        method=method,
        text=text,
        tokens=tuple(map(str, processor.tokenizer.convert_ids_to_tokens(target.input_ids))),
        token_relevance=of_text.double().cpu().numpy(),
        patch_relevance=of_patches.double().cpu().numpy(),
        links=interactions(occlusion) if links else None,
        image=pixels.permute(1, 2, 0).contiguous().numpy(),
        fusion=core.config.fusion,
    )


def interactions(occlusion: Occlusion) -> np.ndarray:
    """Compute the interaction of each token with each patch, for any fusion strategy.

    It is s(both) - s(without the token) - s(without the patch) + s(without both): the part of the score that is lost
    with either of the two and that neither has alone.

    Returns:
        (T, rows, columns); zeros for special tokens. Of a grid of more than `MAX_LINKED_REGIONS` patches several
        patches are removed together.
    """
    grid, places = occlusion.grid, occlusion.token_places
    regions = region_grid(grid, MAX_LINKED_REGIONS)
    num_texts, num_images = len(places) + 1, math.prod(regions) + 1
    # Variant 0 is complete, variant i lacks part i - 1.
    texts, images = (~torch.eye(n, dtype=torch.bool)[:, 1:] for n in (num_texts, num_images))
    coarse = Occlusion(occlusion.core, occlusion.processor, occlusion.target, occlusion.pixels, regions)
    pairs = torch.cartesian_prod(torch.arange(num_texts), torch.arange(num_images))
    scores = coarse.scores(texts.tolist(), images, pairs).double().reshape(num_texts, num_images)
    found = scores[0, 0] - scores[1:, :1] - scores[:1, 1:] + scores[1:, 1:]  # (tokens, regions)
    out = torch.zeros(len(occlusion.target.input_ids), *grid, dtype=torch.float64)
    repeated = found.reshape(-1, *regions).repeat_interleave(grid[0] // regions[0], 1)
    out[places] = repeated.repeat_interleave(grid[1] // regions[1], 2)
    return out.numpy()
