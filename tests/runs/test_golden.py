"""Golden loss curves: 20 steps of each first strategy give the losses that were written down.

Hex-equal on the CPU (and torch) that they were written on, within 1e-3 elsewhere. After a change that is meant to move
them: `MMBERT_WRITE_GOLDEN=1 python -m pytest tests/runs/test_golden.py`, and the commit says why.
"""

import hashlib
import os
from pathlib import Path

import pytest
import torch
from interrupted import ROOT, trace

from mmbert.cli.main import main

FOLDER = ROOT / "tests/golden"


def machine() -> str:
    """CPU, its instruction sets, and torch: what fixes the bits of a float sum. Cloud CPUs share names."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().split("\n\n")[0].splitlines() if info.is_file() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    numbers = " ".join(f"{key} {facts.get(key, '?')}" for key in ("model", "stepping"))
    flags = hashlib.sha256(facts.get("flags", "").encode()).hexdigest()[:8]
    return f"{facts.get('model name', 'unknown')}, {numbers}, flags {flags}, torch {torch.__version__}"


@pytest.mark.parametrize("fusion", ["early", "late", "hybrid"])
def test_losses_are_those_written_down(fusion: str, tiny: list[str], tmp_path: Path) -> None:
    options = [
        "--trainer.max_epochs=5", "--trainer.precision=32-true", "--threads=1", "--name=run",
        "--model.hidden_dropout_prob=0", "--model.attention_probs_dropout_prob=0", "--trainer.limit_val_batches=0",
        f"--model.fusion={fusion}", f"--trainer.default_root_dir={tmp_path}", "--evaluation.test_images=2",
    ]  # fmt: skip
    main(["fit", "--config", str(ROOT / "configs/pretrain/shapes_plain.yaml"), *tiny, *options])
    losses = [line.split(",")[3] for line in trace(tmp_path)[1:]]
    assert len(losses) == 20
    file = FOLDER / f"{fusion}.txt"
    if os.environ.get("MMBERT_WRITE_GOLDEN"):
        file.write_text("\n".join([machine(), *losses]) + "\n")
    written_on, *expected = file.read_text().splitlines()
    if written_on == machine():
        assert losses == expected
    values = [float.fromhex(x) for x in losses]
    assert values == pytest.approx([float.fromhex(x) for x in expected], rel=1e-3)
