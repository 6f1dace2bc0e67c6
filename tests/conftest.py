"""Fixtures shared by all tests, and the two tiers: `MMBERT_FULL=1` turns the full one on."""

import os
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from tiers import tier

# What a test's own `@settings` leaves open.
settings.register_profile(
    "mmbert",
    max_examples=tier(500, 20_000),
    deadline=None,  # the machine may be busy
    # A function's fixture here is a folder, where each example writes its file anew.
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("mmbert")

# No test leaves the machine: neither this process and its forks, nor any Python that it starts.
OFFLINE = Path(__file__).parent / "offline"
runpy.run_path(str(OFFLINE / "sitecustomize.py"))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(OFFLINE), os.environ.get("PYTHONPATH")]))


@pytest.fixture(scope="session")
def offline_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """File with the hosts that were asked for and refused."""
    log = tmp_path_factory.mktemp("offline") / "refused"
    log.touch()
    os.environ["OFFLINE_LOG"] = str(log)
    return log


@pytest.fixture(autouse=True)
def refused(offline_log: Path) -> Iterator[Callable[[], list[str]]]:
    """Fails a test that asked for another machine, whoever caught the error; called, it gives and forgets the hosts."""

    def take() -> list[str]:
        hosts = offline_log.read_text().splitlines()
        offline_log.write_text("")
        return hosts

    yield take
    assert not take(), "tests need no network"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with real images and captions beside the repository."""
    folder = Path(__file__).parents[1].parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs ../shared (real images), absent in a plain clone")
    return folder
