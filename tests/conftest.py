"""Fixtures shared by all tests, and the two tiers: `MMBERT_FULL=1` turns the full one on."""

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


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with real pictures and captions beside the repository."""
    folder = Path(__file__).parents[1].parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs ../shared (real pictures), absent in a plain clone")
    return folder
