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


def free_memory(device: torch.device) -> int:
    """Memory that can be taken on a device, in bytes: of a GPU, or of this machine and its control group.

    A system without Linux' /proc is taken to have plenty.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [sys.maxsize]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text(encoding="utf-8")) for name in ("max", "current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
        found.append(max(0, limit - used + int(stat["inactive_file"])))  # cached files make room
    except (OSError, ValueError, KeyError):  # ValueError: the limit is "max"
        pass
    return min(found)


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
