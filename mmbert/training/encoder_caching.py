"""Which runs have an encoder cache, and filling it before training."""

import hashlib
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import PIL
import timm
import torch
import torchvision
from torch import Tensor, nn

from mmbert.data.datamodule import SplitsDataModule
from mmbert.data.encoder_cache import DTYPES, EncoderCache, StoredTensor
from mmbert.data.options import DataOptions
from mmbert.data.samples import Augmentation
from mmbert.errors import UsageError
from mmbert.model.encoders import ImageEncoder
from mmbert.model.modeling import MMBertModel
from mmbert.model.options import KEYS

log = logging.getLogger("mmbert")

CACHE_FORMAT = 1
"""Changes where an older cache must not be read."""
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


def fill_encoder_cache(
    model: MMBertModel,
    data: SplitsDataModule,
    *,
    root: Path,
    precision: str,
    device: torch.device,
    context: Callable[[], AbstractContextManager[Any]],
) -> None:
    """Fill the cache of a run, and make its samples read it; does nothing where the run has none.

    Args:
        model: Its image encoder is frozen, as far as `optim.freeze_image` says.
        data: Data of the run.
        root: Folder of the runs.
        precision: The trainer's.
        device: Computes the hidden states.
        context: Makes the context of the trainer's precision.

    Raises:
        UsageError: A cache that was asked for can't be written, or is larger than the disk.
        BadImageError: An unreadable image, with `data.on_bad_sample=stop`.
    """
    options, encoder = data.options, model.image_encoder
    augmentation = Augmentation(options.crop, options.flip)
    is_augmented = augmentation != Augmentation()
    if options.cache is None or encoder.frozen == "none" or (is_augmented and options.views is None):
        return
    requests = [request for samples in data.used_samples() for request in _with_views(samples, options.views)]
    layers = model.fusion.reads_image_layers
    if not requests or not can_be_cached(encoder, layers):
        return
    is_automatic = options.cache == "auto"
    normalize, was_on = data.processor.image_settings.normalize, next(encoder.parameters()).device

    @torch.no_grad()
    def encode(pixel_values: Tensor) -> Tensor:
        with context():
            return encoder.encode_frozen(normalize(pixel_values.to(device)), encoder.frozen, layers=layers).cpu()

    was_training = encoder.training
    encoder.to(device).eval()
    try:
        side = data.processor.image_settings.image_size
        one = encode(torch.zeros(1, 3, side, side, dtype=torch.uint8))[0]
        dtype = one.dtype if options.cache_dtype is None else DTYPES[options.cache_dtype]
        cache = EncoderCache(
            root / AUTO_FOLDER if is_automatic else Path(str(options.cache)),
            cache_facts(model, data, precision=precision, device=device),
            StoredTensor(tuple(one.shape), dtype),
            data.processor.image_settings,
            augmentation=augmentation,
            seed=data.seed,
        )
        filled = cache.fill(
            requests, encode, batch_size=options.batch_size, num_workers=options.num_workers,
            skip_unreadable=data.skip_unreadable, max_bytes=AUTO_BYTES if is_automatic else None,
        )  # fmt: skip
    except UsageError as error:
        if not is_automatic:
            raise
        log.warning("no encoder cache: %s", error)
        return
    finally:
        encoder.to(was_on).train(was_training)
    if filled:
        for samples in data.used_samples():
            samples.cache = cache


def _with_views(samples: Any, views: int | None) -> Any:
    samples.views = views or 0
    return samples.cache_requests()


def can_be_cached(encoder: ImageEncoder, layers: tuple[int, ...]) -> bool:
    """Return whether the frozen part of an encoder and the rest, one after the other, compute what the whole does."""
    if encoder.frozen == "all":
        return True
    vit = encoder.vit
    if getattr(getattr(vit, "pos_drop", None), "p", 0) or not isinstance(getattr(vit, "patch_drop", None), nn.Identity):
        return False  # these draw at random before the frozen layers
    was_training = encoder.training
    encoder.eval()
    try:
        with torch.no_grad():
            parameter = next(encoder.parameters())
            side = vit.patch_embed.img_size[0]
            image = torch.linspace(-1, 1, 3 * side * side).view(1, 3, side, side).to(parameter.device, parameter.dtype)
            expected = encoder(image, layers=layers)
            found = encoder.continue_from(
                encoder.encode_frozen(image, encoder.frozen, layers=layers), encoder.frozen, layers=layers
            )
        pairs = zip((found[0], *found.intermediate), (expected[0], *expected.intermediate), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)
    except (AttributeError, TypeError, RuntimeError, ValueError):  # other families call their blocks in other ways
        return False
    finally:
        encoder.train(was_training)


def cache_facts(model: MMBertModel, data: SplitsDataModule, *, precision: str, device: torch.device) -> dict[str, Any]:
    """Collect everything that a frozen encoder's outputs depend on besides the image."""
    encoder = model.image_encoder
    return {
        "format": CACHE_FORMAT,
        "weights": frozen_sha256(encoder, encoder.frozen),
        "architecture": {key: repr(getattr(model.config, key)) for key in KEYS if key.startswith(("image_", "patch_"))},
        "image_settings": repr(asdict(data.processor.image_settings)),
        "frozen": encoder.frozen,
        "layers": list(model.fusion.reads_image_layers),
        "precision": precision,
        "device": device.type,
        "versions": {
            "torch": torch.__version__, "torchvision": torchvision.__version__,
            "timm": timm.__version__, "pillow": PIL.__version__,
        },
    }  # fmt: skip


def frozen_sha256(encoder: ImageEncoder, depth: str | int) -> str:
    """SHA-256 over the names, shapes and values of the frozen weights and buffers of an encoder."""
    chosen = encoder.state_dict()
    if depth != "all":
        embeddings, layers = encoder.blocks()
        parts = [*embeddings, *layers[: int(depth)]]
        kept = {value.data_ptr() for part in parts for value in part.state_dict().values()}
        kept |= {parameter.data_ptr() for parameter in encoder.vit.parameters(recurse=False)}
        chosen = {name: value for name, value in chosen.items() if value.data_ptr() in kept}
    total = hashlib.sha256()
    for name, value in sorted(chosen.items()):
        value = value.detach().cpu().contiguous()
        total.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        total.update(value.view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
