"""Which runs have an encoder cache, and filling it before training."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmbert.data.datamodule import SplitsDataModule
from mmbert.data.encoder_cache import DTYPES, EncoderCache, Request
from mmbert.data.options import DataOptions
from mmbert.data.samples import Augmentation
from mmbert.errors import UsageError
from mmbert.evaluation.model_cache import Computation, can_be_cached, fill_cache
from mmbert.model.modeling import MMBertModel

log = logging.getLogger("mmbert")

AUTO_FOLDER = "encoder_cache"
"""Folder of `data.cache=auto`, in `trainer.default_root_dir`."""
AUTO_BYTES = 10_000_000_000
"""`data.cache=auto` writes no more than this at once."""


def check_cache_options(data: DataOptions, freeze_image: str | int) -> None:
    """Check that a cache that is asked for fits the other options.

    Raises:
        UsageError: Augmented images without `data.views`.
    """
    is_augmented = Augmentation(data.crop, data.flip) != Augmentation()
    is_requested = data.cache not in (None, "auto")
    if is_requested and is_augmented and data.views is None and freeze_image != "none":
        raise UsageError(
            f"data.cache={data.cache} with data.crop={data.crop} and data.flip={str(data.flip).lower()}: a cache can't "
            "hold images that change in every epoch; set data.views=K to keep K augmented views of each, or "
            "data.crop=1 and data.flip=false, or data.cache=null."
        )
    if data.views is not None and (freeze_image == "none" or data.cache is None or not is_augmented):
        raise UsageError(
            f"data.views={data.views} is for a cache (data.cache) of the augmented images (data.crop, data.flip) of a "
            "frozen image encoder (optim.freeze_image); leave it out."
        )
    if is_requested and freeze_image == "none":
        log.warning("data.cache=%s has no effect: the image encoder is trained (optim.freeze_image=none)", data.cache)


def is_cached(model: MMBertModel, options: DataOptions) -> bool:
    """Return whether a run with these options has an encoder cache, if the disk has room for it."""
    encoder = model.image_encoder
    is_augmented = Augmentation(options.crop, options.flip) != Augmentation()
    if options.cache is None or encoder.frozen == "none" or (is_augmented and options.views is None):
        return False
    return can_be_cached(encoder, model.fusion.reads_image_layers, encoder.frozen)


def fill_encoder_cache(model: MMBertModel, data: SplitsDataModule, *, root: Path, computation: Computation) -> None:
    """Fill the cache of a run, and make its samples read it; does nothing where the run has none.

    Args:
        model: Its image encoder is frozen, as far as `optim.freeze_image` says.
        data: Data of the run.
        root: Folder of the runs.
        computation: The trainer's precision and device.

    Raises:
        UsageError: A cache that was asked for can't be written, or is larger than the disk.
        BadImageError: An unreadable image, with `data.on_bad_sample=stop`.
    """
    requests = (request for samples in data.used_samples() for request in _with_views(samples, data.options.views))
    cache = open_run_cache(model, data, requests, root=root, computation=computation)
    if cache is not None:
        for samples in data.used_samples():
            samples.cache = cache


def open_run_cache(
    model: MMBertModel, data: SplitsDataModule, requests: Iterable[Request], *, root: Path, computation: Computation
) -> EncoderCache | None:
    """Open the cache of a run with the given images; None where the run has none. See `fill_encoder_cache`."""
    options = data.options
    if not is_cached(model, options) or not (requests := [*requests]):
        return None
    is_automatic = options.cache == "auto"
    try:
        return fill_cache(
            model,
            data.processor.image_settings,
            root / AUTO_FOLDER if is_automatic else Path(str(options.cache)),
            requests,
            computation,
            depth=model.image_encoder.frozen,
            batch_size=options.batch_size,
            num_workers=options.num_workers,
            dtype=None if options.cache_dtype is None else DTYPES[options.cache_dtype],
            augmentation=Augmentation(options.crop, options.flip),
            seed=data.seed,
            skip_unreadable=data.skip_unreadable,
            max_bytes=AUTO_BYTES if is_automatic else None,
        )
    except UsageError as error:
        if not is_automatic:
            raise
        log.warning("no encoder cache: %s", error)
        return None


def _with_views(samples: Any, views: int | None) -> Any:
    samples.views = views or 0
    return samples.cache_requests()
