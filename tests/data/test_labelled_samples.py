"""Labelled samples: mirroring, few answers, and labels that training does not have."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_examples, tiny_processor

from mmbert.data.labelled_datamodule import LabelledDataModule, read_task_data
from mmbert.data.labelled_samples import LabelledSamples
from mmbert.data.options import DataOptions
from mmbert.data.readers.labelled import LabelledExample
from mmbert.data.readers.vqa import repeat_few_answers
from mmbert.data.samples import Augmentation
from mmbert.errors import DataError
from mmbert.metrics.vqa import question_accuracy
from mmbert.model.tasks.vqa import VisualQuestionAnswering


@pytest.mark.parametrize(
    ("text", "answers", "mirrored"),
    [
        ("a cat", ("yes",), True),
        ("the cat on the left", ("yes",), False),
        ("which side is the cat on", ("red", "Right"), False),
        ("a cat", ("bright",), True),
    ],
)
def test_image_is_not_mirrored_where_text_or_answers_mention_left_or_right(
    text: str, answers: tuple[str, ...], mirrored: bool, tmp_path: Path
) -> None:
    file = tiny_examples(tmp_path, [("x",)])[0].image
    example = LabelledExample((file,), text, answers, 0, "train", "here")
    data = LabelledSamples([example], [{0: 1.0}], tiny_processor(), seed=0, augmentation=Augmentation(flip=True))
    plain = data.processor.pixel_values(file)
    flips = [not torch.equal(data[epoch, 0].pixel_values[0], plain) for epoch in range(20)]
    assert any(flips) == mirrored and not all(flips)


@pytest.mark.parametrize(
    ("answers", "scores"),
    [
        (["red"], {"red": 1.0}),
        (["red", "blue"], {"red": 1.0, "blue": 1.0}),
        (["red", "red", "blue"], {"red": 1.0, "blue": 8 / 9}),  # of 9: blue 3 times, (3 * 2/3 + 6) / 9
        (["red", "a", "b", "c", "d"], {"red": 0.6}),  # of 10: twice
        (["red"] * 3 + ["x"] * 7, {"red": 0.9, "x": 1.0}),
        (["red"] + ["x"] * 19, {"red": 19 / 20 / 3}),
    ],
)
def test_answer_lists_of_any_length_have_a_score(answers: list[str], scores: dict[str, float]) -> None:
    given = repeat_few_answers(answers)
    found = VisualQuestionAnswering.scores(given, {answer: i for i, answer in enumerate(scores)})
    assert [found[i] for i in range(len(scores))] == pytest.approx([*scores.values()])
    records = [{"answer": answer, "answer_id": i} for i, answer in enumerate(given)]
    assert [question_accuracy(answer, records) for answer in scores] == pytest.approx([*scores.values()])


def test_ten_answers_stay_as_they_are() -> None:
    answers = tuple(f"answer {i}" for i in range(10))
    assert repeat_few_answers(answers) == answers and repeat_few_answers(answers[:6]) == answers[:6]


def vqa_options(folder: Path) -> DataOptions:
    """A VQA set with one answer for each question."""
    tiny_examples(folder, [("x",)] * 4)
    rows = [(i, "red" if i % 2 else "blue") for i in range(4)]
    questions = [{"question_id": i, "image_id": i, "question": "a cat"} for i, _ in rows]
    kinds = {"question_type": "what", "answer_type": "other"}
    annotations = [{"question_id": i, "answers": [{"answer": a}], **kinds} for i, a in rows]
    (folder / "q.json").write_text(json.dumps({"questions": questions}))
    (folder / "a.json").write_text(json.dumps({"annotations": annotations}))
    return DataOptions(
        format="vqav2", annotations={"train": str(folder / "a.json")}, questions={"train": str(folder / "q.json")},
        images=str(folder), image_names="{}.png", min_answer_count=1, batch_size=1, num_workers=0,
    )  # fmt: skip


def test_questions_with_one_answer_train(tmp_path: Path) -> None:
    options = vqa_options(tmp_path)
    examples, labels = read_task_data(options, "vqa")
    data = LabelledDataModule(options, examples, labels, tiny_processor(), task="vqa", seed=0)
    assert labels == ["blue", "red"] and len(data.train_samples) == 4
    assert [data.train_samples[i].scores for i in range(4)] == [{0: 1.0}, {1: 1.0}] * 2


def decisions(folder: Path, **labels: list[Any]) -> DataOptions:
    tiny_examples(folder, [("x",)] * 4)
    for split, values in labels.items():
        rows = [json.dumps({"image": f"{i}.png", "text": "a cat", "label": v}) for i, v in enumerate(values)]
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    files = {split: str(folder / f"{split}.jsonl") for split in labels}
    return DataOptions(format="jsonl", annotations=files, images=str(folder), batch_size=1, num_workers=0)


def module(options: DataOptions) -> LabelledDataModule:
    examples, labels = read_task_data(options, "decision")
    return LabelledDataModule(options, examples, labels, tiny_processor(), task="decision", seed=0)


def test_labels_that_training_does_not_have_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = decisions(tmp_path, train=["true", "false"], val=["true"], test=["true", "True", "maybe"])
    with caplog.at_level(logging.WARNING, logger="mmbert"):
        data = module(options)
    assert len(data.test_samples["test"]) == 3, "they stay in the accuracy"
    message = caplog.records[-1].getMessage()
    assert message.startswith("2 of 3 examples of test have no answer among the 2 labels of training ('false', 'true'")
    assert f"(first: 'True', {tmp_path}/test.jsonl:2) Did you mean 'true'?" in message


def test_split_without_any_known_label_is_an_error(tmp_path: Path) -> None:
    options = decisions(tmp_path, train=["true", "false"], test=["True", "False"])
    with pytest.raises(DataError, match=r"test.jsonl:1: the answer 'True', and no answer of the 2 examples of test"):
        module(options)


def test_example_without_a_label_names_the_command_that_predicts_it(tmp_path: Path) -> None:
    options = decisions(tmp_path, train=["true", "false"], test=[None])
    with pytest.raises(DataError, match=r"test.jsonl:1: no label or answer; .* `mmbert predict decision RUN/model`"):
        module(options)
