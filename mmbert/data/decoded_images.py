"""Decoded images in memory that the processes of the data loader share: each image is decoded once in a run."""

import logging
import mmap
import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmbert.data.options import DataOptions
from mmbert.data.samples import Augmentation, Samples
from mmbert.errors import UsageError
from mmbert.runtime.memory import free_memory

log = logging.getLogger("mmbert")

MEMORY_FRACTION = 0.25
"""Largest fraction of the free memory that decoded images take unless they are requested."""


class DecodedImages:
    """Resized images by file, kept when they are first decoded.

    The memory is an anonymous shared map: forked processes fill and read the same pages. Pickled, as for processes that
    are spawned, it is left out, and every image is decoded when it is read.

    Args:
        files: The images.
        side: S, of the resized images, in pixels.
    """

    def __init__(self, files: Iterable[Path], side: int):
        self._rows = {str(file): row for row, file in enumerate(dict.fromkeys(files))}
        count, shape = len(self._rows), (len(self._rows), 3, side, side)
        self.nbytes = int(np.prod(shape))
        memory = mmap.mmap(-1, max(1, self.nbytes + count))
        self._pixels: np.ndarray | None = np.frombuffer(memory, np.uint8, self.nbytes).reshape(shape)
        self._is_kept = np.frombuffer(memory, np.uint8, count, offset=self.nbytes)

    def __len__(self) -> int:
        return len(self._rows)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the memory out."""
        return {**self.__dict__, "_pixels": None, "_is_kept": None}

    def load(self, file: Path, decode: Callable[[Path], Tensor]) -> Tensor:
        """Return an image as (3, S, S) uint8; `decode` is called where it is not kept yet.

        Raises:
            BadImageError: What `decode` raises; nothing is kept.
        """
        row = self._rows.get(str(file))
        if row is None or self._pixels is None:
            return decode(file)
        if not self._is_kept[row]:
            self._pixels[row] = decode(file).numpy()
            self._is_kept[row] = 1  # last: another process may read it
        return torch.from_numpy(self._pixels[row])


def keep_decoded_images(splits: Sequence[Samples], options: DataOptions, *, side: int, processes: int = 1) -> None:
    """Let the splits of a run keep their decoded images in memory, where `data.images_in_memory` says so.

    Args:
        splits: Those that read an encoder cache or crop and mirror their images are left out.
        options: Of the data.
        side: Of the resized images, in pixels.
        processes: Training processes on this machine, each of which keeps the images that it reads.

    Raises:
        UsageError: Images that are requested to be kept don't fit.
    """
    requested = options.images_in_memory
    plain = [s for s in splits if s.cache is None and s.augmentation in (None, Augmentation())]
    files = [*dict.fromkeys(file for samples in plain for file, _ in samples.cache_requests())]
    if requested is False or not files:
        return
    free, needed = free_memory(torch.device("cpu")) // processes, len(files) * 3 * side * side
    size = f"{len(files):,} images of {side} x {side} pixels, {needed / 1e9:.2f} GB"
    if options.num_workers and multiprocessing.get_start_method() != "fork":
        reason = "the loader's processes are not forked, so each would keep its own"
    elif needed > free * (1 if requested else MEMORY_FRACTION):
        reason = f"{free / 1e9:.2f} GB of memory are free"
        if requested:
            raise UsageError(f"data.images_in_memory=true: {size}, but {reason}; leave it out.")
    else:
        log.info("decoded images are kept in memory: %s", size)
        kept = DecodedImages(files, side)
        for samples in plain:
            samples.decoded = kept
        return
    log.info("decoded images are not kept in memory: %s; %s", size, reason)
