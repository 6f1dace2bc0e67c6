"""Images of every kind: the right pixels, upright, in 8-bit RGB."""

import io
import os
from pathlib import Path

import numpy as np
import PIL
import pytest
from image_bytes import PHOTO, distance, saved
from PIL import Image

from mmbert.data.images import BadImageError, load_image


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
    ],
)
def test_formats_give_the_same_image(data: bytes, tolerance: int) -> None:
    assert distance(load_image(data), PHOTO) <= tolerance


def test_ycbcr_tiff_is_read_or_named() -> None:
    """Pillow 12, which the demo's gradio asks for, takes uncompressed ones for truncated."""
    data = saved(PHOTO.convert("YCbCr"), "TIFF")
    if int(PIL.__version__.split(".")[0]) < 13:
        with pytest.raises(BadImageError, match="truncated"):
            load_image(data)
    else:
        assert distance(load_image(data), PHOTO) <= 3


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


def test_32_bit_whole_numbers_are_errors() -> None:
    with pytest.raises(BadImageError, match="32-bit whole-number"):
        load_image(saved(Image.fromarray(np.array([[70_000]], np.int32)), "TIFF"))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8, 99])
def test_exif_orientation_gives_the_upright_image(format: str, orientation: int) -> None:
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
    for bad in (
        array.transpose(2, 0, 1),
        np.zeros((0, 4), np.uint8),
        array.astype(int),
        array * 1.0,
        array[0, 0],
    ):
        with pytest.raises(BadImageError, match=r"array|floating"):
            load_image(bad)
    with pytest.raises(TypeError, match="NoneType"):
        load_image(None)  # type: ignore[arg-type]


def test_pillow_globals_are_untouched() -> None:
    from PIL import ImageFile

    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    load_image(saved(PHOTO, "PNG"))
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES) == before


def test_real_images_load(shared: Path) -> None:
    for file in sorted((shared / "data" / "coco_mini" / "images").glob("*.jpg"))[:20]:
        with Image.open(file) as image:
            assert distance(load_image(file), image) == 0


def test_phone_images_with_a_second_one_or_as_rotated_tiff_are_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), "red")
    image.paste((0, 0, 255), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    second = image.resize((20, 10))
    files = {
        "m.jpg": saved(image, "MPO", save_all=True, append_images=[second], exif=exif, quality=95),
        "t.tif": saved(image, "TIFF", exif=exif),
        "z.tif": saved(image, "TIFF", exif=exif, compression="tiff_lzw"),
    }
    assert Image.open(io.BytesIO(files["m.jpg"])).format == "MPO"
    upright = np.asarray(image.transpose(Image.Transpose.ROTATE_270)).astype(int)
    for content in files.values():
        loaded = load_image(content)
        assert loaded.size == (20, 40) and np.abs(np.asarray(loaded).astype(int) - upright).mean() < 6
