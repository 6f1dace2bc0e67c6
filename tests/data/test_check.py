"""`mmbert data check`: every problem with its place, one line each, for any content of the file."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from annotation_files import COCO, KARPATHY, changed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_bytes import PHOTO, saved
from PIL import Image

from mmbert.cli.main import main
from mmbert.data import check
from mmbert.data.check import check_file
from mmbert.data.examples import read_examples

ROOT = Path(__file__).parents[2]
ROW = {"image": "a.jpg", "caption": "An ant."}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with images/a.jpg, images/c.jpg and images/sub/b.jpg, all different."""
    (tmp_path / "images/sub").mkdir(parents=True)
    for number, name in enumerate(("a.jpg", "c.jpg", "sub/b.jpg")):
        (tmp_path / "images" / name).write_bytes(saved(PHOTO.rotate(90 * number), "JPEG"))
    return tmp_path


def written(file: Path, content: Any) -> Path:
    if not isinstance(content, (str, bytes)):
        content = json.dumps(content)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def lines_of(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[str], str]:
    """Exit code, lines on stdout, and stderr of `mmbert data check ARGUMENTS`."""
    code = 0
    try:
        main(["data", "check", *map(str, arguments)])
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    out, err = capsys.readouterr()
    return code, out.splitlines(), err


@pytest.mark.parametrize(
    ("name", "content", "format", "sizes"),
    [
        ("x.json", COCO, "coco", "2 images | 3 captions | 2 train"),
        ("x.json", json.dumps(COCO, indent=1), "coco", "2 images | 3 captions | 2 train"),
        ("x.json", b"\xef\xbb\xbf" + json.dumps(COCO).encode(), "coco", "2 images | 3 captions | 2 train"),
        ("x.json", KARPATHY, "karpathy", "3 images | 4 captions | 2 train, 1 test"),
        ("x.any", json.dumps(KARPATHY).replace("{", "{\n"), "karpathy", "3 images | 4 captions | 2 train, 1 test"),
        ("x.jsonl", lines_of([ROW]), "jsonl", "1 images | 1 captions | 1 train"),
        ("x.json", lines_of([ROW, {**ROW, "caption": "Two."}]), "jsonl", "1 images | 2 captions | 1 train"),
        ("x.json", {"file_name": "a.jpg", "sentence": "x"}, "jsonl", "1 images | 1 captions | 1 train"),
        ("x.csv", "Image,Text\na.jpg,x\n", "csv", "1 images | 1 captions | 1 train"),
        ("x.tsv", "img\talt\na.jpg\tx, y\n", "csv", "1 images | 1 captions | 1 train"),
    ],
)
def test_clean_file_exits_0_and_is_summed_up(
    name: str, content: Any, format: str, sizes: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines, err = run(capsys, written(folder / name, content))
    assert (code, lines) == (0, [])
    assert err.splitlines()[-1].startswith(f"mmbert: {format} | {sizes} | ")


COCO_TEXT = json.dumps(COCO)
TWO_OF_9 = {"id": 9, "image_id": 9, "caption": "x"}
JSONL, CSV = "captions.jsonl", "captions.csv"
MALFORMED: dict[str, tuple[Any, str, str] | tuple[Any, str, str, str]] = {
    # name: (content, RECORD, what is found, file if not captions.json)
    "empty": (b"", "", "the file is empty"),
    "white space": (b" \n\t\n", "", "the file is empty"),
    "truncated": (COCO_TEXT[:30], "1:23", "broken JSON: Unterminated string"),
    "trailing comma": ('{"images": [1, ]}', "1:16", "broken JSON"),
    "two texts": (COCO_TEXT + COCO_TEXT, f"1:{len(COCO_TEXT) + 1}", "broken JSON: Extra data"),
    "NaN": ('{"images": [],\n "annotations": [NaN]}', "2:18", "the number NaN"),
    "Infinity": ('{"images": -Infinity}', "1:12", "the number -Infinity"),
    "UTF-16": (COCO_TEXT.encode("utf-16"), "", "UTF-16 data; expected UTF-8 text"),
    "UTF-16 without mark": (COCO_TEXT.encode("utf-16-le"), "", "a NUL byte at byte offset 1"),
    "no UTF-8": (b'{"a": "\xff"}', "", "byte 0xff at byte offset 7 is not UTF-8"),
    "NUL": (b'{"a": \0 1}', "", "a NUL byte at byte offset 6"),
    "gzip": (b"\x1f\x8b\x08", "", "gzip data; expected UTF-8 text; unpack it first"),
    "deep": ('{"images": ' + "[" * 100_000, "", "JSON nested too deep"),
    "long number": ('{"images": ' + "9" * 10_000 + "}", "1:12", "a whole number of 10,000 digits"),
    "string": ('"text"', "", "the file is the string 'text'; expected an object with 'images'"),
    "number": ("3", "", "the file is the number 3; expected an object with 'images'"),
    "null": ("null", "", "the file is null"),
    "list": ([1, 2], "", "the file is a list of 2; expected an object with 'images'"),
    "unknown object": ({"data": []}, "", "the file is an object with 'data'; expected an object with 'images'"),
    "no JSON": ("a.jpg#0 An ant.", "", "a name in '.token' and content that is no JSON", "captions.token"),
    "no images": ({"annotations": []}, "", "no key 'images' in an object with 'annotations'"),
    "no annotations": ({"images": COCO["images"]}, "", "no key 'annotations' in an object with 'images'"),
    "nothing": ({"images": [], "annotations": []}, "", "no examples; expected at least one image with a caption"),
    "object for list": (changed(COCO, "images", {"a": 1}), "", "images is an object with 'a'; expected a list"),
    "string for image": (
        changed(COCO, "images.2", "x"),
        "images[2]",
        "the image is the string 'x'; expected an object",
    ),
    "list for annotation": (changed(COCO, "annotations.3", []), "annotations[3]", "the annotation is a list of 0"),
    "no caption": (changed(COCO, "annotations.1.caption", changed), "annotations[1]", "no key 'caption'"),
    "caption null": (changed(COCO, "annotations.1.caption", None), "annotations[1]", "the caption is null"),
    "caption list": (changed(COCO, "annotations.1.caption", ["x"]), "annotations[1]", "the caption is a list of 1"),
    "caption number": (changed(COCO, "annotations.1.caption", 3), "annotations[1]", "the caption is the number 3"),
    "image_id unknown": (
        changed(COCO, "annotations.3", {**TWO_OF_9, "image_id": 8}),
        "annotations[3]",
        "image_id 8 is no image's id",
    ),
    "image_id of other type": (
        changed(COCO, "annotations.1.image_id", "7"),
        "annotations[1]",
        "image_id '7' is no image's id; expected one of the images' ids (there is 7, a number)",
    ),
    "image_id too long": (
        changed(COCO, "annotations.3", {**TWO_OF_9, "image_id": "7" * 9999}),
        "annotations[3]",
        "image_id '7777",
    ),
    "annotation id twice": (
        changed(COCO, "annotations.3", {**TWO_OF_9, "id": 1}),
        "annotations[3]",
        "id 1 is also the id of",
    ),
    "image without caption": (
        changed(COCO, "images.2", {"id": 1, "file_name": "c.jpg"}),
        "images[2]",
        "no caption for image 1",
    ),
    "image id twice": (changed(COCO, "images.2", {"id": 7, "file_name": "c.jpg"}), "images[2]", "id 7 is also the id"),
    "image twice": (changed(COCO, "images.2", {"id": 1, "file_name": "a.jpg"}), "images[2]", "the file of"),
    "key twice": ('{"images": [], "annotations": [],\n "images": []}', "2:2", "the same key twice in one object"),
    "image missing": (
        changed(COCO, "images.1.file_name", "b.jpg"),
        "images[1]",
        "no image file 'b.jpg'; expected it inside",
    ),
    "first image missing": (
        changed(COCO, "images.0.file_name", "b.jpg"),
        "images[0]",
        "no image file 'b.jpg'; expected it in FOLDER or FOLDER/images; or give --images DIR",
    ),
    "image outside": (changed(COCO, "images.1.file_name", "../x.jpg"), "images[1]", "the image name '../x.jpg'"),
    "absolute path": (changed(COCO, "images.0.file_name", "/etc/x.jpg"), "images[0]", "the image name '/etc/x.jpg'"),
    "split": (
        changed(KARPATHY, "images.2.split", "tset"),
        "images[2]",
        "the split 'tset'; expected train, restval, val",
    ),
    "no sentences": (changed(KARPATHY, "images.2.sentences", changed), "images[2]", "no key 'sentences'"),
    "jsonl: bad line": (lines_of([ROW]) + "{\n", "2:2", "broken JSON", JSONL),
    "jsonl: only a bad line": ("{", "1:2", "broken JSON", JSONL),
    "jsonl: first line bad": ("{\n" + lines_of([ROW]), "1:2", "broken JSON"),
    "jsonl: a list": ("[\n" + lines_of([ROW]) + "]", "1", "the start of a JSON list", JSONL),
    "jsonl: no caption": ('{"image": "a.jpg"}', "1", "no known name of the caption among 'image'; expected one", JSONL),
    "jsonl: no image": ('{"caption": "x"}', "1", "no known name of the image among 'caption'; expected one", JSONL),
    "jsonl: caption missing": (lines_of([ROW, {"image": "c.jpg"}]), "2", "no key 'caption'", JSONL),
    "jsonl: caption empty": (lines_of([ROW, {**ROW, "caption": ""}]), "2", "no text in 'caption'", JSONL),
    "jsonl: NaN in a .json": ('{"image": "a.jpg", "caption": NaN}', "1:31", "the number NaN"),
    "jsonl: no image at all": (
        lines_of([{**ROW, "image": f"{i}.png"} for i in range(30)]),
        "1",
        "no image file '0.png', nor any other of 30; expected them in FOLDER or FOLDER/images; or give --images",
        JSONL,
    ),
    "csv: open quote": ('image,caption\na.jpg,"An ant.\nc.jpg,A cat.\n', "2", "broken CSV", CSV),
    "csv: open quote in the header": ('"image,caption\na.jpg,x\n', "1", "broken CSV", CSV),
    "csv: ragged": ("image,caption\na.jpg,x\nc.jpg,A cat, black.\n", "3", "3 columns; expected 2", CSV),
    "csv: no caption": (
        "image,x\na.jpg,x\n",
        "1",
        "no known name of the caption among 'image', 'x'; expected one",
        CSV,
    ),
    "csv: no row": ("image,caption\n", "", "no examples", CSV),
    "csv: empty": ("", "", "the file is empty", CSV),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_file_gives_one_line_with_its_place(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, record, found, *file_name = MALFORMED[name]
    file = written(folder / (file_name[0] if file_name else "captions.json"), content)
    code, lines, err = run(capsys, file)
    assert code == 1 and len(lines) == 1, lines
    place = f"{file}:{record}" if record else str(file)
    assert lines[0].startswith(f"{place}: {found.replace('FOLDER', str(folder))}"), lines[0]
    assert "; expected " in lines[0] and len(lines[0]) < 1000
    assert "Traceback" not in err and err.splitlines()[-1].endswith(" s")


def test_one_bad_line_far_down_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(300):
        Image.new("RGB", (1, 1), (number % 256, number // 256, 0)).save(folder / f"images/{number}.bmp")
    rows = [{"image": f"{i % 300}.bmp", "caption": f"Caption {i}."} for i in range(12_344)]
    file = written(folder / JSONL, lines_of(rows) + '{"image": "a.jpg", "caption": "x"\n' + lines_of([ROW]))
    code, lines, err = run(capsys, file)
    assert code == 1 and len(lines) == 1
    assert lines[0].startswith(f"{file}:12345:34: broken JSON")
    assert "jsonl | 301 images | 12,345 captions |" in err  # and more than one process decoded them
    assert len(os.listdir(folder / "images")) > check.MIN_PARALLEL_IMAGES


def test_problems_of_images_and_captions_are_listed_in_the_order_of_the_file(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = folder / "images"
    (images / "html.jpg").write_bytes(b"<html>not found</html>")
    (images / "cut.jpg").write_bytes((images / "a.jpg").read_bytes()[:-100])
    for name in ("same.jpg", "again.jpg"):
        (images / name).write_bytes((images / "a.jpg").read_bytes())
    rows = [
        {"image": "a.jpg", "caption": ["An ant.", "an  ANT.", "Black.", "An ant. "], "part": "train"},
        {"image": "html.jpg", "caption": "x", "part": "train"},
        {"image": "c.jpg", "caption": ["x", " "], "part": "train"},
        {"image": "none.jpg", "caption": "x", "part": "train"},
        {"image": "same.jpg", "caption": "x", "part": "dev"},
        {"image": "cut.jpg", "caption": ["x", "X"], "part": "dev"},
        {"image": "again.jpg", "caption": "x", "part": "train"},
        {"image": "c.jpg", "caption": "X", "part": "train"},
    ]
    file = written(folder / JSONL, lines_of(rows))
    code, lines, err = run(capsys, file, "--split_key", "part")
    accepted = "JPEG, PNG, WEBP, GIF, BMP, TIFF"
    assert lines.pop(7).startswith(f"{file}:6: 'cut.jpg': truncated or damaged JPEG (OSError: ")
    once = "expected each caption of an image once"
    assert lines == [
        f"{file}:1: remark: caption 2 of 'a.jpg' is caption 1 again, 'an  ANT.'; {once}",
        f"{file}:1: remark: caption 4 of 'a.jpg' is caption 1 again, 'An ant.'; {once}",
        f"{file}:2: 'html.jpg': not an image (looks like HTML, perhaps an error page saved by a download); "
        f"expected {accepted}",
        f"{file}:3: remark: an empty caption; expected text, or no caption",
        f"{file}:3: remark: caption 2 of 'c.jpg' is caption 1 again, 'X'; {once}",
        f"{file}:4: no image file 'none.jpg'; expected it inside {images}.",
        f"{file}:5: remark: 'same.jpg' has the same bytes as 'a.jpg' of {file}:1, which is in train, and this one in "
        "val; expected each image in one split",
        f"{file}:6: remark: caption 2 of 'cut.jpg' is caption 1 again, 'X'; {once}",
        f"{file}:7: remark: 'again.jpg' has the same bytes as 'a.jpg' of {file}:1; expected each image once",
    ]
    assert code == 1
    assert "jsonl | 6 images | 11 captions | 4 train, 2 val | 3 errors, 7 remarks | " in err.splitlines()[-1]


def test_remarks_are_errors_when_strict(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`fit` accepts each of these files, and so does the check."""
    (folder / "images/same.jpg").write_bytes((folder / "images/a.jpg").read_bytes())
    for rows in (
        [{**ROW, "caption": ["An ant.", "an ANT."]}],
        [ROW, {"image": "same.jpg", "caption": "x"}],
        [ROW, {"image": "c.jpg", "caption": ["x", ""]}],
    ):
        file = written(folder / JSONL, lines_of(rows))
        code, lines, err = run(capsys, file)
        assert code == 0 and len(lines) == 1 and ": remark: " in lines[0] and "| 0 errors, 1 remarks |" in err
        assert read_examples("jsonl", file, folder / "images")["train"]
        assert run(capsys, file, "--strict")[0] == 1
    assert run(capsys, written(folder / JSONL, lines_of([ROW])), "--strict")[0] == 0


@pytest.mark.parametrize(
    ("name", "content"),
    [("c.json", changed(COCO, "annotations.1.caption", " ")), ("k.json", changed(KARPATHY, "images.2.sentences", []))],
)
def test_image_without_a_caption_is_an_error_or_dropped(
    name: str, content: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(folder / name, content)
    code, lines, _ = run(capsys, file)
    assert code == 1 and "data.drop_uncaptioned=true drops images without one" in lines[0]
    code, lines, err = run(capsys, file, "--drop_uncaptioned")
    assert code == 0 and "remark: no caption; expected at least one" in lines[0] and " 0 errors, " in err


def test_csv_with_any_delimiter_is_accepted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, mark in (("a.csv", ";"), ("b.tsv", "\t"), ("c.csv", "|"), ("captions.txt", ",")):
        file = written(folder / name, f"image_name{mark} comment\na.jpg{mark}An ant.\n")
        for options in ([], ["--delimiter", "tab" if mark == "\t" else mark]):
            assert run(capsys, file, *options)[:2] == (0, [])
    broken = written(folder / "d.csv", "image|comment\na.jpg|An ant.\nc.jpg An ant.\n")
    code, lines, _ = run(capsys, broken, "--delimiter", "|")
    assert code == 1 and lines == [f"{broken}:3: 1 columns; expected 2, as in the header"]


def vqa(folder: Path) -> tuple[Path, Path]:
    questions = [{"question_id": i, "image_id": i % 2, "question": "What?"} for i in range(3)]
    rest = {"question_type": "what", "answer_type": "other"}
    annotations = [{"question_id": i, "answers": [{"answer": "red"}], **rest} for i in range(3)]
    for number, name in enumerate(("a.jpg", "c.jpg")):
        (folder / "images" / f"{number:03d}.jpg").write_bytes((folder / "images" / name).read_bytes())
    return (
        written(folder / "q.json", {"questions": questions}),
        written(folder / "a.json", {"annotations": annotations}),
    )


def test_task_files_are_accepted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions, annotations = vqa(folder)
    names = ("--image_names", "{:03d}.jpg")
    code, lines, err = run(capsys, annotations, "--questions", questions, *names)
    assert (code, lines) == (0, []) and "vqav2 | 2 images | 3 examples | 2 train | 0 errors, 0 remarks |" in err
    code, lines, err = run(capsys, questions, *names)
    assert code == 0 and "remark: 3 of 3 examples have no label or answer" in lines[0]

    row = {"img": "a.jpg", "text": "An ant.", "label": 1}
    code, lines, err = run(capsys, written(folder / "d.jsonl", lines_of([row, row, {**row, "label": None}])))
    assert code == 0 and lines[0].startswith(f"{folder / 'd.jsonl'}:3: remark: 1 of 3 examples have no label")
    assert "jsonl | 1 images | 3 examples | 1 train |" in err
    row = {"img": "a", "premise": "An ant.", "gold": "yes", "pair": "x"}
    keys = ("--text_key", "premise", "--label_key", "gold", "--id_key", "pair", "--image_names", "{}.jpg")
    file = written(folder / "e.jsonl", lines_of([row, row]))
    code, lines, err = run(capsys, file, *keys)
    assert code == 1 and lines == [f"{file}:2: pair 'x' again, as in {file}:1; expected each row once"]

    nlvr = {"identifier": "1-0", "image": "a.jpg", "sentence": "An ant.", "label": "true"}
    assert (
        " nlvr | 1 images |"
        in run(capsys, written(folder / "n.json", lines_of([nlvr, {**nlvr, "identifier": "2-0"}])))[2]
    )
    for i in range(2):
        (folder / "images" / f"dev-1-0-img{i}.png").write_bytes((folder / "images" / "a.jpg").read_bytes() + bytes(i))
    nlvr2 = {"identifier": "dev-1-0-0", "sentence": "Two ants.", "label": "True"}
    assert " nlvr2 | 2 images | 1 examples |" in run(capsys, written(folder / "n2.json", lines_of([nlvr2])))[2]
    foil = {"filename": "a.jpg", "caption": "An ant.", "negative_caption": "A bee."}
    file = written(folder / "f.json", {"1": foil, "2": {**foil, "negative_caption": "An ant."}, "3": {"caption": "x"}})
    code, lines, err = run(capsys, file)
    assert code == 1 and " foils | 1 images | 2 foils | 1 test |" in err
    assert [line.split(": ")[0].rpartition(":")[2] for line in lines] == ["2", "3"] and "remark" in lines[0]


def test_boxes_are_read_and_their_errors_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = {"id": 1, "file_name": "a.jpg", "width": 8, "height": 8}
    box = {"id": 1, "image_id": 1, "category_id": 2, "bbox": [1, 1, 4, 4]}
    content = {"images": [image], "annotations": [box, box], "categories": [{"id": 2, "name": "ant"}]}
    code, lines, err = run(capsys, written(folder / "i.json", content))
    assert (code, lines) == (0, []) and " boxes | 1 images | 2 boxes of 1 classes | 1 train | 0 errors" in err
    wrong = [{**box, "bbox": [1, 1, 40, 4]}, box, {**box, "category_id": 3}]
    file = written(folder / "i.json", {**content, "images": [image, {**image, "id": 2, "file_name": "z.jpg"}]})
    code, lines, _ = run(capsys, file)
    assert code == 1 and lines[0].startswith(f"{file}:images[1]: no image file 'z.jpg'")
    code, lines, _ = run(capsys, written(file, {**content, "annotations": wrong}))
    assert code == 1 and [line.split(": ")[0] for line in lines] == [f"{file}:annotations[{i}]" for i in (0, 2)]
    code, lines, _ = run(capsys, written(file, {**content, "categories": [{"id": 2}]}))
    assert code == 1 and "categories[0]" in lines[0] and len(lines) == 1, "not each of its boxes"


def test_errors_of_task_files_have_their_places(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions, annotations = vqa(folder)
    names = ("--image_names", "{:03d}.jpg")
    content = json.loads(questions.read_text())
    content["questions"][0]["image_id"] = content["questions"][2]["image_id"] = 9
    written(questions, content)
    code, lines, _ = run(capsys, annotations, "--questions", questions, "--images", folder / "images", *names)
    assert code == 1 and [line.split(": ")[0] for line in lines] == [f"{questions}:questions[{i}]" for i in (0, 2)]
    for options, message in (
        ((annotations, *names), "--questions is missing"),
        ((annotations, "--questions", questions), "--image_names is missing"),
        ((written(folder / JSONL, lines_of([ROW])), "--questions", questions), "--questions and --image_names are for"),
        ((folder / JSONL, "--label_key", "y", "--split_keys", "z"), "there is no option --split_keys"),
        ((folder / JSONL, "--label_key", "y", "--delimiter", ";"), "format jsonl of a task has no option 'delimiter'"),
    ):
        code, _, err = run(capsys, *options)
        assert code == 2 and message in err, err


def test_coco_lists_images_before_annotations(folder: Path) -> None:
    content = changed(COCO, "annotations.3", {"id": 4, "image_id": 7, "caption": ""})
    content["annotations"].append({"id": 5, "image_id": 9, "caption": "A BEE."})
    file = written(folder / "x.json", content)
    records = [line.removeprefix(f"{file}:").split(": ")[0] for line in check_file(file).problems]
    assert records == ["images[1]", "annotations[3]"]


@pytest.mark.parametrize(("number", "last"), [(20, None), (21, 1), (1500, 1480)])
def test_list_is_cut_after_20_problems(
    number: int, last: int | None, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [ROW] + [{"image": f"{i}.jpg", "caption": "x"} for i in range(number - 1)] + [{**ROW, "caption": "an ANT."}]
    file = written(folder / JSONL, lines_of(rows))
    code, lines, _ = run(capsys, file)
    assert code == 1 and lines[0].startswith(f"{file}:{1 if number == 20 else 2}: "), "errors come before remarks"
    assert lines[19].startswith(f"{file}:{min(number, 21)}: ") and ("remark: caption 2" in lines[0]) == (number == 20)
    assert lines[20:] == ([] if last is None else [f"... and {last:,} more problems"])


def test_folder_of_the_images_is_found_and_logged(folder: Path, caplog: Any) -> None:
    (folder / "annotations").mkdir()
    (folder / "empty").mkdir()
    with caplog.at_level(logging.INFO, logger="mmbert"):
        for file in (folder / "x.jsonl", folder / "images/x.jsonl", folder / "annotations/x.jsonl"):
            assert check_file(written(file, lines_of([ROW]))).total == 0
    taken = [r.getMessage() for r in caplog.records if r.getMessage().startswith("images in")]
    assert taken == [f"images in {folder / 'images'}"] * 3
    assert check_file(folder / "x.jsonl", images=folder / "images").total == 0
    (problem,) = check_file(folder / "x.jsonl", images=folder / "empty").problems
    assert problem == f"{folder / 'x.jsonl'}:1: no image file 'a.jpg'; expected it inside {folder / 'empty'}."
    (problem,) = check_file(folder / "x.jsonl", images=folder / "none").problems
    assert problem.startswith(f"{folder / 'none'}: no such folder; expected ")
    rows = [{**ROW, "image": "A.jpg"}, {**ROW, "image": "A.JPG"}]
    (problem,) = check_file(written(folder / "x.jsonl", lines_of(rows[:1]))).problems
    assert problem.endswith("There is 'a.jpg'.")


def test_several_keys_are_taken_as_given(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"pic": "a.jpg", "one": "x", "two": ["y"], "caption": 3}, {"pic": "c.jpg", "one": "", "two": "z"}]
    file = written(folder / JSONL, lines_of(rows))
    code, lines, err = run(capsys, file, "--image_key", "pic", "--caption_key", "one", "two")
    assert (code, lines) == (0, [f"{file}:2: remark: an empty caption; expected text, or no caption"])
    assert "| 2 images | 3 captions |" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["data", "chek", "x"], "Did you mean 'check'?"),
        (["dat", "check", "x"], "there is no command 'dat'; allowed are fit, validate, test,"),
        (["data", "check", "FILE", "--imags", "y"], "there is no option --imags. Did you mean 'images'?"),
        (["data", "check", "FILE", "--image", "y"], "there is no option --image. Did you mean"),
        (["data", "check"], "the following arguments are required: FILE"),
        (["data"], "the following arguments are required: check"),
        (["data", "check", "FILE", "--format", "jsnl"], "csv, vqav2, nlvr, nlvr2, foils, boxes. Did you mean 'jsonl'?"),
        (["data", "check", "FILE", "--format", "coco", "--split_key", "x"], "format coco has no option 'split_key'"),
        (["data", "check", "FILE", "--caption_key"], "--caption_key: expected at least one argument"),
    ],
)
def test_wrong_options_are_one_sentence(
    arguments: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(folder / JSONL, lines_of([ROW]))
    with pytest.raises(SystemExit) as stopped:
        main([str(file) if argument == "FILE" else argument for argument in arguments])
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and err.startswith("mmbert: error: ") and said in err


def test_help_mentions_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in ((["--help"], "data check"), (["data", "check", "--help"], "mmbert data check")):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 0
        assert said in capsys.readouterr().out


@pytest.mark.parametrize("name", ["none.json", "", "images", "nul\0.json", "pipe.jsonl", "nowhere/x.json"])
def test_unreadable_file_exits_1(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(folder / "pipe.jsonl")
    for options in ([], ["--format", "jsonl"], ["--format", "coco", "--images", folder]):
        code, lines, _ = run(capsys, f"{folder}/{name}", *options)
        assert code == 1 and len(lines) == 1 and "; expected a" in lines[0]


def test_train_py_runs_the_check_without_lightning(folder: Path) -> None:
    """The one true process; its terminal knows ASCII only."""
    file = written(folder / "é.jsonl", lines_of([ROW]) + "{")
    done = subprocess.run(
        [sys.executable, "-X", "importtime", ROOT / "train.py", "data", "check", str(file)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 1
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"{folder}/\\xe9.jsonl:2:2: broken JSON: ")
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert said[:2] == ["mmbert: detected keys: image_key image, caption_key caption",
                        f"mmbert: images in {folder / 'images'}"]  # fmt: skip
    assert len(said) == 3 and said[2].startswith("mmbert: jsonl | 1 images | 1 captions | 1 train | ")
    assert re.search(r"\| +torch\n", done.stderr) and not re.search(r"\| +lightning", done.stderr)


def test_killed_process_is_a_problem(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "MIN_PARALLEL_IMAGES", 0)
    monkeypatch.setattr(check.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(check, "load_image", lambda _: os._exit(1))  # what the kernel does to a process without memory
    file = written(folder / JSONL, lines_of([ROW]))
    report = check_file(file)
    assert report.problems == [f"{file}: a process that decodes its images was killed; expected enough memory"]


PIECES = st.sampled_from(
    ['{"image": "a.jpg", "caption": "x"}', "{", "}", "[", "]", '"', ",", "\n", ":", "NaN", "9" * 30, "1e999", "\ud800",
     "\\ud800", '"images"', '"annotations"', '"sentences"', '"filename"', "a.jpg", "image", "caption", ";", "\t",
     COCO_TEXT]
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["x.json", "x.jsonl", "x.csv", "x.tsv", "x"]),
    st.binary(max_size=40) | st.lists(PIECES, max_size=12).map(lambda p: "".join(p).encode("utf-8", "surrogatepass")),
)
def test_any_content_gives_a_report(folder: Path, name: str, content: bytes) -> None:
    file = written(folder / name, content)
    report = check_file(file)
    assert all(line.startswith(f"{file}") and line.isprintable() for line in report.problems)
    assert min(report.total, 20) == len(report.problems)


@pytest.mark.parametrize(
    ("file", "options", "total", "kinds"),
    [
        # Counted by a script of its own: json, Counter of normalised captions, SHA-256 of the files.
        ("ucm_captions/dataset_ucm.json", {}, 516, {"again": 515, "same bytes": 1}),
        ("openstax_figures/captions.jsonl", {}, 84, {"no text": 74, "same bytes": 10}),
        (
            "openstax_figures/captions.jsonl",
            {"caption_key": ["alt", "caption"], "split_key": "book"},
            84,
            {"an empty caption": 74, "same bytes": 10},
        ),
        ("nlvr/train.json", {}, 1, {"nor any other of 1,000": 1}),
        ("nlvr/train.json", {"images": "nlvr/train/images"}, 2, {"same bytes": 2}),
        ("nlvr/dev.json", {"images": "nlvr/dev/images"}, 3, {"same bytes": 3}),
        ("nlvr/test.json", {"images": "nlvr/test/images"}, 3, {"same bytes": 3}),
        ("tuxpaint_stamps/captions.jsonl", {}, 1, {"same bytes": 1}),
        ("coco_mini/annotations/captions_train2017.json", {}, 0, {}),
        ("coco_mini/annotations/captions_val2017.json", {}, 0, {}),
        ("coco_mini/vsr/all_vsr_raw_data.jsonl", {}, 0, {}),
        ("coco_mini/vsr/all_vsr_validated_data.jsonl", {}, 0, {}),
    ],
)
def test_real_data_has_the_problems_that_were_counted(
    file: str, options: dict[str, Any], total: int, kinds: dict[str, int], shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "MAX_LISTED", 1000)
    if "images" in options:
        options = {**options, "images": shared / "data" / options["images"]}
    report = check_file(shared / "data" / file, **options)
    assert report.total == len(report.problems) == total
    assert {kind: sum(kind in line for line in report.problems) for kind in kinds} == kinds
