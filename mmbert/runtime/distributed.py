"""Collective operations over all processes (torch.distributed); with one process they return their input."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Job = TypeVar("Job")
Result = TypeVar("Result")


@contextmanager
def torchrun_process_group() -> Iterator[None]:
    """Initialize the process group of torchrun, if it started this process; for commands without Lightning."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def exit_together() -> None:
    """Wait for all processes and destroy the process group.

    A process that exits while its process group is running may crash, upon which torchrun kills the others: rank 0
    would lose the files that it is still writing.
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def world_size() -> int:
    """Return the number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the rank of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def all_gather(rows: Tensor) -> Tensor:
    """Concatenate the rows of all processes in rank order, with gradients.

    Args:
        rows: (B, ...) of the same shape in every process.

    Returns:
        (world size * B, ...).
    """
    if world_size() == 1:
        return rows
    return _Gather.apply(rows)  # pyright: ignore[reportReturnType]


class _Gather(torch.autograd.Function):
    """All-gather whose backward sums the gradients of all processes, each of which computes a part of one loss."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return all_reduce_sum(grads[0]).chunk(world_size())[rank()]


def all_gather_ragged(rows: Tensor, *, pad: int) -> Tensor:
    """All-gather rows whose length differs between processes.

    Args:
        rows: (B, C) integers; B is the same in every process.
        pad: Fills shorter rows at their end.

    Returns:
        (world size * B, largest C).
    """
    if world_size() == 1:
        return rows
    width = torch.tensor(rows.shape[1], device=rows.device)
    dist.all_reduce(width, op=dist.ReduceOp.MAX)
    return all_gather(torch.nn.functional.pad(rows, (0, int(width) - rows.shape[1]), value=pad))


def global_mean(total: Tensor, count: Tensor) -> Tensor:
    """Mean over the items of all processes, with the gradient that DDP needs.

    DDP averages gradients over processes, so each process's part of the mean is multiplied by the world size.

    Args:
        total: () sum over the items of this process.
        count: () number of its items.

    Returns:
        () this process's part, times the world size; 0 where no process has an item.
    """
    count = count.to(torch.float32)
    if world_size() > 1:
        count = count.clone()
        dist.all_reduce(count)
        total = total * world_size()
    return total / count.clamp(min=1)


def all_reduce_max(*values: int) -> tuple[int, ...]:
    """Maximum of each value over all processes, so that all of them take the same decision."""
    if world_size() == 1:
        return values
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else None
    largest = torch.tensor(values, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return tuple(largest.tolist())


def merge_across_ranks(own: dict[int, Any]) -> dict[int, Any]:
    """Merge the dictionaries of all processes, sorted by key; a collective call, so every process must make it.

    Args:
        own: Items of this process; processes that have a key in common must have the same item for it.
    """
    if world_size() == 1 or all_reduce_max(len(own)) == (0,):
        return own
    return dict(sorted(entry for part in all_gather_list([own]) for entry in part.items()))


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum a tensor over all processes, without gradients."""
    if world_size() == 1:
        return values
    values = values.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(values)
    return values


def all_gather_list(rows: list[Any]) -> list[Any]:
    """Concatenate the lists of all processes in rank order; their lengths may differ."""
    if world_size() == 1:
        return rows
    parts: list[list[Any]] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def shard_jobs(jobs: Sequence[Job]) -> list[Job]:
    """Select the jobs of this process: those with number rank, rank + world size, ...

    Every process gets equally many, as sharded layers (FSDP) require; where the number of jobs is not a multiple of
    the world size, some get the last job again.
    """
    size = world_size()
    rounds = -(-len(jobs) // size)
    return [jobs[min(i * size + rank(), len(jobs) - 1)] for i in range(rounds)]


def gather_in_order(own: Iterable[Result], total: int) -> Iterator[Result]:
    """All-gather the results of sharded jobs in the order of the jobs.

    Each job is computed by one process, so its result does not depend on the world size.

    Args:
        own: Results of `shard_jobs(jobs)` in this process, on the CPU.
        total: Number of jobs of all processes.

    Yields:
        The result of each job, in every process.
    """
    size = world_size()
    for round, result in enumerate(own):
        results: list[Any] = [result]
        if size > 1:
            results = [None] * size
            dist.all_gather_object(results, result)
        yield from results[: total - round * size]


def run_sharded(work: Callable[[Job], Result], jobs: Sequence[Job]) -> Iterator[Result]:
    """`map(work, jobs)`, distributed over all processes; see `gather_in_order`."""
    return gather_in_order(map(work, shard_jobs(jobs)), len(jobs))
