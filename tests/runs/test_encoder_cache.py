"""Runs with an encoder cache: the same numbers as without, and nothing computed twice."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from interrupted import fit, killed, results, trace
from tiers import tier

from mmbert.data import encoder_cache
from mmbert.data.row_store import INDEX, META
from mmbert.model.encoders import ImageEncoder

# With 64 px an image has 17 tokens; of 5, torch computes attention with bits that depend on the place in the batch.
PLAIN = [
    *("--data.crop=1", "--data.flip=false", "--trainer.max_epochs=2"),
    *("--model.image_layers=3", "--model.image_size=64"),
]
KILLS = tier(2, 40)  # half of them while filling


def stores(root: Path) -> list[Path]:
    return sorted(file.parent for file in root.rglob(META))


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batch sizes of all calls of the whole image encoder."""
    calls: list[int] = []
    original = ImageEncoder.forward

    def counting(self: ImageEncoder, pixel_values: torch.Tensor, **options: object) -> object:
        calls.append(len(pixel_values))
        return original(self, pixel_values, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ImageEncoder, "forward", counting)
    return calls


@pytest.mark.parametrize(
    ("fusion", "frozen", "dtype"),
    [("hybrid_bridge", "2", "32-true"), ("late", "all", "32-true"), ("early", "2", "bf16-mixed")][: tier(1, 3)],
)
def test_cache_changes_no_loss_and_no_metric(
    tiny: list[str], tmp_path: Path, fusion: str, frozen: str, dtype: str
) -> None:
    options = [*PLAIN, f"--model.fusion={fusion}", f"--optim.freeze_image={frozen}", f"--trainer.precision={dtype}"]
    fit(tiny, tmp_path, "--name=run", *options, "--model.fusion_layers=2", "--data.cache=null")
    fit(tiny, tmp_path, "--name=cached", *options, "--model.fusion_layers=2", f"--data.cache={tmp_path}/cache")
    assert len(stores(tmp_path / "cache")) == 1
    assert trace(tmp_path, "cached") == trace(tmp_path)
    assert results(tmp_path, "cached") == results(tmp_path)


def test_second_run_computes_no_image_again(
    tiny: list[str], tmp_path: Path, encoded: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mmbert")
    options = [*PLAIN, "--optim.freeze_image=all"]
    fit(tiny, tmp_path, "--name=run", *options)
    images = 64 + 16 + 32  # test_seen and test_unseen are parts of test
    assert f"once: {images} images x 2 kB" in caplog.text, "the size is announced"
    assert str(tmp_path / "encoder_cache") in caplog.text
    encoded.clear()
    fit(tiny, tmp_path, "--name=other", *options, "--optim.lr=1e-3")
    assert encoded == [1], "one image tells the shape"
    assert len(stores(tmp_path)) == 1


def test_run_resumes_without_its_cache(tiny: list[str], tmp_path: Path) -> None:
    options = [*PLAIN, "--optim.freeze_image=all"]
    fit(tiny, tmp_path, "--name=run", *options)
    killed(lambda: fit(tiny, tmp_path, "--name=killed", *options), after_batch=6)
    fit(tiny, tmp_path, "--name=killed", *options, "--resume=auto", "--data.cache=null")
    assert trace(tmp_path, "killed") == trace(tmp_path)
    assert results(tmp_path, "killed") == results(tmp_path)


def test_random_kills_while_filling_and_training_change_nothing(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_cache, "BYTES_PER_WRITE", 1)  # a write for every batch
    options = [*PLAIN, "--optim.freeze_image=all"]
    fit(tiny, tmp_path / "whole", "--name=run", *options)
    rng, kills, root = np.random.default_rng(0), 0, tmp_path / "killed"
    while kills < KILLS:
        batch = int(rng.integers(1, 9))
        if kills % 2:
            killed(lambda root=root: fit(tiny, root, "--name=run", *options, "--resume=auto"), after_batch=batch)
        else:
            for store in stores(root):
                cut_index(store, keep=int(rng.integers(0, 40)))
            dies_in_fill(lambda root=root: fit(tiny, root, "--name=run", *options, "--resume=auto"), after=batch)
        kills += 1
        if kills % 4 == 0 or kills == KILLS:
            fit(tiny, root, "--name=run", *options, "--resume=auto")
            assert trace(root) == trace(tmp_path / "whole")
            assert results(root) == results(tmp_path / "whole")
            root = tmp_path / f"killed-{kills}"


def cut_index(store: Path, *, keep: int) -> None:
    """Makes a store as it is within a fill: fewer records, the last one torn."""
    file = store / INDEX
    file.write_bytes(file.read_bytes()[: keep * 24 + 7])
    (store / "files.json").unlink(missing_ok=True)


def dies_in_fill(run: Callable[[], None], *, after: int) -> None:
    """Runs in a process of its own that dies in a write of the cache, between the row and its record."""
    from mmbert.data import row_store

    original, seen = row_store._write_at, [0]

    def dying(file: Path, offset: int, content: np.ndarray) -> None:
        original(file, offset, content)
        seen[0] += 1
        if seen[0] == after:
            os._exit(9)

    row_store._write_at = dying
    try:
        killed(run, after_batch=10**9)
    finally:
        row_store._write_at = original


def test_run_that_reads_rounded_numbers_resumes_with_the_cache_only(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--name=run", *PLAIN, "--optim.freeze_image=all", "--trainer.precision=32-true"]
    fit(tiny, tmp_path / "whole", *options, "--data.cache_dtype=bf16")
    killed(lambda: fit(tiny, tmp_path / "run", *options, "--data.cache_dtype=bf16"), after_batch=3)
    with pytest.raises(SystemExit):
        fit(tiny, tmp_path / "run", *options, "--data.cache_dtype=bf16", "--data.cache=null", "--resume=auto")
    assert "encoder cache (data.cache) was 'bf16' and is 'none'" in capsys.readouterr().err
    fit(tiny, tmp_path / "run", *options, "--data.cache_dtype=bf16", "--resume=auto")
    assert trace(tmp_path / "run") == trace(tmp_path / "whole")
