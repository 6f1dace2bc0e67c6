"""20 `kill -9` at random moments over one run with real images, real encoders and 2 loader processes."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from interrupted import ROOT, results, trace

KILLS = 20


def command(shared: Path, root: Path, *more: str) -> list[str]:
    data, weights = shared / "data/ucm_captions", shared / "weights"
    return [
        sys.executable, str(ROOT / "train.py"), "fit", "--config", str(ROOT / "configs/pretrain/ucm.yaml"),
        f"--model.text_pretrained={weights}/minilm-l6-h384", f"--data.annotations={data}/dataset_ucm.json",
        f"--model.image_pretrained={weights}/vit_small_patch14_dinov2", f"--data.images={data}/images",
        f"--trainer.default_root_dir={root}", "--name=run", "--data.num_workers=2", "--threads=1",
        "--trainer.max_epochs=2", "--data.test_captions=1", "--data.val_size=50", "--evaluation.test_images=20",
        "--checkpoint.every_n_steps=4", "--trainer.enable_progress_bar=false", *more,
    ]  # fmt: skip


def lines(root: Path) -> int:
    file = root / "run/trace.csv"
    return len(file.read_text().splitlines()) if file.is_file() else 0


@pytest.mark.skipif(not os.environ.get("MMBERT_FULL"), reason="takes 20 minutes: MMBERT_FULL=1 or make test-full")
@pytest.mark.timeout(3600)
def test_twenty_kills_leave_the_curve_as_it_would_have_been(shared: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(shared, whole), check=True, stdout=subprocess.DEVNULL)
    rng, kills = random.Random(0), 0
    while kills < KILLS:
        process = subprocess.Popen(
            command(shared, killed, "--resume=auto"),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        # Of the first seconds, in which libraries are imported, a few kills are enough.
        wait = rng.uniform(1, 12) if kills % 5 == 0 else None
        before, started = lines(killed), time.monotonic()
        while wait is None and process.poll() is None and time.monotonic() - started < 120:
            if lines(killed) not in (0, before):
                wait = rng.uniform(0, 16)
            time.sleep(0.05)
        time.sleep(wait or 0)
        assert process.poll() is None, "the run ended before it was killed often enough"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    subprocess.run(command(shared, killed, "--resume=auto"), check=True, stdout=subprocess.DEVNULL)
    assert trace(killed) == trace(whole)
    assert results(killed) == results(whole)
