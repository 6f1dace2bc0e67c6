"""Peak memory of this process, since a moment of one's choice where the system allows it."""

import resource
import sys
from pathlib import Path

import torch


def reset_peak_memory() -> None:
    """Starts a new measurement; does nothing on a CPU without Linux' /proc."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak becomes what is held now
    except OSError:
        pass


def peak_memory() -> int:
    """Most memory held since `reset_peak_memory`, in bytes: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):  # then since the start of the process
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
