"""Files in SugarCrepe's format: what is read, and one error that names file and record."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from mmbert.data.readers.base import ImageFolder
from mmbert.data.readers.foils import read_foils
from mmbert.errors import DataError

GOOD = {"filename": "a.jpg", "caption": " a red cat ", "negative_caption": "a blue cat"}


def write(folder: Path, records: Any, name: str = "swap_att.json") -> Path:
    file = folder / name
    file.write_text(records if isinstance(records, str) else json.dumps(records))
    return file


def test_records_come_in_order_with_the_category_or_the_name_of_the_file(root: Path, tmp_path: Path) -> None:
    other = {**GOOD, "filename": "sub/b.jpg", "category": "colors"}
    files = [write(tmp_path, {"7": GOOD, "3": other}), write(tmp_path, {"7": GOOD}, "add_obj.json")]
    foils = read_foils(files, ImageFolder(root))
    assert [foil.category for foil in foils] == ["swap_att", "colors", "add_obj"]
    assert [foil.image.name for foil in foils] == ["a.jpg", "b.jpg", "a.jpg"]
    assert foils[0][1:3] == ("a red cat", "a blue cat")
    assert foils[1].place == f"{files[0]}:3"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({**GOOD, "filename": "b.jpg"}, "no image file 'b.jpg'"),
        ({**GOOD, "filename": "../a.jpg"}, "a relative path without '..'"),
        ({**GOOD, "filename": None}, "filename is null; expected a string"),
        ({**GOOD, "caption": "  "}, "an empty caption"),
        ({**GOOD, "negative_caption": ""}, "an empty negative_caption"),
        ({**GOOD, "negative_caption": 3}, "the caption is the number 3"),
        ({**GOOD, "category": 3}, "category is the number 3"),
        ({"filename": "a.jpg", "caption": "x", "negative_captions": "y"}, "Did you mean 'negative_captions'"),
        ([GOOD], "the record is a list of 1; expected an object"),
        ({**GOOD, "caption": "\ud800"}, "half a surrogate pair"),
    ],
)
def test_bad_record_is_named(record: Any, message: str, root: Path, tmp_path: Path) -> None:
    file = write(tmp_path, {"1": GOOD, "2": record})
    with pytest.raises(DataError) as error:
        read_foils([file], ImageFolder(root))
    assert str(error.value).startswith(f"{file}:2: ") and message in str(error.value), error.value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "no records"),
        ("[]", "the file is a list of 0; expected an object"),
        ("", "the file is empty"),
        ('{"1": ', "broken JSON"),
        ('{"1": {}, "1": {}}', "the same key twice"),
    ],
)
def test_bad_file_is_named(content: str, message: str, root: Path, tmp_path: Path) -> None:
    files = [write(tmp_path, {"1": GOOD}), write(tmp_path, content, "bad.json")]
    with pytest.raises(DataError) as error:
        read_foils(files, ImageFolder(root))
    assert str(error.value).startswith(str(files[1])) and message in str(error.value), error.value


def test_all_problems_of_all_files_are_listed_at_once(root: Path, tmp_path: Path) -> None:
    bad = {"filename": "a.jpg"}
    files = [write(tmp_path, {"1": bad, "2": GOOD, "3": bad}), write(tmp_path, {"4": bad}, "other.json")]
    with pytest.raises(DataError) as error:
        read_foils(files, ImageFolder(root))
    assert [line.split(": ")[0].rsplit(":")[-1] for line in str(error.value).splitlines()] == ["1", "3", "4"]


def test_foil_equal_to_its_caption_is_kept_and_counted(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        foils = read_foils([write(tmp_path, {"1": {**GOOD, "negative_caption": "a red cat"}})], ImageFolder(root))
    assert len(foils) == 1 and "foils equal to their caption: 1" in caplog.text


def test_sugarcrepe_is_read(shared: Path) -> None:
    folder = shared / "data/coco_mini"
    foils = read_foils(sorted((folder / "sugarcrepe").glob("*.json")), ImageFolder(folder / "images"))
    assert len(foils) == 83 and len({foil.category for foil in foils}) == 7
