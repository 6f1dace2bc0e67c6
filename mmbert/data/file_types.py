"""File types by the first bytes, for messages about files that are no images."""

from collections.abc import Sequence

TEXT_STARTS = (
    (b"version https://git-lfs", "a Git LFS pointer; run 'git lfs pull'"),
    (b"<svg", "SVG"),
    (b"<!doctype html", "HTML, perhaps an error page saved by a download"),
    (b"<html", "HTML, perhaps an error page saved by a download"),
    (b"%!ps", "EPS or PostScript"),
    (b"%pdf", "PDF"),
)
BINARY_STARTS = (
    (b"\xc5\xd0\xd3\xc6", "EPS"),
    (b"\x1f\x8b", "gzip data"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"8BPS", "Photoshop"),
)
IMAGE_STARTS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"RIFF")


def sniff_file_type(content: bytes, formats: Sequence[str]) -> str:
    """Explain why a file is no image, as the reason of a `BadImageError`.

    Args:
        content: the file's bytes, of which the start is used.
        formats: what is accepted, for the message.
    """
    accepted = f"expected {', '.join(formats)}"
    if not content:
        return f"not an image (the file is empty); {accepted}"
    if content.startswith(IMAGE_STARTS):
        return f"truncated or damaged: the start of an image, but a header that cannot be read; {accepted}"
    if content[4:8] == b"ftyp":
        brand = content[8:12].decode("ascii", "replace").strip()
        kind = {"avif": "AVIF", "avis": "AVIF", "heic": "HEIC", "mif1": "HEIF", "heix": "HEIC"}.get(brand)
        return f"not an accepted image (looks like {kind or 'a video'}); {accepted}"
    kind = next((name for start, name in BINARY_STARTS if content.startswith(start)), None)
    if kind is None:
        kind = _text_kind(content[:1024])
    return f"not an image ({f'looks like {kind}' if kind else 'unknown content'}); {accepted}"


def _text_kind(head: bytes) -> str | None:
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for prefix, name in TEXT_STARTS:
        if start.startswith(prefix):
            return name
    if start.startswith((b"<?xml", b"<!--", b"<!doctype")):
        return "SVG" if b"<svg" in start or b"svg" in start[:40] else "HTML" if b"<html" in start else "XML"
    # A text may be cut inside a character, so up to three bytes at the end do not count.
    is_text = any(_is_utf8(head[: len(head) - cut]) for cut in range(4))
    return "text" if is_text and not any(byte < 9 for byte in head) else None


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return bool(data)


def gif_metadata_bytes(content: bytes) -> int:
    """Count the bytes of the extension blocks before a GIF's first frame; 0 if its structure is broken."""
    position = 13 + (3 << (content[10] & 7) + 1 if len(content) > 10 and content[10] & 0x80 else 0)
    start = position
    while content[position : position + 1] == b"!":
        position += 2
        while position < len(content) and content[position]:
            position += content[position] + 1
        position += 1
    return position - start
