"""What every evaluation starts from: a model in evaluation mode, and the examples of a split."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mmbert.data.examples import Example, read_examples
from mmbert.data.processor import MMBertProcessor
from mmbert.errors import DataError, UsageError
from mmbert.evaluation.model_cache import Computation
from mmbert.inference.cached_images import evaluation_computation
from mmbert.inference.loaded import LoadedModel, load
from mmbert.model.modeling import MMBertForPreTraining, MMBertPreTrainedModel

ModelSource = str | Path | LoadedModel | MMBertPreTrainedModel
"""A folder, a loaded model, or a model that is given with its processor."""


class ReadyModel(NamedTuple):
    """Model in evaluation mode, its processor, and how it computes."""

    model: MMBertForPreTraining
    processor: MMBertProcessor
    computation: Computation


@contextmanager
def ready_model(
    model: ModelSource,
    processor: MMBertProcessor | None,
    device: str | torch.device | None,
    precision: str | None,
) -> Iterator[ReadyModel]:
    """Load a folder, or take the model as it is; in evaluation mode and the precision inside the block."""
    folder = None
    if isinstance(model, str | Path):
        model = load(model, device)
    place = "model is"
    if isinstance(model, LoadedModel):
        folder = model.name
        place, processor, model = f"'{model.name}' holds", model.processor, model.model
    if not isinstance(model, MMBertForPreTraining):
        raise UsageError(
            f"{place} a {type(model).__name__}, which has no head to rank with; give the folder RUN/model of a run "
            "that was pretrained with itm, itc or both."
        )
    if processor is None:
        raise UsageError("processor is missing: give the MMBertProcessor of the model, or the folder of a saved model.")
    computation = evaluation_computation(precision, model.mmbert, folder)
    was_training = model.training
    model.eval()
    try:
        with computation.context():
            yield ReadyModel(model, processor, computation)
    finally:
        model.train(was_training)


def read_split(
    file: str | Path, images: str | Path | None, format: str, split: str, keys: Mapping[str, Any]
) -> Sequence[Example]:
    """Read the examples of one split.

    Args:
        file: Annotation file.
        images: Folder of the images.
        format: A name in `mmbert.data.readers.FORMATS`.
        split: Name of the split; for a file without splits the name that its examples get.
        keys: Options of the reader.

    Raises:
        DataError: Something is wrong with the file, or the split has no image.
        UsageError: An unknown format or option, or no folder of images.
    """
    folder = str(require_images(images))
    if format == "karpathy":
        found = read_examples(format, file, folder, only=split, **keys)
    elif "split_key" in keys:
        found = read_examples(format, file, folder, **keys)
    else:
        found = read_examples(format, {split: file}, folder, **keys)
    if not found.get(split):
        raise DataError(str(file), f"no image in the split {split!r}", f"one of the splits it has: {', '.join(found)}")
    return found[split]


def split_name(split: str | None, *, has_splits: bool, format: str) -> str:
    """Name of the split to evaluate: test by default."""
    if split is not None and not has_splits:
        how = ", or give split_key, the field with the split" if format in ("jsonl", "csv") else ""
        raise UsageError(f"split='{split}': a file of format {format} is one split; leave split out{how}.")
    return split or "test"


def check_sizes(batch_size: int, num_workers: int) -> None:
    """Raise on a batch size below 1 or a negative number of workers."""
    for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
        if value < least:
            raise UsageError(f"{name}={value}: must be {least} or more.")


def require_images(images: str | Path | None) -> str | Path:
    """Return the folder of the images; raise if it is not given."""
    if images is None:
        raise UsageError("images is missing: give the folder of the images.")
    return images


def align_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align the columns of a text table: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
