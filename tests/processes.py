"""Several processes: a group that reckons together, and whole runs in two."""

import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from interrupted import ROOT

from mmbert.cli.main import main

CONFIG = ["fit", "--config", str(ROOT / "configs/pretrain/shapes_plain.yaml")]
EXACT = ["--trainer.precision=32-true", "--trainer.max_epochs=2", "--threads=1"]


def in_processes(count: int, work: Any, folder: Path, *arguments: Any, seconds: float = 60) -> list[Any]:
    """Runs `work(rank, *arguments)` in a gloo group of `count` processes and returns what each returned."""

    def target(rank: int) -> None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
        torch.save(work(rank, *arguments), folder / f"{rank}.pt")
        if dist.is_initialized():
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


def fit_in_two(tiny: list[str], root: Path, *more: str, batch_size: int = 8, seconds: float = 120) -> None:
    """A run in two forked processes with half the batch each, as torchrun starts them but without its imports."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    options = [*EXACT, f"--trainer.default_root_dir={root}", "--trainer.devices=2", "--trainer.strategy=ddp"]

    def target(rank: int) -> None:
        torch.set_num_threads(1)
        os.environ.update(shared, RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
        main([*CONFIG, *tiny, *options, f"--data.batch_size={batch_size}", *more])

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=target, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(timeout=max(0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]  # None: it hangs
    for process in processes:
        process.kill()
    assert codes == [0, 0]


def start(
    tiny: list[str],
    root: Path,
    *more: str,
    strategy: str = "ddp",
    torchrun: bool = True,
    batch_size: int = 8,
    of: list[str] = CONFIG,
) -> subprocess.Popen[str]:
    """Two processes with half the batch each, started by torchrun or by Lightning; `of` is the command's beginning."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"] if torchrun else []
    options = [*EXACT, f"--trainer.default_root_dir={root}", "--trainer.devices=2", f"--trainer.strategy={strategy}"]
    command = [sys.executable, *launcher, str(ROOT / "train.py"), *of, *tiny, *options]
    return subprocess.Popen(
        [*command, f"--data.batch_size={batch_size}", *more],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def finish(process: subprocess.Popen[str], *, timeout: float = 120) -> str:
    """The error stream of a run that must end well."""
    try:
        errors = process.communicate(timeout=timeout)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 0, errors
    return errors
