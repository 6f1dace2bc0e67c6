"""Malformed annotation files: one message with the place, what was found and what was expected."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from annotation_files import COCO, KARPATHY, changed, error_of, read, record_of
from hypothesis import given
from hypothesis import strategies as st

from mmbert.data.examples import Problems, read_examples
from mmbert.errors import DataError

NEST = "[" * 100_000
COCO_TEXT = json.dumps(COCO)


@pytest.mark.parametrize("format", ["coco", "karpathy", "jsonl", "csv"])
@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "the file is empty"),
        (b" \n\t\n", "the file is empty"),
        (COCO_TEXT.encode("utf-16"), "UTF-16 data"),
        (COCO_TEXT.encode("utf-16-le"), "NUL byte at byte offset 1"),
        (b'{"a": "\xff"}', "byte 0xff at byte offset 7 is not UTF-8"),
        (b'{"a": \0 1}', "NUL byte at byte offset 6"),
        (b"\x1f\x8b\x08", "gzip data"),
    ],
)
def test_bytes_that_are_no_text_are_errors(root: Path, format: str, content: bytes, found: str) -> None:
    assert found in str(error_of(root, format, content))


@pytest.mark.parametrize("format", ["coco", "karpathy", "jsonl"])
@pytest.mark.parametrize(
    ("content", "record", "found"),
    [
        ('{"images": [', "1:13", "the text ends here"),
        ('{"images": [1, ]}', "1:16", "broken JSON"),
        ('{"x": "NaN", "y": [NaN]}', "1:20", "the number NaN"),
        ('{"x": -Infinity}', "1:7", "the number -Infinity"),
        ('{"x": {"a": 1}, "y": {"a": 1, "b": "a", "a": 2}}', "1:41", "the same key twice"),
        ('{"x": {"a": 1}, "a": 2, "x": 3}', "1:25", "the same key twice"),
        ('{"x": ' + "9" * 10_000 + "}", "1:7", "a whole number of 10,000 digits"),
        ('{"x": ' + NEST, "", "nested too deep"),
        # Found by tests/fuzz/fuzz_annotations.py: what stands behind the refused value need not be JSON.
        ("9" * 22 + "-]", "1:1", "a whole number of 22 digits"),
        ('{"a": 1, "a"' + " " * 50 + ": 2}]", "1:10", "the same key twice"),
        ('{"x": ' + "9" * 22 + "e]]", "1:7", "a whole number of 22 digits"),
    ],
)
def test_broken_json_is_an_error_with_its_place(root: Path, format: str, content: str, record: str, found: str) -> None:
    error = error_of(root, format, content)
    assert found in str(error)
    if record:
        assert record_of(error) == record
    if "\n" not in content and format != "jsonl":
        error = error_of(root, format, "\n\n " + content)
        line, _, column = record.partition(":")
        assert not record or record_of(error) == f"{int(line) + 2}:{int(column) + 1}"


def test_byte_order_mark_is_accepted(root: Path) -> None:
    assert len(read(root, "coco", b"\xef\xbb\xbf" + COCO_TEXT.encode())["train"]) == 2
    assert read(root, "jsonl", b'\xef\xbb\xbf{"image": "a.jpg", "caption": "x"}')["train"]


@pytest.mark.parametrize(
    ("path", "value", "record", "found"),
    [
        ("images", changed, "", "no key 'images'"),
        ("annotations", changed, "", "no key 'annotations'"),
        ("images", {"a": 1}, "", "images is an object with 'a'"),
        ("images.1", "x", "images[1]", "the image is the string 'x'"),
        ("images.1.id", changed, "images[1]", "no key 'id'"),
        ("images.1.id", 7, "images[1]", "id 7 is also the id of"),
        ("images.1.id", "7", "images[1]", "id '7' beside id 7 of"),
        ("images.1.id", True, "images[1]", "id is true"),
        ("images.1.file_name", None, "images[1]", "file_name is null"),
        ("images.1.file_name", "a.jpg", "images[1]", "again"),
        ("images.1.file_name", "b.jpg", "images[1]", "no image file 'b.jpg'"),
        ("images.2", {"id": 1, "file_name": "c.jpg"}, "images[2]", "no caption for image 1"),
        ("annotations.1.caption", changed, "annotations[1]", "no key 'caption'"),
        ("annotations.1.caption", None, "annotations[1]", "the caption is null"),
        ("annotations.1.caption", ["x"], "annotations[1]", "the caption is a list of 1"),
        ("annotations.1.caption", {}, "annotations[1]", "the caption is an object"),
        ("annotations.1.caption", 3, "annotations[1]", "the caption is the number 3"),
        ("annotations.1.caption", "x\ud800", "annotations[1]", "half a surrogate pair at character 1"),
        ("annotations.1.caption", " ", "images[0]", "no caption for image 7"),
        ("annotations.1.image_id", 8, "annotations[1]", "image_id 8 is no image's id"),
        ("annotations.1.image_id", "7", "annotations[1]", "(there is 7, a number)"),
        ("annotations.1.id", 1, "annotations[1]", "id 1 is also the id of"),
        ("annotations.1", [], "annotations[1]", "the annotation is a list of 0"),
    ],
)
def test_malformed_coco_is_an_error(root: Path, path: str, value: Any, record: str, found: str) -> None:
    error = error_of(root, "coco", changed(COCO, path, value))
    assert record_of(error) == record and found in str(error).splitlines()[0]
    if ".file_name" in path:
        assert not error.others  # the captions of a bad image are not reported too


@pytest.mark.parametrize(
    ("path", "value"),
    [("caption", None), ("caption", changed), ("image_id", "7"), ("image_id", "7" * 5000), ("image_id", "x" * 5000)],
)
def test_image_is_not_reported_for_its_bad_annotation(root: Path, path: str, value: Any) -> None:
    content = changed(COCO, f"annotations.1.{path}", value)
    others = error_of(root, "coco", content).others
    assert len(others) == len(str(value)) // 5000  # whose image_id no image has, not even of the other type
    assert all(len(line) < 500 for line in others)


@pytest.mark.parametrize(
    ("path", "value", "record", "found"),
    [
        ("images", changed, "", "no key 'images'"),
        ("images.2.split", "tset", "images[2]", "Did you mean 'test'?"),
        ("images.2.split", changed, "images[2]", "no key 'split'"),
        ("images.2.filename", "a.jpg", "images[2]", "again"),
        ("images.2.sentences", [], "images[2]", "no sentence with text"),
        ("images.2.sentences", "A cat.", "images[2]", "sentences is the string 'A cat.'"),
        ("images.2.sentences.0", {"tokens": []}, "images[2].sentences[0]", "no key 'raw'"),
        ("images.2.sentences.0.raw", None, "images[2].sentences[0]", "the caption is null"),
    ],
)
def test_malformed_karpathy_is_an_error(root: Path, path: str, value: Any, record: str, found: str) -> None:
    error = error_of(root, "karpathy", changed(KARPATHY, path, value))
    assert record_of(error) == record and found in str(error)


@pytest.mark.parametrize("top", ["text", 3, [1, 2], None])
def test_top_level_must_be_an_object(root: Path, top: Any) -> None:
    for format in ("coco", "karpathy", "jsonl"):
        message = str(error_of(root, format, json.dumps(top)))
        assert "expected" in message and "object" in message, message


GOOD = '{"image": "a.jpg", "caption": "An ant.", "part": "train"}\n'


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("{", "broken JSON"),
        ("[1]", "the line is a list of 1"),
        ('{"photo": "a.jpg", "caption": "x"}', "no key 'image'"),
        ('{"image": 3, "caption": "x"}', "image is the number 3"),
        ('{"image": "c.jpg", "captoin": "x"}', "Did you mean 'captoin'?"),
        ('{"image": "c.jpg", "caption": null}', "the caption is null"),
        ('{"image": "c.jpg", "caption": " "}', "no text in 'caption'"),
        ('{"image": "c.jpg", "caption": []}', "no text in 'caption'"),
        ('{"image": "c.jpg", "caption": ["x", 3]}', "the caption is the number 3"),
    ],
)
def test_malformed_jsonl_line_is_an_error(root: Path, line: str, found: str) -> None:
    error = error_of(root, "jsonl", GOOD + "\n" + line + "\n" + GOOD)
    assert record_of(error).partition(":")[0] == "3" and found in str(error)


def test_jsonl_problems_are_found_to_the_end_of_the_file(root: Path) -> None:
    bad = ["{", GOOD.strip(), '{"image": "a.jpg", "caption": "x", "part": "val"}', "{}"]
    error = error_of(root, "jsonl", "\n".join(bad), split_key="part")
    assert [line.split(": ")[0].split(":")[1] for line in str(error).splitlines()] == ["1", "3", "4"]
    error = error_of(root, "jsonl", GOOD, caption_key=["caption", "captoin"])
    assert "no row has the key 'captoin'; expected a caption key. Did you mean 'caption'?" in str(error)
    assert "one object per line" in str(error_of(root, "jsonl", "[\n" + GOOD + "]"))


def test_one_bad_line_far_down_is_named(root: Path) -> None:
    error = error_of(root, "jsonl", GOOD * 20_000 + '{"image": "a.jpg", "caption": "x"\n' + GOOD)
    assert record_of(error) == "20001:34" and "\n" not in str(error)


@pytest.mark.parametrize(
    ("text", "record", "found"),
    [
        ('image,caption\na.jpg,"An ant.\nc.jpg,A cat.\n', "2", "broken CSV"),
        ('image,caption\na.jpg,x\nc.jpg,"A" cat.\n', "3", "broken CSV"),
        ("image,caption\na.jpg,x\nc.jpg,A cat, black.\n", "3", "3 columns; expected 2"),
        ("image,caption\na.jpg\n", "2", "1 columns; expected 2"),
        ("image\na.jpg\n", "1", "no column 'caption' in the header"),
        ("image,captoin\na.jpg,x\n", "1", "Did you mean 'captoin'?"),
        ("image,caption,image\na.jpg,x,y\n", "1", "the column 'image' twice"),
        ("image,caption\n", "", "no examples"),
        ("image,caption\na.jpg,\n", "2", "no text in 'caption'"),
    ],
)
def test_malformed_csv_is_an_error(root: Path, text: str, record: str, found: str) -> None:
    error = error_of(root, "csv", text)
    assert record_of(error) == record and found in str(error)


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../x.jpg", "sub/../../x.jpg", "sub/../a.jpg", "out.jpg", "outside/x.jpg", "", ".",
     "sub", "loop.jpg", "missing/a.jpg", "A.JPG", "nul\0.jpg", "n\0/a.jpg", "\ud800/a.jpg", "a.jpg/b.jpg",
     "pipe.jpg"],
)  # fmt: skip
def test_image_outside_the_root_or_missing_is_an_error(root: Path, name: str) -> None:
    (root.parent / "x.jpg").touch()
    (root / "out.jpg").symlink_to(root.parent / "x.jpg")
    (root / "outside").symlink_to(root.parent)
    (root / "loop.jpg").symlink_to(root / "loop.jpg")
    os.mkfifo(root / "pipe.jpg")
    error = error_of(root, "jsonl", json.dumps({"image": name, "caption": "x"}))
    assert record_of(error) == "1"
    str(error).encode()


def test_missing_image_gets_a_hint(root: Path) -> None:
    error = error_of(root, "jsonl", '{"image": "sub/B.tif", "caption": "x"}')
    assert str(error).endswith(f"no image file 'sub/B.tif'; expected it inside {root}. There is 'sub/b.jpg'.")


def test_problems_are_listed_up_to_the_limit(root: Path) -> None:
    rows = "\n".join(json.dumps({"image": f"{i}.jpg", "caption": "x"}) for i in range(1234))
    error = error_of(root, "jsonl", rows)
    lines = str(error).splitlines()
    assert len(lines) == 11 and lines[-1] == "... and 1,224 more problems" and "'9.jpg'" in lines[9]
    assert len(str(error_of(root, "jsonl", rows, problems=Problems(limit=20))).splitlines()) == 21


def test_unreadable_annotation_files_are_errors_without_waiting(root: Path) -> None:
    os.mkfifo(root.parent / "pipe.json")
    for name in ("none.json", "pipe.json", "images", "nul\0"):
        for format in ("coco", "jsonl", "csv"):
            with pytest.raises(DataError, match=r"no such file|not a regular file|cannot be opened"):
                read_examples(format, root.parent / name, root)
    with pytest.raises(DataError, match="no such folder"):
        read_examples("coco", root.parent / "x", root / "none")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("a.jpg"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                "images annotations id file_name image_id caption image filename split sentences raw".split()
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)


@given(st.sampled_from(["coco", "karpathy", "jsonl", "csv"]), JSON_VALUES | st.binary(max_size=40))
def test_any_content_gives_examples_or_a_data_error(root: Path, format: str, content: Any) -> None:
    try:
        splits = read(root, format, content)
    except DataError as error:
        assert error.place
        return
    assert all(caption.strip() for found in splits.values() for e in found for caption in e.captions)
