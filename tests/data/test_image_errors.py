"""Files that are no image, broken or hostile: one `BadImageError` with a short reason, without delay."""

import os
import pickle
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from image_bytes import PHOTO, chunk, png, saved
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from mmbert.data.images import BadImageError, load_image


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not an image (the file is empty)"),
        (b"<!DOCTYPE html><html><body>404</body>", "not an image (looks like HTML"),
        (b"\n <HTML lang=en>", "not an image (looks like HTML"),
        (
            b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>',
            "not an image (looks like SVG)",
        ),
        ("a caption, not an image: \u00e9".encode(), "not an image (looks like text)"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9", "looks like EPS"),
        (b"version https://git-lfs.github.com/spec/v1\n", "looks like a Git LFS pointer"),
        (b"\0\0\0\x20ftypavif\0\0\0\0", "looks like AVIF"),
        (bytes(range(200, 256)), "not an image (unknown content)"),
        (b"\xff\xd8\xff\xe0" + bytes(range(256)), "truncated"),
    ],
)
def test_what_is_no_image_is_named(data: bytes, reason: str) -> None:
    with pytest.raises(BadImageError) as error:
        load_image(data)
    assert reason in error.value.reason
    assert str(error.value).startswith("<bytes>: ")


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_cut_files_are_truncated(format: str, part: float) -> None:
    data = saved(NOISE, format)
    with pytest.raises(BadImageError, match="truncated"):
        load_image(data[: int(len(data) * part)])


def test_damage_is_reported_as_such() -> None:
    jpeg = saved(NOISE, "JPEG")
    rubbish = np.random.default_rng(1).bytes(3000)
    for data in (
        jpeg[:-2],
        png(64, 64, chunk(b"IDAT", rubbish)),
        png(64, 64, rubbish),
        saved(NOISE, "PNG")[:-40],
    ):
        with pytest.raises(BadImageError, match="truncated"):
            load_image(data)


def test_random_damage_raises_nothing_else() -> None:
    rng = np.random.default_rng(2)
    for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        good = np.frombuffer(saved(NOISE.resize((16, 16)), format), np.uint8)
        for _ in range(60):
            bad = good.copy()
            bad[rng.integers(0, min(len(bad), 400), 3)] = rng.integers(0, 256, 3)
            try:
                load_image(bad.tobytes(), max_pixels=1_000_000)
            except BadImageError as error:
                assert error.reason


def test_pixel_cap_is_checked_before_decoding() -> None:
    started = time.perf_counter()
    for width, height in ((12_000, 12_000), (60_000, 60_000)):
        with pytest.raises(BadImageError, match="too large"):
            load_image(png(width, height, chunk(b"IDAT", b"")))
    with pytest.raises(BadImageError, match=r"too large: 48x40 pixels, at most 1,919"):
        load_image(saved(PHOTO, "PNG"), max_pixels=48 * 40 - 1)
    assert load_image(saved(PHOTO, "PNG"), max_pixels=48 * 40).size == (48, 40)
    assert time.perf_counter() - started < 1


def test_no_pixels_is_an_error() -> None:
    with pytest.raises(BadImageError):
        load_image(png(0, 10, chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b"")))


def test_bombs_in_metadata_are_fast_errors() -> None:
    text = chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(bytes(50_000_000), 9))
    blocks = b"!\xfe" + (b"\xff" + b"x" * 255) * 40_000 + b"\0"
    gif = saved(PHOTO, "GIF")
    position = gif.index(b",", 13 + 3 * 2 ** ((gif[10] & 7) + 1))
    started = time.perf_counter()
    for data in (png(8, 8, text), gif[:position] + blocks + gif[position:]):
        with pytest.raises(BadImageError):
            load_image(data)
    assert time.perf_counter() - started < 1


def run_length_bmp(width: int, height: int) -> bytes:
    """Each row: the first pixel is colour 200, the rest 0, which the end of a row stands for."""
    rows = b"\1\xc8\0\0" * height + b"\0\1"
    palette = b"".join(bytes((i, i, i, 0)) for i in range(256))
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(rows), 0, 0, 256, 0)
    start = 14 + len(header) + len(palette)
    return struct.pack("<2sIHHI", b"BM", start + len(rows), 0, 0, start) + header + palette + rows


def test_run_lengths_may_not_claim_many_pixels() -> None:
    small = np.asarray(load_image(run_length_bmp(5, 3)))
    assert small.shape == (3, 5, 3) and (small[:, 0] == 200).all() and (small[:, 1:] == 0).all()
    started = time.process_time()
    for width, height in ((32_000_000, 2), (8000, 8000)):
        with pytest.raises(BadImageError, match=r"too large: .* at most 8,000,000"):
            load_image(run_length_bmp(width, height))
    assert time.process_time() - started < 0.5


def test_what_is_no_regular_file_is_an_error_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    for name, reason in (
        ("pipe.jpg", "not a regular file"),
        (".", "not a regular file"),
        ("loop.jpg", "cannot be opened"),
        ("missing.jpg", "no such file"),
        ("nul\0.jpg", "cannot be opened"),
        ("half\ud800.jpg", "cannot be opened"),
        ("pipe.jpg/x", "cannot be opened"),
    ):
        with pytest.raises(BadImageError, match=reason) as error:
            load_image(str(tmp_path / name))
        str(error.value).encode()
        assert "\n" not in str(error.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_file_without_permission_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(saved(PHOTO, "PNG"))
    (tmp_path / "a.png").chmod(0)
    with pytest.raises(BadImageError, match="Permission"):
        load_image(tmp_path / "a.png")


class _Broken(Dataset[int]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        load_image(b"")
        return 0


def test_error_survives_pickling_and_a_loader_worker() -> None:
    error = pickle.loads(pickle.dumps(BadImageError("a.jpg", "truncated")))  # noqa: S301
    assert (error.path, error.reason, str(error)) == ("a.jpg", "truncated", "a.jpg: truncated")
    with pytest.raises(BadImageError, match="the file is empty"):
        next(iter(DataLoader(_Broken(), num_workers=1)))
