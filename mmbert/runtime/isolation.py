"""Global state of the process that a training run changes, put back afterwards."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

SEED_VARIABLES = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")
"""Environment variables that `lightning.seed_everything` sets."""


@contextmanager
def isolated_process_state() -> Iterator[None]:
    """Restore random number generators, CPU threads and seed variables at the end of the block.

    With it two runs in one process don't affect each other, nor what a notebook draws after them.
    """
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    threads = torch.get_num_threads()
    variables = {name: os.environ.get(name) for name in SEED_VARIABLES}
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if devices:
            torch.cuda.set_rng_state_all(devices)
        torch.set_num_threads(threads)
        for name, value in variables.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Let torch's operations give the same result in every run with the same number of threads, within the block.

    Otherwise the gradient of `x[index]` adds up repeated rows in the order in which threads reach them.
    """
    if torch.are_deterministic_algorithms_enabled():  # trainer.deterministic, which may raise where none exists
        yield
        return
    settings: Any = torch.utils.deterministic  # untyped
    filled, settings.fill_uninitialized_memory = (
        settings.fill_uninitialized_memory,
        False,
    )  # it costs time
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        settings.fill_uninitialized_memory = filled
