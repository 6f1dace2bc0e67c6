"""Pictures of every kind: right pixels, or one BadImageError that says why."""

import io
import os
import pickle
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from mmbert.data.images import BadImageError, load_image

PHOTO = Image.fromarray(
    np.stack(np.meshgrid(np.arange(0, 240, 5), np.arange(0, 200, 5)), -1)
    .sum(-1, keepdims=True)
    .repeat(3, -1)
    .clip(0, 255)
    .astype(np.uint8)
)
"""A smooth 48x40 picture: lossy formats keep it within a few levels."""


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks)


def distance(image: Image.Image, other: Image.Image) -> int:
    assert image.mode == "RGB" and image.size == other.size
    return int(np.abs(np.asarray(image, int) - np.asarray(other.convert("RGB"), int)).max())


@pytest.mark.parametrize(
    ("data", "tolerance"),
    [
        (saved(PHOTO, "PNG"), 0),
        (saved(PHOTO, "BMP"), 0),
        (saved(PHOTO, "WEBP", lossless=True), 0),
        (saved(PHOTO, "TIFF"), 0),
        (saved(PHOTO, "TIFF", compression="tiff_lzw"), 0),
        (saved(PHOTO.convert("L"), "PNG"), 0),
        (saved(PHOTO.convert("RGBA"), "PNG"), 0),
        (saved(PHOTO, "GIF"), 8),
        (saved(PHOTO, "JPEG", quality=95), 4),
        (saved(PHOTO, "JPEG", quality=95, progressive=True), 4),
        (saved(PHOTO, "JPEG", quality=95) + b"junk" * 256, 4),
        (saved(PHOTO.convert("CMYK"), "JPEG", quality=95), 3),
        (saved(PHOTO.convert("CMYK"), "TIFF"), 0),
        (saved(PHOTO.convert("YCbCr"), "TIFF"), 3),
    ],
)
def test_formats_give_the_same_picture(data: bytes, tolerance: int) -> None:
    assert distance(load_image(data), PHOTO) <= tolerance


def test_one_bit_and_palette_are_exact() -> None:
    one_bit = PHOTO.convert("1")
    assert distance(load_image(saved(one_bit, "PNG")), one_bit) == 0
    palette = PHOTO.quantize(16)
    assert distance(load_image(saved(palette, "PNG")), palette) == 0


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_parts_show_the_background(mode: str) -> None:
    image = Image.new(mode, (4, 2), (90, 0) if mode == "LA" else (90, 90, 90, 0))
    image.putpixel((0, 0), (90, 255) if mode == "LA" else (90, 90, 90, 255))
    image.putpixel((1, 0), (0, 51) if mode == "LA" else (0, 0, 0, 51))  # 20 % black
    pixels = np.asarray(load_image(saved(image, "PNG"), background=(255, 100, 0)))
    assert pixels[0, 0].tolist() == [90, 90, 90]
    assert pixels[0, 1].tolist() == [204, 80, 0]
    assert pixels[1, 3].tolist() == [255, 100, 0]
    assert np.asarray(load_image(image))[1, 3].tolist() == [255, 255, 255]


def test_palette_and_colour_key_transparency_show_the_background() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 210, 220])
    palette.putpixel((1, 0), 1)
    for format in ("PNG", "GIF"):
        pixels = np.asarray(load_image(saved(palette, format, transparency=0)))
        assert pixels.tolist() == [[[255, 255, 255], [200, 210, 220]]]
    grey = Image.fromarray(np.array([[0, 7]], np.uint8))
    assert np.asarray(load_image(saved(grey, "PNG", transparency=0)))[0, :, 0].tolist() == [255, 7]


def test_16_bit_grey_keeps_the_high_byte() -> None:
    values = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    for data in (saved(Image.fromarray(values), "PNG"), saved(Image.fromarray(values), "TIFF")):
        assert np.asarray(load_image(data))[0, :, 0].tolist() == [0, 0, 1, 128, 255]
    assert np.asarray(load_image(values))[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_float_tiff_is_scaled_only_from_zero_to_one() -> None:
    unit = np.array([[0, 0.5, 1]], np.float32)
    assert np.asarray(load_image(saved(Image.fromarray(unit), "TIFF")))[0, :, 2].tolist() == [0, 128, 255]
    for bad in (unit * 255, unit - 1, np.array([[np.nan, 0.5]], np.float32)):
        with pytest.raises(BadImageError, match=r"floating-point pixels .* only \[0, 1\]"):
            load_image(saved(Image.fromarray(bad), "TIFF"))


def test_32_bit_whole_numbers_are_refused_by_name() -> None:
    with pytest.raises(BadImageError, match="32-bit whole-number"):
        load_image(saved(Image.fromarray(np.array([[70_000]], np.int32)), "TIFF"))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8, 99])
def test_exif_orientation_gives_the_upright_picture(format: str, orientation: int) -> None:
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # transpose methods that store it turned
    stored = PHOTO if orientation in (1, 99) else PHOTO.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(format, {})
    loaded = load_image(saved(stored, format, exif=exif.tobytes(), **options))
    assert distance(loaded, PHOTO) <= (4 if format == "JPEG" else 0)
    assert loaded.getexif().get(0x0112) is None


def test_garbage_exif_is_ignored() -> None:
    for exif in (b"Exif\0\0garbage", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0"):
        assert distance(load_image(saved(PHOTO, "JPEG", quality=95, exif=exif)), PHOTO) <= 4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animation_gives_its_first_frame(format: str) -> None:
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    frames = [Image.new("RGB", (8, 8), colour) for colour in colours]
    options = {"lossless": True} if format == "WEBP" else {}
    data = saved(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert distance(load_image(data), frames[0]) == 0


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (7, 7)])
def test_odd_sizes_load(size: tuple[int, int]) -> None:
    assert load_image(saved(Image.new("RGB", size), "PNG")).size == size


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not an image (the file is empty)"),
        (b"<!DOCTYPE html><html><body>404</body>", "not an image (looks like HTML"),
        (b"\n <HTML lang=en>", "not an image (looks like HTML"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "not an image (looks like SVG)"),
        ("a caption, not a picture: \u00e9".encode(), "not an image (looks like text)"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9", "looks like EPS"),
        (b"version https://git-lfs.github.com/spec/v1\n", "looks like a Git LFS pointer"),
        (b"\0\0\0\x20ftypavif\0\0\0\0", "looks like AVIF"),
        (bytes(range(200, 256)), "not an image (unknown content)"),
        (b"\xff\xd8\xff\xe0" + bytes(range(256)), "truncated"),
    ],
)
def test_what_is_no_picture_is_named(data: bytes, reason: str) -> None:
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
    for data in (jpeg[:-2], png(64, 64, chunk(b"IDAT", rubbish)), png(64, 64, rubbish), saved(NOISE, "PNG")[:-40]):
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


def test_no_pixels_is_refused() -> None:
    with pytest.raises(BadImageError):
        load_image(png(0, 10, chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b"")))


def test_bombs_in_metadata_are_refused_fast() -> None:
    text = chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(bytes(50_000_000), 9))
    blocks = b"!\xfe" + (b"\xff" + b"x" * 255) * 40_000 + b"\0"
    gif = saved(PHOTO, "GIF")
    position = gif.index(b",", 13 + 3 * 2 ** ((gif[10] & 7) + 1))
    started = time.perf_counter()
    for data in (png(8, 8, text), gif[:position] + blocks + gif[position:]):
        with pytest.raises(BadImageError):
            load_image(data)
    assert time.perf_counter() - started < 1


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
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
def test_file_without_permission_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(saved(PHOTO, "PNG"))
    (tmp_path / "a.png").chmod(0)
    with pytest.raises(BadImageError, match="Permission"):
        load_image(tmp_path / "a.png")


def test_strange_names_load(tmp_path: Path) -> None:
    for name in ("new\nline.png", "\U0001f408.png", os.fsdecode(b"byte\xff.png")):
        (tmp_path / name).write_bytes(saved(PHOTO, "PNG"))
        assert distance(load_image(tmp_path / name), PHOTO) == 0


def test_arrays_and_pillow_images_load() -> None:
    array = np.asarray(PHOTO)
    for source in (array, array[:, :, 0], array[:, :, :1], array / 255, array[:, ::-1][:, ::-1], PHOTO):
        assert distance(load_image(source), PHOTO) == 0
    assert load_image(PHOTO) is not PHOTO
    assert np.asarray(load_image(np.eye(2, dtype=bool)))[0, :, 0].tolist() == [255, 0]
    for bad in (array.transpose(2, 0, 1), np.zeros((0, 4), np.uint8), array.astype(int), array * 1.0, array[0, 0]):
        with pytest.raises(BadImageError, match="array|floating"):
            load_image(bad)
    with pytest.raises(TypeError, match="NoneType"):
        load_image(None)  # type: ignore[arg-type]


def test_pillow_globals_are_untouched() -> None:
    from PIL import ImageFile

    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    load_image(saved(PHOTO, "PNG"))
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES) == before


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


def test_real_pictures_load(shared: Path) -> None:
    for file in sorted((shared / "data" / "coco_mini" / "images").glob("*.jpg"))[:20]:
        with Image.open(file) as image:
            assert distance(load_image(file), image) == 0
