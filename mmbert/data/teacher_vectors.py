"""Vectors of a teacher for the training images and captions, computed once and kept on disk."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from mmbert.data.encoder_cache import EncoderCache
from mmbert.data.row_store import DIGEST_BYTES, RowStore
from mmbert.errors import UsageError
from mmbert.runtime.progress import ProgressLog

TEXTS_PER_WRITE = 4096


class TeacherVectors:
    """Contrastive unit vectors of a teacher by image file and by caption.

    Args:
        images: Store of the image vectors, (1, E) fp32 each.
        facts: Everything that the vectors depend on besides images and captions, as plain values.
        scale: Inverse temperature of the teacher's softmax.
    """

    def __init__(self, images: EncoderCache, facts: Mapping[str, Any], *, scale: float):
        self.images, self.scale = images, scale
        self._facts = {**facts, "shape": list(images.stored.shape), "of": "texts"}
        self._texts: RowStore | None = None

    def fill_texts(self, texts: Sequence[str], encode: Callable[[list[str]], Tensor], *, batch_size: int) -> None:
        """Compute the vectors of the captions that the store does not have.

        Args:
            texts: Captions; equal ones are encoded once.
            encode: `batch_size` captions to (`batch_size`, E) fp32 on the CPU, each row independent of the others.
            batch_size: Captions per call: the last batch is padded.

        Raises:
            UsageError: The folder can't be written.
        """
        folder = self.images.folder.with_name(f"{self.images.folder.name}-texts")
        try:
            with FileLock(folder.with_suffix(".lock")):
                self._texts = store = RowStore(folder, self._facts, self.images.stored.nbytes)
                missing = [text for text in dict.fromkeys(texts) if _digest(text) not in store]
                if not missing:
                    return
                progress = ProgressLog("teacher", len(missing), "captions")
                try:
                    for start in range(0, len(missing), TEXTS_PER_WRITE):
                        part = missing[start : start + TEXTS_PER_WRITE]
                        batches = (part[i : i + batch_size] for i in range(0, len(part), batch_size))
                        vectors = [encode(b + b[:1] * (batch_size - len(b)))[: len(b)] for b in batches]
                        rows = torch.cat(vectors).contiguous().view(torch.uint8).numpy()
                        store.append([_digest(text) for text in part], rows)
                        progress.add(len(part))
                finally:
                    progress.stop()
        except OSError as error:
            raise UsageError(
                f"objectives.distill: {error.filename or folder}: {error.strerror or error}; name a folder that can be "
                "written by data.cache, or make room (what is filled is kept)."
            ) from error

    def __call__(self, file: Path, caption: str) -> tuple[Tensor, Tensor]:
        """Return the vectors of an image and a caption, (E,) fp32 each.

        That of the caption is multiplied by the inverse temperature, so products are logits.

        Raises:
            BadImageError: The image could not be read.
        """
        assert self._texts is not None
        text = torch.from_numpy(self._texts[_digest(caption)]).view(torch.float32)
        return self.images.hidden_states(file)[0], self.scale * text


def zero_vectors(file: Path, caption: str) -> tuple[Tensor, Tensor]:
    """Stand in for `TeacherVectors` where losses have no meaning: in dry runs, and where FLOPs are counted."""
    return torch.zeros(1), torch.zeros(1)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()
