"""Peak memory, also on systems without the module `resource`."""

import sys
from importlib import util
from pathlib import Path
from types import ModuleType

import pytest

from mmbert.runtime import memory

STATUS = Path("/proc/self/status")


@pytest.mark.skipif(not STATUS.is_file(), reason="compares with Linux' /proc/self/status")
def test_peak_rss_is_that_of_the_kernel() -> None:
    lines = dict(line.split(":", 1) for line in STATUS.read_text(encoding="utf-8").splitlines())
    total = int(lines["VmHWM"].split()[0]) * 1024
    # proc(5): getrusage counts since the start, /proc since `reset_peak_memory`; both count pages inexactly.
    assert memory.peak_rss(children=True) >= memory.peak_rss() >= 0.95 * total


def test_module_imports_where_resource_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)  # makes `import resource` raise ImportError
    spec = util.spec_from_file_location("memory_without_resource", memory.__file__)
    assert spec is not None and spec.loader is not None
    module: ModuleType = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.peak_rss() == 0 and isinstance(module.peak_memory(), int)
