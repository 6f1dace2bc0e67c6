"""Sums and gathers over all processes; with one process they change nothing."""

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
from torch import Tensor


def world_size() -> int:
    """Number of training processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather(rows: Tensor) -> Tensor:
    """Concatenates equally shaped (B, ...) rows of all processes in rank order, with gradients."""
    if world_size() == 1:
        return rows
    if rows.is_floating_point():
        return torch.cat(dist_nn.all_gather(rows))
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def gather_ragged(rows: Tensor, *, pad: int) -> Tensor:
    """Like `gather` for (B, C) integers whose C differs between processes; short rows end in `pad`."""
    if world_size() == 1:
        return rows
    width = torch.tensor(rows.shape[1], device=rows.device)
    dist.all_reduce(width, op=dist.ReduceOp.MAX)
    return gather(torch.nn.functional.pad(rows, (0, int(width) - rows.shape[1]), value=pad))


def global_mean(total: Tensor, count: Tensor) -> Tensor:
    """Mean over the items of all processes, of which `total` sums this process's `count`.

    DDP averages gradients over processes, so the local share is scaled up by their number. Zero items give zero.
    """
    count = count.to(torch.float32)
    if world_size() > 1:
        count = count.clone()
        dist.all_reduce(count)
        total = total * world_size()
    return total / count.clamp(min=1)
