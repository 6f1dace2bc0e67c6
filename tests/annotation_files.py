"""Small annotation files to read and to break."""

import json
from pathlib import Path
from typing import Any

import pytest

from mmbert.data.examples import Example, read_examples
from mmbert.errors import DataError

COCO = {
    "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 9, "file_name": "sub/b.jpg"}],
    "annotations": [
        {"id": 1, "image_id": 9, "caption": " A bee. "},
        {"id": 2, "image_id": 7, "caption": "An ant."},
        {"id": 3, "image_id": 9, "caption": "Another bee."},
    ],
}
KARPATHY = {
    "images": [
        {"filename": "a.jpg", "split": "train", "sentences": [{"raw": "An ant."}, {"raw": "Small. "}]},
        {"filename": "b.jpg", "filepath": "sub", "split": "restval", "sentences": [{"raw": "A bee."}]},
        {"filename": "c.jpg", "split": "test", "sentences": [{"raw": "A cat."}]},
    ]
}


def changed(content: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with one value replaced, or removed for the value `changed`."""
    content = json.loads(json.dumps(content))
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    target: Any = content
    for part in parents:
        target = target[part]
    if value is changed:
        del target[last]
    elif last == len(target):
        target.append(value)
    else:
        target[last] = value
    return content


def read(root: Path, format: str, content: Any, **keys: Any) -> dict[str, list[Example]]:
    file = root.parent / "captions.any"
    if not isinstance(content, (str, bytes)):
        content = json.dumps(content)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_examples(format, file, root, **keys)


def error_of(root: Path, format: str, content: Any, **keys: Any) -> DataError:
    with pytest.raises(DataError) as error:
        read(root, format, content, **keys)
    first = str(error.value).splitlines()[0]
    assert first.startswith(f"{root.parent / 'captions.any'}") and "; expected " in first
    return error.value


def record_of(error: DataError) -> str:
    """RECORD of the place "FILE:RECORD"."""
    return error.place.partition("captions.any")[2].removeprefix(":")
