"""Coverage-guided fuzzing of the image decoder: `python tests/fuzz/fuzz_images.py CORPUS -max_total_time=600`.

Needs `pip install '.[fuzz]'`. Any bytes must give an RGB image or a `BadImageError`, within 2 s and 512 MB.
"""

import sys
from io import BytesIO
from pathlib import Path

import atheris
from PIL import Image

with atheris.instrument_imports(include=["PIL", "mmbert.data"]):
    from mmbert.data.images import BadImageError, load_image


def seeds(folder: Path) -> None:
    """Writes one small image of each format and mode, for the fuzzer to start from."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = [("PNG", m) for m in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")] + [("TIFF", "F"), ("TIFF", "CMYK")]
    for format, mode in [*kinds, *((f, "RGB") for f in ("JPEG", "WEBP", "GIF", "BMP", "TIFF"))]:
        buffer = BytesIO()
        Image.new(mode, (9, 7)).save(buffer, format)
        (folder / f"{format}-{mode.replace(';', '')}").write_bytes(buffer.getvalue())


def one(data: bytes) -> None:
    """Decodes one input; the cap on pixels keeps it fast, Pillow's decoders in Python, slow when traced, included."""
    try:
        image = load_image(data, max_pixels=1 << 18)
    except BadImageError as error:
        assert error.reason and error.reason.isprintable()
        return
    assert image.mode == "RGB" and image.width > 0 and image.height > 0


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        seeds(Path(sys.argv[1]))
    atheris.Setup([*sys.argv, "-timeout=2", "-rss_limit_mb=1024", "-max_len=8192"], one)
    atheris.Fuzz()
