"""Precision of an evaluation of a saved model, and the encoder cache that it reads images from."""

import functools
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from torch import Tensor

from mmbert.data.encoder_cache import EncoderCache
from mmbert.data.images import ImageSource
from mmbert.data.processor import MMBertProcessor
from mmbert.errors import UsageError, did_you_mean
from mmbert.evaluation.encoding import LoadImage
from mmbert.evaluation.model_cache import Computation, fill_cache, find_store, reading_cache
from mmbert.evaluation.options import PRECISIONS
from mmbert.model.modeling import MMBertModel

HALF = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def evaluation_computation(requested: str | None, model: MMBertModel, folder: str | Path | None) -> Computation:
    """Choose precision and device of an evaluation.

    Args:
        requested: A name in `PRECISIONS`; None: the precision of the run that the folder belongs to, or 32-true.
        model: On its device.
        folder: RUN/model, which has RUN/config.yaml beside it.

    Raises:
        UsageError: An unknown precision.
    """
    precision = requested or _run_precision(folder) or "32-true"
    if precision not in PRECISIONS:
        raise UsageError(
            f"precision='{precision}'; allowed are {', '.join(PRECISIONS)}.{did_you_mean(precision, PRECISIONS)}"
        )
    device = model.word_embeddings.device
    half = HALF.get(precision)
    return Computation(precision, device, lambda: torch.autocast(device.type, half, enabled=half is not None))


def _run_precision(folder: str | Path | None) -> str | None:
    if folder is None:
        return None
    try:
        config = yaml.safe_load((Path(folder).resolve().parent / "config.yaml").read_text(encoding="utf-8"))
        found = config["trainer"]["precision"]
    except (OSError, UnicodeError, yaml.YAMLError, KeyError, TypeError):
        return None
    return found if found in PRECISIONS else None


@contextmanager
def cached_images(
    model: MMBertModel,
    processor: MMBertProcessor,
    root: str | Path | None,
    images: Iterable[ImageSource],
    computation: Computation,
    *,
    batch_size: int,
    num_workers: int = 0,
) -> Iterator[EncoderCache | None]:
    """Open the encoder cache for an evaluation: inside the block the model continues from its hidden states.

    A store that a training run filled with the weights of the model is read, otherwise one with the outputs of the
    whole encoder is; images that are missing are computed and added.

    Args:
        model: In evaluation mode.
        processor: The model's.
        root: Folder of the stores, as `data.cache` of a run; None: no cache, and nothing changes.
        images: Of which the files are cached.
        computation: Precision and device.
        batch_size: Images per call of the encoder.
        num_workers: Processes that decode images.

    Raises:
        UsageError: The folder can't be written, or the disk is too small.
        BadImageError: An image that can't be read.
    """
    files = [(Path(image), None) for image in dict.fromkeys(x for x in images if isinstance(x, str | os.PathLike))]
    if root is None or not files:
        yield None
        return
    settings = processor.image_settings
    depth, dtype = find_store(model, settings, Path(root), computation) or ("all", None)
    cache = fill_cache(
        model, settings, Path(root), files, computation,
        depth=depth, batch_size=batch_size, num_workers=num_workers, dtype=dtype,
    )  # fmt: skip
    with reading_cache(model.image_encoder, depth):
        yield cache


def image_loader(cache: EncoderCache | None, processor: MMBertProcessor) -> LoadImage:
    """Return a function that loads an image: its hidden states where a cache has them, else its pixels."""
    return processor.pixel_values if cache is None else functools.partial(_load, cache, processor)


def _load(cache: EncoderCache, processor: MMBertProcessor, image: ImageSource) -> Tensor:
    if isinstance(image, str | os.PathLike):
        return cache.hidden_states(Path(image))
    return processor.pixel_values(image)
