"""Encoder cache: outputs of the frozen image encoder, computed once for each image and kept on disk."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as transforms

from mmbert.data.image_processor import ImageSettings
from mmbert.data.images import BadImageError, load_image, read_content
from mmbert.data.row_store import DIGEST_BYTES, RowStore
from mmbert.data.samples import Augmentation, View, augment
from mmbert.errors import UsageError
from mmbert.runtime.files import atomic_write_text
from mmbert.runtime.progress import ProgressLog
from mmbert.runtime.randomness import numpy_generator
from mmbert.runtime.signals import StopSignals

log = logging.getLogger("mmbert")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Values of `data.cache_dtype`."""
SPARE_BYTES = 1 << 30
"""Disk space that filling leaves free."""
BYTES_PER_WRITE = 1 << 25
"""Rows are written in blocks of about this size; a kill costs one block."""

Request = tuple[Path, View | None]
"""An image file, and the augmented view of it; None: as it is."""


class StoredTensor(NamedTuple):
    """Shape and type of what is stored for an image."""

    shape: tuple[int, ...]  # (P, W)
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of one image."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


class EncoderCache:
    """Hidden states of images by file, computed by a frozen encoder and stored in a folder.

    The folder has one store for each combination of `facts`, so runs with the same frozen encoder share theirs, and
    images are found by their content. One process fills a store, others wait for its lock.

    Args:
        root: Folder of the stores (`data.cache`).
        facts: Everything that the hidden states depend on besides the image, as plain values.
        stored: Shape and type of the hidden states of an image.
        settings: Resizing of the images.
        augmentation: Of the views.
        seed: Seed of the views.

    Raises:
        UsageError: The folder can't be written.
    """

    def __init__(
        self,
        root: Path,
        facts: Mapping[str, Any],
        stored: StoredTensor,
        settings: ImageSettings,
        *,
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ):
        self.stored, self.settings = stored, settings
        self.augmentation, self.seed = augmentation or Augmentation(), seed
        facts = {**facts, "shape": list(stored.shape), "dtype": str(stored.dtype)}
        self.folder = root / hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        self._facts = facts
        self._contents: dict[str, bytes] = {}  # file -> digest of its content
        self._bad: dict[str, str] = {}  # file -> why it can't be read
        self._store: RowStore | None = None

    def hidden_states(self, file: Path, view: View | None = None) -> Tensor:
        """Read the hidden states of an image, (P, W).

        Raises:
            BadImageError: The image could not be read when the cache was filled.
        """
        content = self._contents.get(str(file))
        if content is None or self._store is None:
            raise BadImageError(str(file), self._bad.get(str(file), "not in the encoder cache"))
        row = self._store[self._key(content, view)]
        return torch.from_numpy(row).view(self.stored.dtype).view(self.stored.shape)

    def fill(
        self,
        requests: Iterable[Request],
        encode: Callable[[Tensor], Tensor],
        *,
        batch_size: int,
        num_workers: int = 0,
        skip_unreadable: bool = False,
        max_bytes: int | None = None,
    ) -> bool:
        """Compute the hidden states of the images that the store does not have.

        Args:
            requests: The images.
            encode: (B, 3, S, S) uint8 to (B, P, W) on the CPU.
            batch_size: B of every call: the last batch is padded, so that a row does not depend on its batch.
            num_workers: Processes that decode images.
            skip_unreadable: Note unreadable images, instead of raising; see `hidden_states`.
            max_bytes: Do not fill where more than this would have to be written; None: no limit.

        Returns:
            False where `max_bytes` or the disk is too small, and nothing was computed.

        Raises:
            UsageError: The folder can't be written, or without `max_bytes` the disk is too small.
            BadImageError: An unreadable image, unless `skip_unreadable`.
        """
        lock = FileLock(self.folder.with_suffix(".lock"))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                log.info("encoder cache: waiting for another process that fills %s", self.folder)
                lock.acquire()
            with lock:
                self._store = RowStore(self.folder, self._facts, self.stored.nbytes)
                return self._fill(
                    [*dict.fromkeys(requests)], encode, batch_size, num_workers, skip_unreadable, max_bytes
                )
        except BadImageError:
            raise
        except OSError as error:
            raise UsageError(
                f"data.cache: {error.filename or self.folder}: {error.strerror or error}; name a folder that can be "
                "written by data.cache, make room (what is filled is kept), or set data.cache=null."
            ) from error
        finally:
            lock.release()

    def _fill(
        self,
        requests: list[Request],
        encode: Callable[[Tensor], Tensor],
        batch_size: int,
        num_workers: int,
        skip_unreadable: bool,
        max_bytes: int | None,
    ) -> bool:
        assert self._store is not None
        known = self._read_files()
        missing = []
        for file, view in requests:
            content = known.get(str(file))
            if content is not None and self._key(content, view) in self._store:
                self._contents[str(file)] = content
            else:
                missing.append((file, view))
        if not missing:
            return True
        if not self._check_space(len(missing), max_bytes):
            return False
        loader = DataLoader(
            _Images(self, missing, skip_unreadable),
            batch_size=batch_size,
            num_workers=num_workers,
            collate_fn=list,
            worker_init_fn=StopSignals.worker_init_fn(),
            generator=torch.Generator(),  # so that the global generator does not advance
        )
        progress = ProgressLog("encoder cache", len(missing))
        writer = _Writer(self._store, self.stored, encode, batch_size)
        stats: dict[str, list[Any]] = {}
        try:
            for images in loader:
                for image in images:
                    name = str(image.file)
                    if not image.content:
                        self._bad[name] = image.reason
                        continue
                    self._contents[name] = image.content
                    stats[name] = [*image.stat, image.content.hex()]
                    if image.pixel_values is not None:
                        writer.add(self._key(image.content, image.view), image.pixel_values)
                progress.add(len(images))
            writer.finish()
        finally:
            progress.stop()
        self._write_files(stats)
        return True

    def _check_space(self, count: int, max_bytes: int | None) -> bool:
        """Announce the size of what is written, and check that the disk has room for it."""
        needed, free = count * self.stored.nbytes, shutil.disk_usage(self.folder).free - SPARE_BYTES
        size = f"{count:,} images x {self.stored.nbytes / 1e3:,.0f} kB = {needed / 1e9:.2f} GB"
        if max_bytes is not None and needed > min(max_bytes, free // 2):
            log.info(
                "the frozen image encoder's outputs (%s) are not cached without being asked: data.cache=FOLDER does, "
                "and computes them once instead of every epoch", size,
            )  # fmt: skip
            return False
        if needed > free:
            raise UsageError(
                f"data.cache: {size}, but the disk of {self.folder.parent} has {max(free, 0) / 1e9:.2f} GB to spare; "
                "name a folder on a larger disk, or set data.cache_dtype=fp16 or data.cache=null."
            )
        log.info("encoder cache: computing the frozen image encoder's outputs once: %s in %s", size, self.folder)
        return True

    def _key(self, content: bytes, view: View | None) -> bytes:
        """Digest of a row: that of the image's content, or of its augmented view."""
        if view is None:
            return content
        name = f"{self.seed}/{self.augmentation.crop}/{self.augmentation.flip}/{view.number}/{view.may_mirror}"
        return hashlib.blake2b(content + name.encode(), digest_size=DIGEST_BYTES).digest()

    def pixel_values(self, content: bytes, digest: bytes, view: View | None) -> Tensor:
        """Decode an image's content to (3, S, S) uint8, augmented where a view is given."""
        image = transforms.pil_to_tensor(load_image(content))
        if view is None:
            return self.settings.resize(image)
        rng = numpy_generator(self.seed, "augment view", view.number, int.from_bytes(digest[:8]))
        return augment(image, self.augmentation, self.settings, rng, may_mirror=view.may_mirror)[0]

    def _read_files(self) -> dict[str, bytes]:
        """Digests of files that have not changed since they were read, by size and time of change."""
        try:
            entries = json.loads((self.folder / "files.json").read_text(encoding="utf-8"))
            self._entries = {str(name): list(entry) for name, entry in entries.items()}
        except (OSError, ValueError, AttributeError, TypeError):
            self._entries = {}
        found = {}
        for name, (size, changed, content) in self._entries.items():
            try:
                info = os.stat(name)
            except OSError:
                continue
            if (info.st_size, info.st_mtime_ns) == (size, changed):
                found[name] = bytes.fromhex(content)
        return found

    def _write_files(self, stats: Mapping[str, list[Any]]) -> None:
        self._entries |= stats
        atomic_write_text(self.folder / "files.json", json.dumps(self._entries) + "\n")

    def __contains__(self, key: bytes) -> bool:
        return self._store is not None and key in self._store


class _Loaded(NamedTuple):
    """A decoded image; without `pixel_values` where the store has it already or it can't be read."""

    file: Path
    view: View | None
    content: bytes
    stat: tuple[int, int]
    pixel_values: Tensor | None
    reason: str = ""


class _Images(Dataset[_Loaded]):
    """Data set of the images to encode."""

    def __init__(self, cache: EncoderCache, requests: list[Request], skip_unreadable: bool):
        self.cache, self.requests, self.skip_unreadable = cache, requests, skip_unreadable

    def __len__(self) -> int:
        return len(self.requests)

    def __getitem__(self, index: int) -> _Loaded:
        file, view = self.requests[index]
        try:
            info = os.stat(file) if file.exists() else None
            content = read_content(file)
            digest = hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()
            stat = (info.st_size, info.st_mtime_ns) if info is not None else (-1, -1)
            if self.cache._key(digest, view) in self.cache:
                return _Loaded(file, view, digest, stat, None)
            try:
                return _Loaded(file, view, digest, stat, self.cache.pixel_values(content, digest, view))
            except BadImageError as error:
                raise BadImageError(str(file), error.reason) from None
        except BadImageError as error:
            if not self.skip_unreadable:
                raise
            return _Loaded(file, view, b"", (-1, -1), None, error.reason)


class _Writer:
    """Encodes images in batches of one size, and writes their hidden states to a store in blocks."""

    def __init__(self, store: RowStore, stored: StoredTensor, encode: Callable[[Tensor], Tensor], batch_size: int):
        self.store, self.stored, self.encode, self.batch_size = store, stored, encode, batch_size
        self._seen: set[bytes] = set()
        self._pixels: dict[bytes, Tensor] = {}  # not yet encoded
        self._rows: dict[bytes, np.ndarray] = {}  # not yet written

    def add(self, key: bytes, pixel_values: Tensor) -> None:
        """Add an image; one with the key of another is the same."""
        if key in self._seen:
            return
        self._seen.add(key)
        self._pixels[key] = pixel_values
        if len(self._pixels) == self.batch_size:
            self._encode()
            if len(self._rows) * self.stored.nbytes >= BYTES_PER_WRITE:
                self._write()

    def finish(self) -> None:
        """Encode and write the rest."""
        if self._pixels:
            self._encode()
        self._write()

    def _encode(self) -> None:
        pixels = torch.stack([*self._pixels.values()])
        padding = pixels[:1].expand(self.batch_size - len(pixels), -1, -1, -1)
        states = self.encode(torch.cat([pixels, padding]))[: len(pixels)].to(self.stored.dtype).contiguous()
        self._rows |= zip(self._pixels, states.view(len(pixels), -1).view(torch.uint8).numpy(), strict=True)
        self._pixels.clear()

    def _write(self) -> None:
        if self._rows:
            self.store.append([*self._rows], np.stack([*self._rows.values()]))
            self._rows.clear()
