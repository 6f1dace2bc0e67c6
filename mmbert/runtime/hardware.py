"""What the machine is good at."""

import os

import torch


def best_precision() -> tuple[str, str]:
    """Lightning's precision for this machine, and why.

    Linear layers run several times faster in bf16 where a CPU has AMX or AVX512-BF16 or a GPU has bf16 units; elsewhere
    bf16 is no faster or slower. (A whole training step, 1.3 M parameters, 1 thread: 1.9 times with AVX512-BF16.)
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
    """CPU threads for the model: the cores that the loader's processes leave, at least one.

    OpenMP threads wait by spinning, so one too many for the cores can make a step ten times slower. A number in
    OMP_NUM_THREADS is taken as it is.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    return max(1, torch.get_num_threads() - loader_processes)
