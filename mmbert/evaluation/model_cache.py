"""Encoder cache of a model: which store holds its images, and computing those that it lacks."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import PIL
import timm
import torch
import torchvision
from torch import Tensor, nn

from mmbert.data.encoder_cache import EncoderCache, Request, StoredTensor
from mmbert.data.image_processor import ImageSettings
from mmbert.data.row_store import META
from mmbert.data.samples import Augmentation
from mmbert.model.encoders import ImageEncoder
from mmbert.model.modeling import MMBertModel
from mmbert.model.options import KEYS

log = logging.getLogger("mmbert")

CACHE_FORMAT = 1
"""Changes where an older cache must not be read."""


class Computation(NamedTuple):
    """How the hidden states of a cache are computed."""

    precision: str
    """The trainer's: 32-true, bf16-mixed or 16-mixed."""
    device: torch.device
    context: Callable[[], AbstractContextManager[Any]]
    """Makes the context of the precision."""


def fill_cache(
    model: MMBertModel,
    settings: ImageSettings,
    root: Path,
    requests: Iterable[Request],
    computation: Computation,
    *,
    depth: str | int,
    batch_size: int,
    num_workers: int = 0,
    dtype: torch.dtype | None = None,
    augmentation: Augmentation | None = None,
    seed: int = 0,
    skip_unreadable: bool = False,
    max_bytes: int | None = None,
) -> EncoderCache | None:
    """Open the store of a model's image encoder, and compute the hidden states that it lacks.

    Args:
        model: Its weights identify the store.
        settings: Resizing and normalization.
        root: Folder of the stores.
        requests: The images.
        computation: Precision and device.
        depth: Part of the encoder: "all", or n for the embeddings and the first n layers.
        batch_size: Images per call of the encoder.
        num_workers: Processes that decode images.
        dtype: Type of the stored numbers; None: that of the encoder's output.
        augmentation: Of the views.
        seed: Seed of the views.
        skip_unreadable: See `EncoderCache.fill`.
        max_bytes: See `EncoderCache.fill`.

    Returns:
        The cache; None where `max_bytes` or the disk is too small.

    Raises:
        UsageError: The folder can't be written, or the disk is too small.
        BadImageError: An unreadable image, unless `skip_unreadable`.
    """
    encoder, layers = model.image_encoder, model.fusion.reads_image_layers
    was_on, was_training = next(encoder.parameters()).device, encoder.training

    @torch.no_grad()
    def encode(pixel_values: Tensor) -> Tensor:
        with computation.context():
            pixels = settings.normalize(pixel_values.to(computation.device))
            return encoder.encode_frozen(pixels, depth, layers=layers).cpu()

    encoder.to(computation.device).eval()
    try:
        one = encode(torch.zeros(1, 3, settings.image_size, settings.image_size, dtype=torch.uint8))[0]
        cache = EncoderCache(
            root, cache_facts(model, settings, computation, depth), StoredTensor(tuple(one.shape), dtype or one.dtype),
            settings, augmentation=augmentation, seed=seed,
        )  # fmt: skip
        filled = cache.fill(
            requests, encode, batch_size=batch_size, num_workers=num_workers, skip_unreadable=skip_unreadable,
            max_bytes=max_bytes,
        )  # fmt: skip
    finally:
        encoder.to(was_on).train(was_training)
    return cache if filled else None


def cache_facts(
    model: MMBertModel, settings: ImageSettings, computation: Computation, depth: str | int
) -> dict[str, Any]:
    """Collect everything that an encoder's outputs depend on besides the image."""
    return {
        "format": CACHE_FORMAT,
        "weights": frozen_sha256(model.image_encoder, depth),
        "architecture": {key: repr(getattr(model.config, key)) for key in KEYS if key.startswith(("image_", "patch_"))},
        "image_settings": repr(asdict(settings)),
        "frozen": depth,
        "layers": list(model.fusion.reads_image_layers),
        "precision": computation.precision,
        "device": computation.device.type,
        "versions": library_versions(),
    }


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that decode and encode images."""
    return {
        "torch": torch.__version__, "torchvision": torchvision.__version__,
        "timm": timm.__version__, "pillow": PIL.__version__,
    }  # fmt: skip


def find_store(
    model: MMBertModel, settings: ImageSettings, root: Path, computation: Computation
) -> tuple[str | int, torch.dtype] | None:
    """Find the store that a training run with the weights of a model filled.

    Args:
        model: A saved model, which does not know which part of its image encoder was frozen.
        settings: As in `fill_cache`, and so are the others.
        root: Folder of the stores.
        computation: Precision and device.

    Returns:
        Depth and type of the stored numbers; None: there is no such store. An exact store is preferred to one in fp16.
    """
    found: dict[tuple[bool, bool, str], tuple[str | int, torch.dtype]] = {}
    expected: dict[str | int, dict[str, Any]] = {}
    for file in root.glob(f"*/{META}"):
        try:
            facts = json.loads(file.read_text(encoding="utf-8"))
            depth, dtype = facts["frozen"], getattr(torch, facts["dtype"].removeprefix("torch."))
            if depth not in expected:
                expected[depth] = cache_facts(model, settings, computation, depth)
            if all(facts[name] == value for name, value in expected[depth].items()):
                found[dtype == torch.float16, depth != "all", str(depth)] = depth, dtype
        except (OSError, ValueError, AttributeError, KeyError, TypeError, IndexError):
            continue  # a damaged file, which its run fills anew
    return found[min(found)] if found else None


@contextmanager
def reading_cache(encoder: ImageEncoder, depth: str | int) -> Iterator[None]:
    """Let an encoder in evaluation mode continue from hidden states of a cache, see `encode_batch_images`."""
    before = encoder.frozen
    encoder.frozen = depth
    try:
        yield
    finally:
        encoder.frozen = before


def can_be_cached(encoder: ImageEncoder, layers: tuple[int, ...], depth: str | int) -> bool:
    """Return whether the frozen part of an encoder and the rest, one after the other, compute what the whole does."""
    if depth == "all":
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
            found = encoder.continue_from(encoder.encode_frozen(image, depth, layers=layers), depth, layers=layers)
        pairs = zip((found[0], *found.intermediate), (expected[0], *expected.intermediate), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)
    except (AttributeError, TypeError, RuntimeError, ValueError):  # other families call their blocks in other ways
        return False
    finally:
        encoder.train(was_training)


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
