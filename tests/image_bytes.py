"""Images as bytes, right and wrong, made in the test."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

PHOTO = Image.fromarray(
    np.stack(np.meshgrid(np.arange(0, 240, 5), np.arange(0, 200, 5)), -1)
    .sum(-1, keepdims=True)
    .repeat(3, -1)
    .clip(0, 255)
    .astype(np.uint8)
)
"""A smooth 48x40 image: lossy formats keep it within a few levels."""


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
