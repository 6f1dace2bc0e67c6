"""A group of processes that reckons together, as several training processes do."""

import multiprocessing
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def in_processes(count: int, work: Any, folder: Path, *arguments: Any, seconds: float = 60) -> list[Any]:
    """Runs `work(rank, *arguments)` in a gloo group of `count` processes and returns what each returned."""

    def target(rank: int) -> None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
        torch.save(work(rank, *arguments), folder / f"{rank}.pt")
        dist.destroy_process_group()

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=target, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(timeout=max(0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]  # None: it hangs
    for process in processes:
        process.kill()
    assert codes == [0] * count
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]
