"""Annotation files of every format: the right examples, options and splits."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from annotation_files import COCO, KARPATHY, error_of, read, record_of

from mmbert.data.examples import Problems, read_examples
from mmbert.errors import DataError, UsageError, did_you_mean


def test_coco_joins_captions_to_images(root: Path) -> None:
    examples = read(root, "coco", COCO)["train"]
    assert [(e.image, e.captions, e.image_id, e.split) for e in examples] == [
        (root / "a.jpg", ("An ant.",), "7", "train"),
        (root / "sub" / "b.jpg", ("A bee.", "Another bee."), "9", "train"),
    ]
    assert examples[1].place == f"{root.parent / 'captions.any'}:images[1]"


def test_coco_takes_a_file_and_a_folder_for_each_split(root: Path) -> None:
    file = root.parent / "one.json"
    one = {"images": [{"id": 1, "file_name": "b.jpg"}], "annotations": [{"image_id": 1, "caption": "A bee."}]}
    file.write_text(json.dumps(one))
    splits = read_examples("coco", {"val": file, "mine": file}, {"val": root / "sub", "mine": root / "sub"})
    assert {name: [e.split for e in examples] for name, examples in splits.items()} == {
        "val": ["val"],
        "mine": ["mine"],
    }
    with pytest.raises(UsageError, match="no folder for the split 'mine'"):
        read_examples("coco", {"val": file, "mine": file}, {"val": root / "sub"})


def test_karpathy_reads_splits_and_folders(root: Path) -> None:
    splits = read(root, "karpathy", KARPATHY)
    assert list(splits) == ["train", "test"]
    assert [(e.image_id, e.captions) for e in splits["train"]] == [
        ("a.jpg", ("An ant.", "Small.")),
        ("sub/b.jpg", ("A bee.",)),
    ]


def test_jsonl_merges_rows_of_one_image_and_takes_several_keys(root: Path) -> None:
    lines = [
        {"image": "a.jpg", "caption": ["An ant.", " "], "alt": "Black."},
        {"image": "c.jpg", "caption": "", "alt": "A cat."},
        {"image": "./a.jpg", "caption": "Again.", "alt": None},
    ]
    text = "\n\n".join(map(json.dumps, lines)) + "\r\n"
    problems = Problems()
    examples = read(root, "jsonl", text, caption_key=["alt", "caption"], problems=problems)["train"]
    assert [e.captions for e in examples] == [("Black.", "An ant.", "Again."), ("A cat.",)]
    assert [e.place.rpartition(":")[2] for e in examples] == ["1", "3"]
    assert [count for count, _ in problems.notes.values()] == [2]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (None, {"train": "a", "val": "b", "test_seen": "c"}),
        ({"test": ["test_seen"]}, {"train": "ab", "test": "c"}),
        ({"mine": ["dev", "train"]}, {"train": "c", "mine": "ab"}),
    ],
)
def test_table_splits_follow_the_key(root: Path, values: Any, expected: dict[str, str]) -> None:
    text = "image,caption,part\na.jpg,An ant.,train\nsub/b.jpg,A bee.,dev\nc.jpg,A cat.,test_seen\n"
    splits = read(root, "csv", text, split_key="part", split_values=values)
    assert {name: "".join(e.image.stem for e in found) for name, found in splits.items()} == expected
    assert list(splits) == list(expected)


def test_table_split_options_are_checked(root: Path) -> None:
    text = "image,caption,part\na.jpg,An ant.,train\nc.jpg,A cat.,tset\n"
    error = error_of(root, "csv", text, split_key="part", split_values={"train": ["train"], "test": ["test"]})
    assert record_of(error) == "3" and "Did you mean 'test'?" in str(error)
    error = error_of(root, "csv", text, split_key="part", split_values={"test": ["test"]})
    assert "no row has part = 'test'" in str(error) and "Did you mean 'tset'?" in str(error)
    for keys, reason in (
        ({"split_values": {"val": ["x"]}}, "without split_key"),
        ({"split_key": "part", "split_values": {"val": ["x"], "test": ["x"]}}, "'x' is in val and in test"),
    ):
        with pytest.raises(UsageError, match=reason):
            read(root, "csv", text, **keys)


def test_csv_reads_quotes_line_breaks_and_other_delimiters(root: Path) -> None:
    text = '\ufeffimage| caption\r\na.jpg| "An ""ant"",\nsmall."\r\n\r\nc.jpg|A cat.\r\n'.replace('| "', '|"')
    examples = read(root, "csv", text, delimiter="|")["train"]
    assert [e.captions for e in examples] == [('An "ant",\nsmall.',), ("A cat.",)]
    assert [e.place.rpartition(":")[2] for e in examples] == ["2", "5"]


def test_empty_captions_among_good_ones_are_dropped_and_counted(root: Path, caplog: Any) -> None:
    content = json.loads(json.dumps(KARPATHY))
    content["images"][0]["sentences"] += [{"raw": "  "}, {"raw": ""}]
    problems = Problems()
    with caplog.at_level(logging.WARNING, logger="mmbert"):
        assert read(root, "karpathy", content, problems=problems)["train"][0].captions == (
            "An ant.",
            "Small.",
        )
    place = f"{root.parent / 'captions.any'}:images[0].sentences[2]"
    assert problems.notes == {"empty captions dropped": (2, place)}
    assert [r.getMessage() for r in caplog.records] == [f"empty captions dropped: 2 (first: {place})"]


def test_strict_problems_list_each_note_with_its_place(root: Path) -> None:
    karpathy, coco = json.loads(json.dumps(KARPATHY)), json.loads(json.dumps(COCO))
    karpathy["images"][0]["sentences"] += [{"raw": "  "}, {"raw": ""}]
    karpathy["images"][1]["sentences"] = [{"raw": ""}]
    coco["annotations"][1]["caption"] = " "
    coco["images"].append({"id": 3, "file_name": "c.jpg"})
    rows = '{"image": "a.jpg", "caption": ["x", "", " "]}'
    for format, content, keys, expected in (
        ("karpathy", karpathy, {}, ["images[0].sentences[2]", "images[0].sentences[3]", "images[1].sentences[0]"]),
        ("coco", coco, {"drop_uncaptioned": True}, ["annotations[1]", "images[0]", "images[2]"]),
        ("coco", coco, {}, ["annotations[1]", "images[2]"]),
        ("jsonl", rows, {}, ["1", "1"]),
    ):
        problems = Problems(strict=True)
        error = error_of(root, format, content, problems=problems, **keys)
        places = [place.partition("captions.any:")[2] for place, _, _ in problems.listed]
        assert places == expected and problems.total == len(expected) and not problems.notes
        assert "an empty caption; expected text, or no caption" in str(error)


def test_image_in_two_splits_is_a_note_or_a_listed_remark(root: Path, caplog: Any) -> None:
    files = {}
    for split in ("train", "val"):
        files[split] = root.parent / f"{split}.jsonl"
        files[split].write_text('{"image": "a.jpg", "caption": "x"}')
    with caplog.at_level(logging.WARNING, logger="mmbert"):
        read_examples("jsonl", files, root)
    assert [r.getMessage() for r in caplog.records] == [f"images in val and another split: 1 (first: {files['val']}:1)"]
    problems = Problems(strict=True)
    with pytest.raises(DataError, match=r"val.jsonl:1: the image of .*train.jsonl:1 again, now in val; expected it"):
        read_examples("jsonl", files, root, problems=problems)


def test_links_inside_the_root_are_followed(root: Path) -> None:
    (root / "link.jpg").symlink_to("sub/b.jpg")
    (root.parent / "alias").symlink_to(root)
    rows = '{"image": "link.jpg", "caption": "x"}\n{"image": "sub/b.jpg", "caption": "y"}'
    (example,) = read(root.parent / "alias", "jsonl", rows)["train"]
    assert example.image == root / "sub" / "b.jpg" and example.captions == ("x", "y")


def test_unknown_options_are_usage_errors(root: Path) -> None:
    with pytest.raises(UsageError, match=r"format is 'cocoo'; expected coco.*Did you mean 'coco'\?"):
        read(root, "cocoo", COCO)
    with pytest.raises(UsageError, match=r"no option 'caption_keys'.*Did you mean 'caption_key'\?"):
        read(root, "csv", "", caption_keys="x")
    with pytest.raises(UsageError, match="no option 'split'"):
        read(root, "coco", COCO, split="val")
    with pytest.raises(UsageError, match="names its own splits"):
        read_examples("karpathy", {"val": root}, root)
    assert did_you_mean("hiden_size", ["hidden_size", "x"]) == " Did you mean 'hidden_size'?"
    assert did_you_mean("zzz", ["hidden_size"]) == ""


def test_folder_of_many_images_is_listed_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count, listed = 1000, []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: listed.append(folder) or scandir(folder))
    for number in range(count):
        os.close(os.open(root / f"{number}.jpg", os.O_CREAT))
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(count)]
    annotations = [{"id": i, "image_id": i % count, "caption": "x"} for i in range(5 * count)]
    splits = read(root, "coco", {"images": images, "annotations": annotations})
    assert len(splits["train"]) == count and listed == [root]


def test_real_files_read(shared: Path) -> None:
    data = shared / "data"

    def counts(*arguments: Any, **keys: Any) -> dict[str, tuple[int, int]]:
        splits = read_examples(*arguments, **keys)
        return {name: (len(found), sum(len(e.captions) for e in found)) for name, found in splits.items()}

    ucm = data / "ucm_captions"
    assert counts("karpathy", ucm / "dataset_ucm.json", ucm / "images") == {
        "train": (1680, 8400),
        "val": (210, 1050),
        "test": (210, 1050),
    }
    openstax, problems = data / "openstax_figures", Problems()
    assert counts(
        "jsonl",
        openstax / "captions.jsonl",
        openstax / "images",
        caption_key=["alt", "caption"],
        split_key="book",
        split_values={"val": ["introduction-philosophy"], "test": ["american-government"]},
        problems=problems,
    ) == {"train": (1920, 3772), "val": (125, 248), "test": (311, 618)}
    assert problems.notes["empty captions dropped"][0] == 74
    stamps = data / "tuxpaint_stamps"
    assert counts("jsonl", stamps / "captions.jsonl", stamps / "images") == {"train": (785, 785)}
    coco = data / "coco_mini"
    files = {split: coco / "annotations" / f"captions_{split}2017.json" for split in ("train", "val")}
    assert counts("coco", files, coco / "images") == {"train": (80, 400), "val": (79, 395)}


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
def test_delimiter_of_a_csv_is_detected(mark: str, root: Path) -> None:
    text = (
        f"image{mark} caption{mark}other\na.jpg{mark}An ant{'' if mark == ',' else ', black'}.{mark}x,y;z|\t".rstrip()
    )
    text = text.replace("x,y;z|", "x")
    assert read(root, "csv", text)["train"][0].captions[0].startswith("An ant")
    if mark == "\t":
        for name in ("tab", "\\t", "\t"):
            assert len(read(root, "csv", text, delimiter=name)["train"]) == 1


def test_delimiter_that_gives_all_columns_is_preferred(root: Path) -> None:
    """The header has more columns by commas, but only semicolons separate the two that are needed."""
    text = "image;caption;note, of a, few, words\na.jpg;An ant;x\n"
    assert read(root, "csv", text)["train"][0].captions == ("An ant",)


def test_given_delimiter_that_does_not_separate_is_an_error(root: Path) -> None:
    error = error_of(root, "csv", "image;caption\na.jpg;x\n", delimiter=",")
    assert "one column 'image;caption'; expected columns separated by ','" in str(error) and "set it to ';'" in str(
        error
    )
    with pytest.raises(UsageError, match="delimiter is ';;'; expected one character"):
        read(root, "csv", "image;caption\na.jpg;x\n", delimiter=";;")


def test_images_without_a_caption_are_dropped_on_request(root: Path, caplog: Any) -> None:
    coco, karpathy = json.loads(json.dumps(COCO)), json.loads(json.dumps(KARPATHY))
    coco["images"].append({"id": 3, "file_name": "c.jpg"})
    karpathy["images"][1]["sentences"] = []
    rows = '{"image": "a.jpg", "caption": "x"}\n{"image": "c.jpg", "caption": [" "]}'
    for format, content, kept in (("coco", coco, 2), ("karpathy", karpathy, 2), ("jsonl", rows, 1)):
        assert "data.drop_uncaptioned=true" in str(error_of(root, format, content))
        caplog.clear()
        splits = read(root, format, content, drop_uncaptioned=True)
        assert sum(map(len, splits.values())) == kept
        (message,) = [r.getMessage() for r in caplog.records]
        assert message.startswith("images without a caption dropped: 1 (first: ")
    with pytest.raises(UsageError, match="format jsonl has no option 'delimiter'"):
        read(root, "jsonl", rows, delimiter=",")
