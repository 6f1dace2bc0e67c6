"""A fine-tuned model's answers to every question of a VQA split, in the file that the evaluation server takes."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mmbert.data.queries import Query
from mmbert.data.readers.labelled import LabelledExample
from mmbert.data.readers.vqa import read_results
from mmbert.errors import UsageError
from mmbert.inference.capabilities import task_of
from mmbert.inference.loaded import LoadedModel


def predict_vqa(
    model: LoadedModel, examples: Sequence[LabelledExample], out: Path, *, batch_size: int = 64, num_workers: int = 0
) -> None:
    """Answers all questions and writes `[{"question_id": 1, "answer": "red"}, ...]`, in their order.

    What was written is read back as the score reads it, so every question of the split is in the file exactly once;
    then it takes the place of `out`, which until then stays as it was.

    Args:
        model: Fine-tuned with model.task=vqa.
        examples: What `read_vqav2` found: one image each.
        out: The file.
        batch_size: Questions in one call of the model.
        num_workers: Processes that decode images.

    Raises:
        UsageError: The model was trained for something else, or `out` can't be a file.
        DataError: An image that can't be read, with its record.
    """
    task_of(model.model, model.name, "vqa")
    if out.is_dir() or not out.parent.is_dir():  # said before the work, not after it
        raise UsageError(f"--out {out}: {'is a folder' if out.is_dir() else 'its folder does not exist'}; give a file.")
    asked = [Query(example.image, example.text, example.place) for example in examples]
    answers: dict[int, str] = {}
    with _progress() as progress:
        bar = progress.add_task("questions", total=len(asked))
        for rows in model.answers(asked, batch_size=batch_size, num_workers=num_workers):
            answers.update((position, best[0].answer) for position, best in rows)
            progress.advance(bar, len(rows))
    lines = [json.dumps({"question_id": e.key, "answer": answers[i]}) for i, e in enumerate(examples)]
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w") as file:
            file.write("[\n" + ",\n".join(lines) + "\n]\n")
            file.flush()
            os.fsync(file.fileno())
        read_results(temporary, [int(example.key) for example in examples])
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)


def _progress() -> Progress:
    """A bar on a terminal, nothing in a file."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())
