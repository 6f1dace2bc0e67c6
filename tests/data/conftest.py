"""Fixtures of the data tests."""

from pathlib import Path

import pytest


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with images a.jpg, c.jpg and sub/b.jpg; readers only look whether they exist."""
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    for name in ("a.jpg", "c.jpg", "sub/b.jpg"):
        (root / name).touch()
    return root
