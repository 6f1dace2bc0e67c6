"""Peak memory of this process: since a reset where the system allows it, or since its start."""

import sys
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None


def reset_peak_memory() -> None:
    """Start a new measurement for `peak_memory`; has no effect on a CPU without Linux' /proc."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # proc(5): resets the peak to the current size
    except OSError:
        pass


def peak_memory() -> int:
    """Peak memory since `reset_peak_memory`, in bytes: of the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return peak_rss()


def peak_rss(*, children: bool = False) -> int:
    """Peak resident memory of this process since its start, in bytes; 0 on a system without `resource` (Windows).

    Args:
        children: Return the largest of this process and of its finished child processes.
    """
    if resource is None:
        return 0
    processes = [resource.RUSAGE_SELF, *([resource.RUSAGE_CHILDREN] if children else [])]
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * max(resource.getrusage(process).ru_maxrss for process in processes)
