"""Sums and gathers over all processes; with one process they change nothing."""

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
    """Joins the processes that torchrun started, if it did, for what Lightning doesn't manage."""
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
    """Waits until all processes are done, and ends their group.

    torchrun kills the others when one ends badly, and a process that leaves with its group's threads running may: the
    first one would lose what it still writes.
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def world_size() -> int:
    """Number of training processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def all_gather(rows: Tensor) -> Tensor:
    """Concatenates equally shaped (B, ...) rows of all processes in rank order, with gradients."""
    if world_size() == 1:
        return rows
    return _Gather.apply(rows)  # pyright: ignore[reportReturnType]


class _Gather(torch.autograd.Function):
    """Backward sums what every process found for these rows: each computes a share of one loss."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return all_reduce_sum(grads[0]).chunk(world_size())[rank()]


def all_gather_ragged(rows: Tensor, *, pad: int) -> Tensor:
    """Like `gather` for (B, C) integers whose C differs between processes; short rows end in `pad`."""
    if world_size() == 1:
        return rows
    width = torch.tensor(rows.shape[1], device=rows.device)
    dist.all_reduce(width, op=dist.ReduceOp.MAX)
    return all_gather(torch.nn.functional.pad(rows, (0, int(width) - rows.shape[1]), value=pad))


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


def all_reduce_max(*values: int) -> tuple[int, ...]:
    """The largest of each value over all processes, so that all decide alike."""
    if world_size() == 1:
        return values
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else None
    largest = torch.tensor(values, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return tuple(largest.tolist())


def merge_across_ranks(own: dict[int, Any]) -> dict[int, Any]:
    """The entries of all processes, in the order of the keys; every process must ask."""
    if world_size() == 1 or all_reduce_max(len(own)) == (0,):
        return own
    return dict(sorted(entry for part in all_gather_list([own]) for entry in part.items()))


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sums a tensor over all processes, without gradients."""
    if world_size() == 1:
        return values
    values = values.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(values)
    return values


def all_gather_list(rows: list[Any]) -> list[Any]:
    """The rows of all processes, which may differ in number."""
    if world_size() == 1:
        return rows
    parts: list[list[Any]] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def shard_jobs(jobs: Sequence[Job]) -> list[Job]:
    """What this process does of `jobs`: every n-th. Where they don't come out even, it repeats the last one.

    So all processes do equally many, as layers that are spread over processes (FSDP) need.
    """
    size = world_size()
    rounds = -(-len(jobs) // size)
    return [jobs[min(i * size + rank(), len(jobs) - 1)] for i in range(rounds)]


def gather_in_order(own: Iterable[Result], total: int) -> Iterator[Result]:
    """Gives the results of all jobs to every process, in the order of the jobs, one round at a time.

    A job is done by one process as a whole, so its result does not depend on how many there are.

    Args:
        own: Results of `shard_jobs(jobs)`, on the CPU.
        total: Number of all jobs.
    """
    size = world_size()
    for round, result in enumerate(own):
        results: list[Any] = [result]
        if size > 1:
            results = [None] * size
            dist.all_gather_object(results, result)
        yield from results[: total - round * size]


def run_sharded(work: Callable[[Job], Result], jobs: Sequence[Job]) -> Iterator[Result]:
    """`map(work, jobs)` with the jobs shared out over the processes; see `gather_in_order`."""
    return gather_in_order(map(work, shard_jobs(jobs)), len(jobs))
