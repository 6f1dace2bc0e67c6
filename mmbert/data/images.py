"""Load images from paths, bytes, Pillow images or arrays as upright 8-bit RGB."""

import os
import stat
import warnings
from collections.abc import Iterable, Mapping
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageFile

# Importing the plugins registers them; Pillow would otherwise import all its formats at the first TIFF.
from PIL import BmpImagePlugin, GifImagePlugin, JpegImagePlugin  # noqa: F401  # isort: skip
from PIL import PngImagePlugin, TiffImagePlugin, WebPImagePlugin  # noqa: F401  # isort: skip

from mmbert.data.file_types import gif_metadata_bytes, sniff_file_type
from mmbert.errors import DataError, printable

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 64_000_000
MAX_FILE_BYTES = 1 << 28
MAX_GIF_METADATA = 1 << 20
RUN_LENGTHS = (1, 2)  # compression of a BMP: RLE8, RLE4
MAX_RUN_LENGTH_PIXELS = 8_000_000
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> transposition that turns the image upright."""

ImageSource = str | os.PathLike[str] | bytes | bytearray | Image.Image | np.ndarray
"""Path, file content, Pillow image or array; see `load_image`."""


class BadImageError(DataError):
    """Error for an image that cannot be used.

    Args:
        path: the file, or "<bytes>", "<PIL image>", "<array>".
        reason: short reason.
    """

    def __init__(self, path: str, reason: str = "") -> None:
        super().__init__(path, reason)
        # Only these two, so that pickling and DataLoader workers can make the error again.
        self.args = (path, reason)
        self.path = path
        self.reason = reason


def load_image(
    source: ImageSource, *, max_pixels: int = MAX_PIXELS, background: tuple[int, int, int] = (255, 255, 255)
) -> Image.Image:
    """Load one image as 8-bit RGB.

    EXIF orientation is applied, transparent parts show `background`, 16-bit grey keeps its high byte,
    floating-point values in [0, 1] are scaled to 0-255, animations and multi-page files give their first
    frame. Colour profiles are ignored. The result carries no metadata.

    Args:
        source: path, file content, Pillow image, or array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of
            bool, uint8, uint16 or of floats in [0, 1].
        max_pixels: largest width x height; checked on the header, before any pixel is decoded.
        background: RGB colour behind transparent parts.

    Raises:
        BadImageError: it is no regular file, no image in one of `FORMATS`, too large, truncated, or of a
            kind of pixel with no sure meaning as RGB.
        TypeError: `source` is something else.
    """
    if isinstance(source, np.ndarray):
        name, pixels = "<array>", _from_array
    elif isinstance(source, Image.Image):
        name, pixels = "<PIL image>", _from_pillow
    elif isinstance(source, bytes | bytearray):
        name, pixels = "<bytes>", _from_bytes
    elif isinstance(source, (str, os.PathLike)):
        name, pixels = os.fspath(source), _from_file
    else:
        hint = ""
        if hasattr(source, "detach"):  # a torch.Tensor, whose channels may come first or last
            hint = "; make it an array (H, W, 3), as in tensor.permute(1, 2, 0).numpy(), and a batch a list of these"
        elif isinstance(source, list | tuple):
            hint = "; give one image here"
        raise TypeError(f"source is a {type(source).__name__}; expected a path, bytes, Pillow image or array{hint}")
    try:
        return pixels(source, max_pixels, background)  # type: ignore[arg-type]
    except _Unusable as error:
        raise BadImageError(name, str(error)) from error.__cause__


def as_image_list(images: Any) -> tuple[list[Any], bool]:
    """Convert one image or any iterable of images to a list.

    Args:
        images: what `load_image` takes, or None; or several of these: a list, tuple, generator, column of a
            data set, pandas Series, array of names, array (N, H, W, C), or any object with a length and items.

    Returns:
        The images, and whether a single one was given.
    """
    if isinstance(images, np.ndarray):
        is_single = images.dtype.kind not in "OUS" and images.ndim < 4
    else:
        single_types = (str, os.PathLike, bytes, bytearray, Image.Image, Mapping)
        is_single = isinstance(images, single_types) or hasattr(images, "detach") or not is_iterable(images)
    if is_single:
        return [images], True
    return [*images], False  # pyright: ignore[reportGeneralTypeIssues]


def is_iterable(value: Any) -> bool:
    """Return whether `iter` takes a value, be it by `__iter__` or, as for many data sets, by length and items."""
    return isinstance(value, Iterable) or (hasattr(value, "__len__") and hasattr(value, "__getitem__"))


def read_content(path: str | os.PathLike[str]) -> bytes:
    """Read the bytes of an image file, to be decoded by `load_image`.

    Raises:
        BadImageError: it is no regular file, larger than `MAX_FILE_BYTES`, or cannot be read.
    """
    try:
        return _content(path)
    except _Unusable as error:
        raise BadImageError(os.fspath(path), str(error)) from error.__cause__


class _Unusable(ValueError):
    """Reason why an image cannot be used; `load_image` adds the name."""


def _from_file(path: str | os.PathLike[str], max_pixels: int, background: tuple[int, int, int]) -> Image.Image:
    return _from_bytes(_content(path), max_pixels, background)


def _content(path: str | os.PathLike[str]) -> bytes:
    try:
        # Without O_NONBLOCK, opening a named pipe waits for a writer for ever.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise _Unusable("no such file") from None
    except (OSError, ValueError) as error:  # ValueError: NUL or a lone surrogate in the name
        raise _Unusable(f"cannot be opened ({printable(getattr(error, 'strerror', None) or str(error))})") from None
    try:
        info = os.fstat(handle)
        if not stat.S_ISREG(info.st_mode):
            raise _Unusable("not a regular file")
        if info.st_size > MAX_FILE_BYTES:
            raise _Unusable(f"{info.st_size:,} bytes; at most {MAX_FILE_BYTES:,} are read")
        with open(handle, "rb", closefd=False) as file:
            return file.read()
    except OSError as error:
        raise _Unusable(f"cannot be read ({error.strerror})") from error
    finally:
        os.close(handle)


def _from_bytes(content: bytes, max_pixels: int, background: tuple[int, int, int]) -> Image.Image:
    if content[:4] == b"GIF8" and gif_metadata_bytes(content) > MAX_GIF_METADATA:
        # Pillow joins comment blocks in quadratic time: ten megabytes of them take minutes.
        raise _Unusable(f"more than {MAX_GIF_METADATA:,} bytes before the first frame of a GIF")
    try:
        with warnings.catch_warnings():  # our own bound is lower, with a better message
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(BytesIO(content), formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise _Unusable(sniff_file_type(content, FORMATS)) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _Unusable(f"too large: {error} (at most {max_pixels:,} pixels are read)") from None
    except Exception as error:
        # The decoders raise nearly anything on damaged data; whatever it is, the image is at fault.
        raise _Unusable(f"truncated or damaged ({_short(error)})") from error
    with image:
        if image.format == "BMP" and image.info.get("compression") in RUN_LENGTHS:
            # Pillow decodes these in Python: a kilobyte that claims 64 million pixels takes 8 seconds.
            max_pixels = min(max_pixels, MAX_RUN_LENGTH_PIXELS)
        return _from_pillow(image, max_pixels, background)


def _from_pillow(image: Image.Image, max_pixels: int, background: tuple[int, int, int]) -> Image.Image:
    width, height = image.size
    if width * height > max_pixels:
        raise _Unusable(f"too large: {width}x{height} pixels, at most {max_pixels:,} are read; make it smaller")
    if width < 1 or height < 1:
        raise _Unusable(f"no pixels ({width}x{height})")
    try:
        image.load()
    except Exception as error:  # as above: the image is at fault
        raise _Unusable(f"truncated or damaged {image.format or 'image'} ({_short(error)})") from error
    rgb = _to_rgb(image, background)
    turn = UPRIGHT.get(_orientation(image))
    rgb = rgb.transpose(turn) if turn is not None else rgb
    if rgb is image or isinstance(rgb, ImageFile.ImageFile):
        rgb = rgb.copy()  # never the caller's own image, and no open file
    rgb.info = {}  # or a later exif_transpose would turn the image once more
    return rgb


def _from_array(array: np.ndarray, max_pixels: int, background: tuple[int, int, int]) -> Image.Image:
    shape = "x".join(map(str, array.shape))
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or 0 in array.shape:
        hint = "; make a batch a list of images, list(array)" if array.ndim == 4 else ""
        raise _Unusable(f"an array of shape {shape}; expected (H, W), (H, W, 1), (H, W, 3) or (H, W, 4){hint}")
    if array.shape[0] * array.shape[1] > max_pixels:
        raise _Unusable(f"too large: an array of {shape}, at most {max_pixels:,} pixels are read")
    if array.dtype == np.uint16:
        array = (array >> 8).astype(np.uint8)
    elif array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif np.issubdtype(array.dtype, np.floating):
        array = _scale_unit(array)
    elif array.dtype != np.uint8:
        raise _Unusable(f"an array of {array.dtype}; expected bool, uint8, uint16 or floats in [0, 1]")
    return _from_pillow(Image.fromarray(np.ascontiguousarray(array)), max_pixels, background)


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Convert a loaded image of any mode."""
    mode = image.mode
    if mode.startswith("I;16"):
        # convert("RGB") would clip at 255 and give a white image.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if mode == "F":
        return Image.fromarray(_scale_unit(np.asarray(image))).convert("RGB")
    if mode == "I":
        raise _Unusable("32-bit whole-number pixels, whose range is unknown; save it with 8 or 16 bits")
    try:
        if mode in ("La", "RGBa"):
            image, mode = image.convert(mode[:-1] + "A"), mode[:-1] + "A"
        if mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
            # Without the test, a large image would be held three times.
            rgba = image if mode == "RGBA" else image.convert("RGBA")
            alpha = rgba.getchannel("A")
            if alpha.getextrema() != (255, 255):
                canvas = Image.new("RGB", rgba.size, background)
                canvas.paste(rgba, mask=alpha)
                return canvas
            image = rgba
        return image if image.mode == "RGB" else image.convert("RGB")
    except (ValueError, KeyError, OSError) as error:
        raise _Unusable(f"pixels of mode {mode}, which cannot be made RGB ({_short(error)})") from error


def _scale_unit(values: np.ndarray) -> np.ndarray:
    """Convert floats in [0, 1] to uint8; any other range is ambiguous."""
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 1):  # also false for NaN
        raise _Unusable(f"floating-point pixels from {low:g} to {high:g}; only [0, 1] has a sure meaning")
    return np.rint(values * 255).astype(np.uint8)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # damaged EXIF raises nearly anything; the pixels are good all the same
        return 1


def _short(error: Exception) -> str:
    return printable(f"{type(error).__name__}: {error}"[:120])
