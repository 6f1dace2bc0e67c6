"""Trains mmbert. Without arguments: the quickstart on data/shapes, which is prepared if it is missing."""

import subprocess
import sys
import time
from pathlib import Path

from mmbert.cli.main import main

ROOT = Path(__file__).parent
QUICKSTART = ROOT / "configs/quickstart.yaml"


def prepare_quickstart() -> float:
    """Draws data/shapes if it is not there yet; returns the seconds that took."""
    started = time.perf_counter()
    if not (ROOT / "data/shapes/annotations/captions_train.json").is_file():
        subprocess.run([sys.executable, str(ROOT / "data/shapes/prepare.py")], check=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    quickstart = len(sys.argv) == 1
    main(
        default=["fit", "--config", str(QUICKSTART)],
        preparation_seconds=prepare_quickstart() if quickstart else 0.0,
    )
