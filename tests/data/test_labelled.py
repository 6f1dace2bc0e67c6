"""Readers of labelled examples: what they read, and one error with file and record for what they can't."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmbert.data.labelled import read_labelled
from mmbert.data.readers.easy_vqa import VALIDATION_FROM, package_folder, read_easy_vqa
from mmbert.data.readers.image_names import image_name_formatter
from mmbert.errors import DataError, UsageError


def image(folder: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        file = folder / "images" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, 0, 0)).save(file)
    return folder / "images"


def lines(folder: Path, *rows: Any, name: str = "rows.jsonl") -> str:
    file = folder / name
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(file)


def test_snli_ve_as_published(tmp_path: Path) -> None:
    images = image(tmp_path, "4705552913.jpg")
    row = {"Flickr30K_ID": "4705552913", "gold_label": "neutral", "sentence1": "premise", "sentence2": " A man. ",
           "pairID": "4705552913.jpg#2r1n"}  # fmt: skip
    found = read_labelled(
        "jsonl", {"train": lines(tmp_path, row)}, str(images), image_key="Flickr30K_ID", image_names="{}.jpg",
        text_key="sentence2", label_key="gold_label", id_key="pairID",
    )["train"]  # fmt: skip
    assert [(e.text, e.answers, e.key, e.image.name) for e in found] == [
        ("A man.", ("neutral",), "4705552913.jpg#2r1n", "4705552913.jpg")
    ]


def test_hateful_memes_as_published(tmp_path: Path) -> None:
    images = image(tmp_path, "img/08291.png")
    row = {"id": 8291, "img": "img/08291.png", "label": 1, "text": "text"}
    found = read_labelled("jsonl", {"train": lines(tmp_path, row)}, str(images), image_key="img", id_key="id")
    assert [(e.answers, e.key) for e in found["train"]] == [(("1",), 8291)]


def test_text_alone_and_two_images(tmp_path: Path) -> None:
    images = image(tmp_path, "a.png", "b.png")
    row = {"left": "a.png", "right": "b.png", "text": "same", "label": True}
    file = lines(tmp_path, row)
    alone = read_labelled("jsonl", {"train": file}, "", image_key=None)["train"][0]
    assert alone.images == () and alone.answers == ("true",)
    both = read_labelled("jsonl", {"train": file}, str(images), image_key=["left", "right"])["train"][0]
    assert [image.name for image in both.images] == ["a.png", "b.png"]


def test_nlvr_keeps_what_gives_the_label_away_out(shared: Path) -> None:
    folder = shared / "data/nlvr"
    splits = ("train", "val", "test")
    files = {s: str(folder / f"{'dev' if s == 'val' else s}.json") for s in splits}
    images = {s: str(folder / ("dev" if s == "val" else s) / "images") for s in splits}
    found = read_labelled("nlvr", files, images)
    assert len(found["train"]) == 1000 and {e.answers for e in found["train"]} == {("true",), ("false",)}
    true = sum(e.answers == ("true",) for e in found["test"]) / len(found["test"])
    assert true == pytest.approx(0.562, abs=0.001), "SOURCE.md says so"
    assert all("-" not in e.group for e in found["test"]), "a group is a sentence"


def test_nlvr2_pairs_two_images_and_groups_by_statement(tmp_path: Path) -> None:
    images = image(tmp_path, "dev-1-0-img0.png", "dev-1-0-img1.png", "dev-1-2-img0.png", "dev-1-2-img1.png")
    rows = [{"identifier": f"dev-1-{pair}-0", "sentence": "Two dogs.", "label": "True"} for pair in (0, 2)]
    found = read_labelled("nlvr2", {"val": lines(tmp_path, *rows)}, str(images))["val"]
    assert [[i.name for i in e.images] for e in found] == [
        ["dev-1-0-img0.png", "dev-1-0-img1.png"], ["dev-1-2-img0.png", "dev-1-2-img1.png"],
    ]  # fmt: skip
    assert {e.group for e in found} == {"dev-1-0"} and found[0].answers == ("true",)


def vqa_files(folder: Path, **changes: Any) -> dict[str, Any]:
    question = {"image_id": 7, "question_id": 70, "question": "What colour?", **changes}
    answers = [{"answer": "red", "answer_id": i} for i in range(10)]
    annotation = {"question_id": 70, "question_type": "what", "answer_type": "other", "answers": answers,
                  "multiple_choice_answer": "red", "image_id": 7}  # fmt: skip
    (folder / "q.json").write_text(json.dumps({"questions": [question]}))
    (folder / "a.json").write_text(json.dumps({"annotations": [annotation]}))
    files = {"annotations": {"train": str(folder / "a.json")}, "questions": {"train": str(folder / "q.json")}}
    return {**files, "images": str(image(folder, "COCO_train2014_000000000007.jpg"))}


def test_vqav2_by_template_and_by_file(tmp_path: Path) -> None:
    files = vqa_files(tmp_path)
    names = tmp_path / "captions.json"
    names.write_text(json.dumps({"images": [{"id": 7, "file_name": "COCO_train2014_000000000007.jpg"}]}))
    for image_names in ("COCO_train2014_{:012d}.jpg", {"train": str(names)}):
        found = read_labelled("vqav2", **files, image_names=image_names)["train"][0]
        assert found.image.name == "COCO_train2014_000000000007.jpg"
        assert found.answers == ("red",) * 10 and (
            found.question_type,
            found.answer_type,
            found.most_frequent_answer,
        ) == ("what", "other", "red")


def test_easy_vqa_of_the_package() -> None:
    pytest.importorskip("easy_vqa", reason="needs the package easy-vqa")
    examples = read_easy_vqa(package_folder())
    by_split = {s: [e for e in examples if e.split == s] for s in ("train", "val", "test")}
    assert len(by_split["train"]) + len(by_split["val"]) == 38575 and len(by_split["test"]) == 9673
    assert {int(e.image.stem) for e in by_split["val"]} == set(range(VALIDATION_FROM, 4000))
    assert not {e.image for e in by_split["val"]} & {e.image for e in by_split["train"]}
    assert len({e.answers[0] for e in examples}) == 13


ROW = {"image": "a.png", "text": "a cat", "label": "yes"}
BROKEN = [
    ({**ROW, "text": 3}, "rows.jsonl:1: .*number 3"),
    ({**ROW, "text": " "}, "rows.jsonl:1: an empty text"),
    ({**ROW, "label": 0.5}, "rows.jsonl:1: label is the number 0.5"),
    ({"image": "a.png", "txt": "a", "label": 1}, "no key 'text'"),
    ({**ROW, "image": "b.png"}, "no image file 'b.png'"),
    ({**ROW, "image": "../a.png"}, "relative path without"),
    ("{", "rows.jsonl:1:.*broken JSON"),
    ("", "the file is empty"),
]


@pytest.mark.parametrize(("row", "message"), BROKEN)
def test_broken_row_names_file_and_record(row: Any, message: str, tmp_path: Path) -> None:
    images = image(tmp_path, "a.png")
    with pytest.raises(DataError, match=message):
        read_labelled("jsonl", {"train": lines(tmp_path, row)}, str(images))


def test_row_that_comes_twice_is_an_error(tmp_path: Path) -> None:
    images = image(tmp_path, "a.png")
    file = lines(tmp_path, {**ROW, "id": 1}, {**ROW, "id": 1})
    with pytest.raises(DataError, match=r"rows.jsonl:2: id 1 again, as in .*rows.jsonl:1"):
        read_labelled("jsonl", {"train": file}, str(images), id_key="id")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"identifier": "dev-1-0", "sentence": "a", "label": "True"}], "SPLIT-SET-PAIR-SENTENCE"),
        ([{"identifier": "dev-1-0-0", "sentence": "a", "label": "maybe"}], "label 'maybe'.*true or false"),
        ([{"identifier": "dev-1-0-0", "sentence": "a", "label": "True"}] * 2, "again, as in"),
    ],
)
def test_broken_nlvr2_is_an_error(rows: list[Any], message: str, tmp_path: Path) -> None:
    images = image(tmp_path, "dev-1-0-img0.png", "dev-1-0-img1.png")
    with pytest.raises(DataError, match=message):
        read_labelled("nlvr2", {"val": lines(tmp_path, *rows)}, str(images))


@pytest.mark.parametrize(
    ("changes", "image_names", "message"),
    [
        ({"image_id": 8}, "COCO_train2014_{:012d}.jpg", r"questions\[0\]: no image file"),
        ({"image_id": "x"}, "COCO_train2014_{:012d}.jpg", "image_id 'x' does not fit image_names"),
        ({"question": ""}, "COCO_train2014_{:012d}.jpg", "an empty text"),
        ({"question_id": 71}, "COCO_train2014_{:012d}.jpg", "question_id 70"),
    ],
)
def test_broken_vqav2_is_an_error(changes: dict[str, Any], image_names: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_labelled("vqav2", **vqa_files(tmp_path, **changes), image_names=image_names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "vqa2"}, "'vqa2' is not known for tasks.*Did you mean 'vqav2'"),
        ({"format": "vqav2"}, "needs data.questions and data.annotations as"),
        ({"format": "nlvr", "text_key": "text"}, "data.text_key: format nlvr has no such option"),
    ],
)
def test_options_that_can_not_be_meant(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        read_labelled(**{"annotations": {"train": "x"}, "images": "", **options})


def test_image_in_two_splits_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = image(tmp_path, "a.png", "b.png")
    files = {"train": lines(tmp_path, ROW), "test": lines(tmp_path, ROW, {**ROW, "image": "b.png"}, name="t.jsonl")}
    read_labelled("jsonl", files, str(images))
    assert "1 examples have an image that is in train or val and another split too" in caplog.text


@pytest.mark.parametrize(
    ("template", "image_id", "name"),
    [
        ("COCO_val2014_{:012d}.jpg", 7, "COCO_val2014_000000000007.jpg"),
        ("COCO_val2014_{:012}.jpg", "7", "COCO_val2014_000000000007.jpg"),
        ("{}.jpg", "007", "007.jpg"),
        ("{0}/{0}.jpg", 7, "7/7.jpg"),
        ("{{x}}_{:3d}.jpg", 7, "{x}_  7.jpg"),
        ("{:s}.jpg", 7, "7.jpg"),
    ],
)
def test_template_of_image_names(template: str, image_id: int | str, name: str) -> None:
    assert image_name_formatter(template)(image_id, "here") == name


@pytest.mark.parametrize(
    "template",
    ["COCO_val2014.jpg", "{", "}", "{}_{}.jpg", "{1}.jpg", "{val}_{}.jpg", "{!r}.jpg", "{0.__class__}.jpg", "{0[0]}",
     "{:x}.jpg", "{:99999999999d}.jpg", "{:{}}.jpg"],
)  # fmt: skip
def test_template_that_names_no_image_is_an_error(template: str) -> None:
    with pytest.raises(UsageError, match=r"data.image_names=.*expected a template with one \{\} for the image id"):
        image_name_formatter(template)


def test_zero_padded_names_of_jsonl_by_split_and_by_file(tmp_path: Path) -> None:
    images = image(tmp_path, "COCO_000000000007.jpg")
    rows = [{"image_id": 7, "text": "a cat", "label": 1}, {"image_id": "7", "text": "a cat", "label": 1}]
    file = lines(tmp_path, *rows)
    (tmp_path / "names.json").write_text('{"images": [{"id": 7, "file_name": "COCO_000000000007.jpg"}]}')
    options: dict[str, Any] = {"image_key": "image_id"}
    for names in ("COCO_{:012d}.jpg", {"train": "COCO_{:012d}.jpg"}):
        found = read_labelled("jsonl", {"train": file}, str(images), image_names=names, **options)["train"]
        assert [e.image.name for e in found] == ["COCO_000000000007.jpg"] * 2
    with pytest.raises(DataError, match=r"rows.jsonl:2: image_id '7'; expected an id of .*names.json"):
        read_labelled("jsonl", {"train": file}, str(images), image_names=str(tmp_path / "names.json"), **options)
    (tmp_path / "names.json").write_text('{"images": [{"id": [7], "file_name": "COCO_000000000007.jpg"}]}')
    with pytest.raises(DataError, match=r"names.json:images\[0\]: id is a list of 1"):
        read_labelled("jsonl", {"train": file}, str(images), image_names=str(tmp_path / "names.json"), **options)
