"""Cost of ranking with the matching head: number of fusion passes, and an estimate of their time."""

import logging
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from mmbert.evaluation.encoding import PAIRS_PER_BATCH, pair_scores
from mmbert.model.modeling import MMBertForPreTraining
from mmbert.runtime.distributed import rank, world_size

log = logging.getLogger("mmbert")

MIN_ESTIMATED_PASSES = 20 * PAIRS_PER_BATCH
"""Fewer fusion passes are not timed beforehand, as the measurement would be a large part of them."""


def fusion_passes(scorer: str, num_images: int, num_texts: int, *, k: int = 32) -> int:
    """Count the fusion passes that a scorer needs to rank images and texts against each other.

    Args:
        scorer: itc, itm or two_stage.
        num_images: N.
        num_texts: M, distinct texts.
        k: Shortlist of two_stage.

    Returns:
        0 for itc, N * M for itm, the upper bound k * (N + M) or N * M for two_stage.
    """
    exhaustive = num_images * num_texts
    return {"itc": 0, "itm": exhaustive, "two_stage": min(exhaustive, k * (num_images + num_texts))}[scorer]


def estimate_fusion_seconds(
    model: MMBertForPreTraining, images: Tensor, texts: Sequence[Tensor], pairs: Tensor, count: int
) -> float:
    """Estimate the time of `pair_scores` from one batch of pairs.

    Args:
        model: As in `pair_scores`.
        images: (N, P, W) packed tokens.
        texts: (T, W) packed tokens each.
        pairs: (K, 2) int64, at least one; a batch of those whose texts have the median length is timed.
        count: Number of pairs to estimate the time of.

    Returns:
        Seconds for `count` pairs, distributed over all processes.
    """
    lengths = torch.tensor([len(text) for text in texts])[pairs[:, 1]]
    first = max(0, (len(pairs) - PAIRS_PER_BATCH) // 2)
    batch = pairs[lengths.argsort(stable=True)[first : first + PAIRS_PER_BATCH]]
    pair_scores(model, images, texts, batch[:2])  # warm-up: the first call on a GPU loads its kernels
    started = time.perf_counter()
    pair_scores(model, images, texts, batch)
    return (time.perf_counter() - started) * count / len(batch) / world_size()


def log_fusion_cost(
    name: str,
    model: MMBertForPreTraining,
    images: Tensor,
    texts: Sequence[Tensor],
    pairs: Tensor,
    count: int,
    *,
    level: int = logging.INFO,
    hint: str = "",
) -> None:
    """Log the number of fusion passes and their estimated time, before they are computed.

    Every process must call it, as the estimate runs the model; rank 0 logs.

    Args:
        name: What needs the passes, for the message.
        model: As in `estimate_fusion_seconds`.
        images: (N, P, W) packed tokens.
        texts: (T, W) packed tokens each.
        pairs: (K, 2) int64, all pairs or some of them.
        count: Number of all pairs.
        level: Level of the log message.
        hint: End of the message: how to make it cheaper.
    """
    estimate = ""
    if count >= MIN_ESTIMATED_PASSES and len(pairs):
        estimate = f", about {format_duration(estimate_fusion_seconds(model, images, texts, pairs, count))}"
    if rank() == 0:
        log.log(level, "%s: %s fusion passes%s%s", name, f"{count:,}", estimate, f"; {hint}" if hint else "")


def format_duration(seconds: float) -> str:
    """Format a duration with one or two units: "45 s", "3 min 20 s", "2 h 5 min"."""
    if seconds < 1:
        return "1 s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"
