"""Defaults that depend on the hardware: precision and number of CPU threads."""

import os

import torch


def best_precision() -> tuple[str, str]:
    """Choose Lightning's precision for this machine.

    Linear layers run several times faster in bf16 where a CPU has AMX or AVX512-BF16 or a GPU has bf16 units; elsewhere
    bf16 is no faster or slower. (A training step with 1.3 M parameters on 1 thread: 1.9 times faster with AVX512-BF16.)

    Returns:
        The precision, and the reason for log messages.
    """
    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16-mixed", "the GPU computes in bf16"
        return "32-true", "the GPU does not compute in bf16"
    if torch.cpu._is_amx_tile_supported():
        return "bf16-mixed", "the CPU has AMX"
    if torch.cpu._is_avx512_bf16_supported():
        return "bf16-mixed", "the CPU has AVX512-BF16"
    return "32-true", "the CPU has no bf16"


def compute_threads(loader_processes: int) -> int:
    """CPU threads for the model: the number of cores minus the DataLoader's workers, at least one.

    OpenMP threads wait by spinning, so one thread more than cores can make a step ten times slower. OMP_NUM_THREADS has
    priority.

    Args:
        loader_processes: Workers of the DataLoader.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    return max(1, torch.get_num_threads() - loader_processes)
