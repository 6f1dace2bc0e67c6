"""Options of the section `data`: mappings with unknown splits are errors, and options without effect are warnings."""

import logging
from typing import Any

import pytest

from mmbert.data.options import DataOptions, check_options, reader_options
from mmbert.errors import UsageError

FILES: dict[str, Any] = {"annotations": {"train": "a", "test_b": "c"}, "images": "i"}


@pytest.mark.parametrize(
    ("changes", "task", "message"),
    [
        (
            {"annotations": {"tain": "a"}},
            None,
            r"data.annotations.tain: allowed are train, val, .* Did you mean 'train'",
        ),
        ({"images": {"train": "a", "vall": "b"}}, None, r"data.images.vall: allowed are .* Did you mean 'val'"),
        (
            {"images": {"train": "a", "val": "b"}},
            None,
            r"data.images.val: data.annotations has no such split, only train",
        ),
        ({"image_names": {"tset": "{}"}}, "vqa", r"data.image_names.tset: allowed are .* Did you mean 'test'"),
        ({"questions": {"train": "q", "test": "r"}}, "vqa", r"data.questions.test: .* Did you mean 'test_b'"),
        ({"split_key": "s", "split_values": {"dev": ["x"]}}, None, r"data.split_values.dev: allowed are"),
        ({"delimiter": "|"}, "decision", r"data.delimiter='\|' is for pretraining, not for model.task=decision"),
        ({"drop_uncaptioned": True}, "vqa", r"data.drop_uncaptioned=True is for pretraining"),
        ({"label_key": "y"}, None, r"data.label_key='y' is for a task"),
    ],
)
def test_option_for_other_data_or_an_unknown_split_is_an_error(
    changes: dict[str, Any], task: str | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        check_options(DataOptions(**{**FILES, **changes}), task=task)


@pytest.mark.parametrize(
    ("changes", "task", "names"),
    [
        ({"whole_word": True, "mlm_probability": 0.4, "test_captions": 5}, None, []),
        ({"whole_word": True, "mlm_probability": 0.4, "test_captions": 5}, "vqa",
         ["mlm_probability", "test_captions", "whole_word"]),
        ({"min_answer_count": 2}, "vqa", []),
        ({"min_answer_count": 2}, "decision", ["min_answer_count"]),
        ({"min_answer_count": 2}, None, ["min_answer_count"]),
        ({"max_bad_fraction": 0.5}, None, ["max_bad_fraction"]),
        ({"max_bad_fraction": 0.5, "on_bad_sample": "skip"}, None, []),
        ({"images": "", "image_key": None, "flip": True, "crop": 0.5}, "decision", ["crop", "flip"]),
    ],
)  # fmt: skip
def test_option_without_effect_is_a_warning(
    changes: dict[str, Any], task: str | None, names: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="mmbert"):
        check_options(DataOptions(**{**FILES, **changes}), task=task)
    messages = sorted(r.getMessage() for r in caplog.records)
    assert [m.split("=")[0] for m in messages] == [f"data.{name}" for name in names]
    assert all("has no effect here: it is for" in m for m in messages)


def test_reader_gets_what_is_set() -> None:
    assert reader_options(DataOptions(format="coco")) == {}
    assert reader_options(DataOptions(format="coco", drop_uncaptioned=True)) == {"drop_uncaptioned": True}
    assert reader_options(DataOptions(format="csv", delimiter="tab"))["delimiter"] == "tab"
