"""Write a fine-tuned model's predictions for a file of questions or statements."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mmbert.data.queries import Query
from mmbert.data.readers.labelled import LabelledExample
from mmbert.data.readers.vqa import read_results
from mmbert.errors import DataError
from mmbert.inference.capabilities import task_of
from mmbert.inference.loaded import Answer, LoadedModel
from mmbert.runtime.files import check_output_file


def predict_vqa(
    model: LoadedModel, examples: Sequence[LabelledExample], out: Path, *, batch_size: int = 64, num_workers: int = 0
) -> None:
    """Answer all questions and write `[{"question_id": 1, "answer": "red"}, ...]`, as VQA's evaluation server takes it.

    The written file is read back as `mmbert score vqa` reads it, so it has every question of the split exactly once;
    only then does it replace `out`.

    Args:
        model: Fine-tuned with model.task=vqa.
        examples: Questions of `read_vqav2`, with one image each.
        out: The file.
        batch_size: Questions per forward pass.
        num_workers: Processes that decode images.

    Raises:
        UsageError: The model was trained for something else, or `out` can't be a file.
        DataError: An unreadable image, with its record.
    """
    task_of(model.model, model.name, "vqa")
    check_output_file(out)
    answers = _answer_all(model, examples, 1, batch_size, num_workers)
    rows = [{"question_id": e.key, "answer": best[0].answer} for e, best in zip(examples, answers, strict=True)]
    _write_verified(out, rows, lambda file: read_results(file, [int(example.key) for example in examples]))


def predict_decisions(
    model: LoadedModel, examples: Sequence[LabelledExample], out: Path, *, batch_size: int = 64, num_workers: int = 0
) -> None:
    """Predict the label of all examples and write `[{"id": 1, "label": "yes", "probabilities": {"yes": 0.9, ...}}]`.

    Args:
        model: Fine-tuned with model.task=decision.
        examples: Examples with the images that the model takes; their labels are not used.
        out: The file; JSON lines where its name ends in .jsonl.
        batch_size: Examples per forward pass.
        num_workers: Processes that decode images.

    Raises:
        UsageError: The model was trained for something else, or `out` can't be a file.
        DataError: An unreadable image, with its record.
    """
    labels = task_of(model.model, model.name, "decision").labels
    check_output_file(out)
    rows = []
    for example, ranked in zip(
        examples, _answer_all(model, examples, len(labels), batch_size, num_workers), strict=True
    ):
        probabilities = {answer: score for answer, score in ranked}
        row = {"id": example.key, "label": ranked[0].answer, "probabilities": {x: probabilities[x] for x in labels}}
        rows.append(row)
    _write_verified(out, rows)


def _answer_all(
    model: LoadedModel, examples: Sequence[LabelledExample], top_k: int, batch_size: int, num_workers: int
) -> list[list[Answer]]:
    """Compute the `top_k` best answers of each example, in the order of the examples, with a progress bar."""
    queries = [Query(example.images, example.text, example.place) for example in examples]
    answers: dict[int, list[Answer]] = {}
    with _progress() as progress:
        bar = progress.add_task("predictions", total=len(queries))
        for rows in model.answers(queries, top_k=top_k, batch_size=batch_size, num_workers=num_workers):
            answers.update(rows)
            progress.advance(bar, len(rows))
    return [answers[i] for i in range(len(queries))]


def _write_verified(out: Path, rows: Sequence[dict[str, Any]], verify: Callable[[Path], object] = bool) -> None:
    """Write rows as JSON or JSON lines, read the file back, and only then replace `out`."""
    lines = [json.dumps(row) for row in rows]
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    text = "\n".join(lines) + "\n" if out.suffix == ".jsonl" else "[\n" + ",\n".join(lines) + "\n]\n"
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        verify(temporary)
        if temporary.read_text(encoding="utf-8") != text:
            raise DataError(str(temporary), "was not written completely", "space on the disk")
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)


def _progress() -> Progress:
    """Create a progress bar that is shown on a terminal only."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())
