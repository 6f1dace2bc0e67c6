"""Similarity of texts and images: of one vector each, or of the vectors of all their tokens (late interaction).

Vectors of tokens are unit vectors, (B, L, E), with zeros at padding, so that rows of different length can be padded.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmbert.model.objectives.base import no_autocast
from mmbert.runtime.distributed import all_gather, all_reduce_max

BLOCK = 2**25
"""Products of tokens that are computed at a time, at most: 128 MB in fp32."""


def late_interaction(queries: Tensor, keys: Tensor) -> Tensor:
    """Compare all queries with all keys token by token (FILIP, arXiv:2111.07783, Sec. 3).

    Args:
        queries: (B, L, E), such as the tokens of texts; zeros at padding.
        keys: (N, K, E), the tokens of images then; zeros at padding.

    Returns:
        (B, N), the mean over a query's tokens of the largest product with a token of the key; 0 without tokens.
    """
    pairs = max(1, BLOCK // max(1, queries.shape[1] * keys.shape[1]))  # of a query and a key, in a block
    columns = keys.split(min(pairs, max(1, len(keys))))
    rows = queries.split(max(1, pairs // max(1, len(columns[0]))))
    return torch.cat([torch.cat([_late_interaction(q, k) for k in columns], dim=1) for q in rows])


def _late_interaction(queries: Tensor, keys: Tensor) -> Tensor:
    """Compute one block of `late_interaction`."""
    is_query, is_key = queries.any(dim=-1), keys.any(dim=-1)  # (B, L), (N, K)
    products = queries.flatten(0, 1) @ keys.flatten(0, 1).T  # (B * L, N * K)
    return _mean_of_largest(products.view(*is_query.shape, *is_key.shape), is_query, is_key)


def similarities(first: Tensor, second: Tensor) -> Tensor:
    """Compare all of (B, E) vectors with all of (N, E); or (B, L, E) with (N, K, E), the mean of both directions.

    Returns:
        (B, N).
    """
    with no_autocast(first):  # cosines in bf16 are multiples of 0.004, so many would tie
        if first.ndim == 2:
            return first @ second.T
        return (late_interaction(first, second) + late_interaction(second, first).T) / 2


def pair_similarities(first: Tensor, second: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Compare rows of equal number, as `similarities` does: (B,).

    Args:
        first: (B, E) or (B, L, E).
        second: (B, E) or (B, K, E).
        dtype: In which products are summed; None: that of the vectors.
    """
    if first.ndim == 2:
        return (first * second).to(dtype).sum(dim=-1)
    with no_autocast(first):
        products = (first @ second.mT).to(dtype)  # (B, L, K)
    of_first, of_second = first.any(dim=-1), second.any(dim=-1)
    one = _mean_of_largest(products.unsqueeze(2), of_first, of_second[:, None, None])
    other = _mean_of_largest(products.mT.unsqueeze(2), of_second, of_first[:, None, None])
    return (one + other).squeeze(1) / 2


def gather_vectors(vectors: Tensor) -> Tensor:
    """All-gather (B, E) vectors, or those of tokens, (B, L, E) padded to the longest, over the processes."""
    if vectors.ndim == 3:
        (longest,) = all_reduce_max(vectors.shape[1])
        vectors = F.pad(vectors, (0, 0, 0, longest - vectors.shape[1]))
    return all_gather(vectors)


def _mean_of_largest(products: Tensor, is_query: Tensor, is_key: Tensor) -> Tensor:
    """Reduce (B, L, N, K) products over the K tokens of keys and the L of queries: (B, N).

    Args:
        products: Of L tokens of each of B queries with K of each of N keys.
        is_query: (B, L) bool, False at padding.
        is_key: The same of keys, broadcast to the shape of `products`.
    """
    largest = products.masked_fill(~is_key, -torch.inf).max(dim=-1).values  # (B, L, N); backward keeps the indices only
    largest = largest.masked_fill(~is_key.any(dim=-1), 0.0)
    weights = is_query.to(largest.dtype).unsqueeze(-1)  # (B, L, 1)
    return (largest * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
