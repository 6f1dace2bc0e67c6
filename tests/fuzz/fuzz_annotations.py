"""Coverage-guided fuzzing of the readers: `python tests/fuzz/fuzz_annotations.py CORPUS -max_total_time=600`.

Needs `pip install '.[fuzz]'`. The first byte of an input chooses the format; the rest is the file: examples
or a `DataError`.
"""

import json
import logging
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["json", "csv", "mmbert.data.readers", "mmbert.data.examples"]):
    from mmbert.data.examples import read_examples
    from mmbert.data.readers import FORMATS
    from mmbert.errors import DataError

FOLDER = Path(tempfile.mkdtemp())
ROOT = FOLDER / "images"
(ROOT / "sub").mkdir(parents=True)
for name in ("a.jpg", "sub/b.jpg"):
    (ROOT / name).touch()
(FOLDER / "outside.jpg").touch()
(ROOT / "link.jpg").symlink_to(FOLDER / "outside.jpg")
logging.disable(logging.CRITICAL)

SEEDS = {
    "coco": json.dumps(
        {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"id": 1, "image_id": 1, "caption": "x"}]}
    ),
    "karpathy": json.dumps(
        {"images": [{"filename": "b.jpg", "filepath": "sub", "split": "val", "sentences": [{"raw": "x"}]}]}
    ),
    "jsonl": '{"image": "a.jpg", "caption": "x"}\n{"image": "sub/b.jpg", "caption": ["y", ""]}\n',
    "csv": 'image,caption\na.jpg,"x, ""y"""\nsub/b.jpg,z\nlink.jpg,w\n',
}


def seeds(folder: Path) -> None:
    """Writes a right file of each format, for the fuzzer to start from."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, format in enumerate(FORMATS):
        (folder / format).write_bytes(bytes([number]) + SEEDS[format].encode())


def one(data: bytes) -> None:
    """Reads one file."""
    if not data:
        return
    file = FOLDER / "annotations"
    file.write_bytes(data[1:])
    try:
        found = read_examples(list(FORMATS)[data[0] % len(FORMATS)], file, ROOT)
    except DataError as error:
        assert str(error) and error.place
        str(error).encode()
        return
    for example in (e for split in found.values() for e in split):
        assert example.image.is_relative_to(ROOT.resolve()) and example.captions and all(example.captions)


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        seeds(Path(sys.argv[1]))
    atheris.Setup([*sys.argv, "-timeout=5", "-rss_limit_mb=1024", "-max_len=4096"], one)
    atheris.Fuzz()
