"""Decoded images are kept once for all processes of a loader, where they fit."""

import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import MASK, VOCAB, tiny_examples, tiny_processor
from torch import Tensor
from torch.utils.data import DataLoader

from mmbert.data import decoded_images
from mmbert.data.decoded_images import DecodedImages, keep_decoded_images
from mmbert.data.images import BadImageError
from mmbert.data.masking import Masking
from mmbert.data.options import DataOptions
from mmbert.data.pairs import Pairs
from mmbert.data.samples import Augmentation
from mmbert.errors import UsageError


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [e.image for e in tiny_examples(tmp_path, [("a cat",)] * 4)]


class Reads(torch.utils.data.Dataset[Tensor]):
    """Reads kept images, and notes each decoding in a file that all processes append to."""

    def __init__(self, files: list[Path], log: Path):
        self.files, self.log, self.kept = files, log, DecodedImages(files, 16)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        return self.kept.load(self.files[index], self.decode)

    def decode(self, file: Path) -> Tensor:
        with self.log.open("a") as log:
            log.write(f"{file.name}\n")
        return tiny_processor().pixel_values(file)


def test_processes_of_a_loader_decode_each_image_once_in_all_epochs(files: list[Path], tmp_path: Path) -> None:
    data = Reads(files, tmp_path / "log")
    expected = torch.stack([tiny_processor().pixel_values(file) for file in files])
    for _ in range(3):
        loaded = torch.cat([*DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context="fork")])
        assert torch.equal(loaded, expected)
    assert sorted((tmp_path / "log").read_text().split()) == sorted(file.name for file in files)


def test_pickled_images_are_decoded_again_and_bad_ones_are_not_kept(files: list[Path]) -> None:
    kept = DecodedImages(files, 16)
    assert kept.nbytes == 4 * 3 * 16 * 16
    files[0].write_bytes(b"no image")
    for _ in range(2):
        with pytest.raises(BadImageError):
            kept.load(files[0], tiny_processor().pixel_values)
    kept.load(files[1], tiny_processor().pixel_values)
    content = pickle.dumps(kept)
    assert len(content) < kept.nbytes
    files[1].write_bytes(b"no image")
    with pytest.raises(BadImageError):
        pickle.loads(content).load(files[1], tiny_processor().pixel_values)  # noqa: S301 - made here


def split(folder: Path, augmentation: Augmentation | None) -> Pairs:
    masking = Masking(
        mask_token_id=MASK, ordinary_ids=np.arange(5, VOCAB), special_ids=frozenset(range(5)), probability=0.5,
        whole_word=False,
    )  # fmt: skip
    return Pairs(
        tiny_examples(folder, [("a cat",), ("a dog",), ("two birds",)]), tiny_processor(), masking, seed=0,
        augmentation=augmentation,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("requested", "free", "kept"),
    [(None, 4 * 2304, True), (None, 4 * 2304 - 1, False), (True, 2304, True), (False, 1 << 40, False)],
)
def test_images_are_kept_where_they_fit(
    requested: bool | None, free: int, kept: bool, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO, "mmbert")
    monkeypatch.setattr(decoded_images, "free_memory", lambda device: free)
    plain, cropped = split(tmp_path, None), split(tmp_path, Augmentation(crop=0.5))
    before = plain[0, 1]
    options = DataOptions(images_in_memory=requested, num_workers=0)
    keep_decoded_images([plain, cropped], options, side=16)
    assert (plain.decoded is not None) is kept and cropped.decoded is None
    assert bool(caplog.text) is (requested is not False)
    for _ in range(2):
        assert torch.equal(plain[0, 1].pixel_values, before.pixel_values)
        assert torch.equal(plain[0, 1].wrong_pixel_values, before.wrong_pixel_values)


def test_requested_images_that_do_not_fit_give_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoded_images, "free_memory", lambda device: 2303)
    options = DataOptions(images_in_memory=True, num_workers=0)
    with pytest.raises(UsageError, match=r"images_in_memory=true: 3 images of 16 x 16 pixels, 0\.00 GB, but"):
        keep_decoded_images([split(tmp_path, None)], options, side=16)
