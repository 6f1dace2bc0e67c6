"""Stateless random numbers: functions of (seed, purpose, epoch, sample) or (seed, purpose, step).

Without a state, the order of samples, MLM masks and negatives do not depend on the number of workers or processes, nor
on how often a run was resumed.
"""

import hashlib

import numpy as np
import torch

_MASK = (1 << 64) - 1


def mix(seed: int, purpose: str, *numbers: int | np.ndarray) -> np.ndarray:
    """Hash integers to uniformly distributed 64-bit numbers (mixing of SplitMix64, doi:10.1145/2714064.2660195).

    Args:
        seed: The run's seed.
        purpose: Name of the random stream, so that two uses never share numbers.
        numbers: Integers or arrays of them, broadcast against each other.

    Returns:
        uint64 array of the broadcast shape.
    """
    start = int.from_bytes(hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest(), "little")
    state = np.uint64(start)
    with np.errstate(over="ignore"):
        for number in numbers:
            step = np.asarray(number).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ step) * np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return np.asarray(state, dtype=np.uint64)


def permutation(seed: int, purpose: str, epoch: int, count: int) -> np.ndarray:
    """Return a random permutation of 0 to count - 1: (count,) int64."""
    return np.argsort(mix(seed, purpose, epoch, np.arange(count)), kind="stable")


def numpy_generator(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """Return a NumPy generator, for instance for one sample."""
    return np.random.Generator(np.random.Philox(key=int(mix(seed, purpose, *numbers))))


def torch_seed(seed: int, purpose: str, *numbers: int) -> int:
    """Return a seed for torch, 0 to 2^63 - 1."""
    return int(mix(seed, purpose, *numbers)) & (_MASK >> 1)


def torch_generator(seed: int, purpose: str, *numbers: int) -> torch.Generator:
    """Return a CPU generator of torch, for instance for one step."""
    return torch.Generator().manual_seed(torch_seed(seed, purpose, *numbers))
