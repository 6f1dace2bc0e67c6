"""`ImageIndex`: search a folder of images by text or by image, with vectors that `mmbert index` wrote."""

import base64
import hashlib
import io
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmbert.data.images import BadImageError, ImageSource, load_image
from mmbert.errors import DataError, UsageError, printable
from mmbert.evaluation.encoding import encode, pair_scores
from mmbert.inference.capabilities import objectives_of
from mmbert.inference.index_files import APPROXIMATE, IndexFacts, is_merged, read_parts
from mmbert.inference.loaded import LoadedModel, load

log = logging.getLogger("mmbert")

IMAGE_ENDINGS = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"))
"""Endings of the files that are indexed, in any case."""
ROWS_PER_CHUNK = 1024
"""Vectors per matrix product: their fp32 copy stays in the cache of a core."""
RECALL_QUERIES, RECALL_K, MIN_RECALL = 200, 10, 0.95
"""Images whose neighbours are compared, how many neighbours, and the recall at which the search is wide enough."""
THUMBNAIL_SIDE = 320
"""Longer side in pixels."""
CONFIG_NOTES = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
FAISS_HINT = "faiss is not installed; pip install 'mmbert[faiss]'"


class SearchResult(NamedTuple):
    """Image that was found, with its score."""

    path: str
    score: float
    kind: Literal["cosine", "probability"]  # of the contrastive vectors (itc); of a match, after re-ranking (itm)


def model_hash(model: LoadedModel) -> str:
    """Compute a SHA-256 of everything that vectors depend on: weights, configuration, tokenizer, image settings."""
    # Without what depends on where the model was saved, and by which release.
    config = {k: v for k, v in model.model.config.to_dict().items() if k not in CONFIG_NOTES}
    found, processor = hashlib.sha256(), model.processor
    vocabulary = sorted(processor.tokenizer.get_vocab().items())
    facts = [config, asdict(processor.image_settings), processor.max_text_length, vocabulary]
    found.update(json.dumps(facts, sort_keys=True).encode())
    for name, value in sorted(model.model.state_dict().items()):
        found.update(f"{name} {value.dtype} {[*value.shape]}".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def check_model(facts: IndexFacts, index: Path, model: LoadedModel) -> None:
    """Raise a UsageError where the index was made with another model."""
    found = model_hash(model)
    if found != facts.model_hash:
        raise UsageError(
            f"'{index}' was made with another model ('{facts.model}', hash {facts.model_hash[:12]}) than "
            f"'{model.name}' (hash {found[:12]}); index the folder with this model to another --out."
        )


def load_index(
    index: str | Path,
    model: str | Path | LoadedModel | None = None,
    device: str | torch.device | None = None,
    *,
    allow_import: str | Sequence[str] = (),
) -> "ImageIndex":
    """Open an index of images for search.

    Args:
        index: Folder that `mmbert index` wrote.
        model: The model it was made with, or its folder; None: the folder that the index names.
        device: See `mmbert.load`.
        allow_import: See `mmbert.load`.

    Raises:
        UsageError: The folder is no index, its model is not there, or `model` is another one.
        DataError: A file of the index is broken or truncated.
    """
    folder = Path(index)
    facts = IndexFacts.read(folder)
    if not isinstance(model, LoadedModel):
        if model is None and not Path(facts.model).is_dir():
            raise UsageError(f"'{index}': its model '{facts.model}' is not there; name its folder by --model (model=).")
        model = load(facts.model if model is None else model, device, allow_import=allow_import)
    check_model(facts, folder, model)
    return ImageIndex(folder, facts, model)


class ImageIndex:
    """Vectors of a folder's images, memory-mapped, with the model that computed them; see `load_index`.

    Args:
        index: Folder of the index.
        facts: Its facts.
        model: Their model.
    """

    def __init__(self, index: Path, facts: IndexFacts, model: LoadedModel):
        self.facts, self.model = facts, model
        entries, self.vectors, manifests = read_parts(index, facts.embedding_size)
        self.files = [file for file, entry in entries.items() if not entry.error]
        """Relative paths of the images."""
        places = np.array([(entries[file].part, entries[file].row) for file in self.files]).reshape(-1, 2)
        numbers = [(places[:, 0] == part).nonzero()[0] for part in range(len(manifests))]
        self._places = [(torch.from_numpy(x), torch.from_numpy(places[x, 1])) for x in numbers]
        if not self.files:
            raise DataError(str(index), "no image is indexed", "at least one; run mmbert index once more")
        if not is_merged(manifests):
            log.warning("%s: indexing was not finished; run mmbert index once more", printable(str(index)))
        approximate = manifests[0].with_suffix(APPROXIMATE)
        self.approximate = approximate if is_merged(manifests) and approximate.is_file() else None
        """File of the approximate index; None: exact search only."""
        self._faiss: Any = None

    def __len__(self) -> int:
        return len(self.files)

    def path(self, file: str) -> str:
        """Return the full path of one of `files`."""
        return os.path.join(self.facts.folder, *file.split("/"))

    def search(
        self, query: str | ImageSource, k: int = 10, *, rerank: int = 0, exact: bool = False
    ) -> list[SearchResult]:
        """Find the images that match a text, or that are most similar to an image.

        Args:
            query: A text; or an image: a `Path`, bytes, Pillow image or array, or a string that names an image file.
            k: Number of images to return.
            rerank: Fuse the text with so many of the best images, at least k, and order these by the probability of a
                match; 0: use the contrastive vectors alone.
            exact: Don't use the approximate index, if there is one.

        Returns:
            The best images, best first.

        Raises:
            UsageError: k or rerank out of range; re-ranking for an image or with a model without itm.
            BadImageError: The image can't be read.
        """
        for name, value, least in (("k", k, 1), ("rerank", rerank, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UsageError(f"{name}={value!r}: must be a whole number of {least} or more.")
        is_image = not isinstance(query, str) or names_image(query)
        if isinstance(query, str) and not query.strip():
            raise UsageError("the text to search for is empty.")
        if rerank and is_image:
            raise UsageError("rerank: re-ranking fuses a text with each image, so it needs a text; leave it out.")
        if rerank:
            objectives_of(self.model.model, self.model.name, "re-ranking", "itm")
        found = self.model.embed(images=[query]).images if is_image else self.model.embed(texts=[query]).texts  # pyright: ignore
        assert found is not None
        nearest = self.nearest(found[0], max(k, rerank), exact=exact)
        results = [SearchResult(self.path(self.files[i]), score, "cosine") for i, score in nearest]
        return (self._reranked(str(query), results) if rerank else results)[:k]

    def nearest(self, vector: Tensor, k: int, *, exact: bool = False) -> list[tuple[int, float]]:
        """Find the nearest vectors of a unit vector (E,): (number in `files`, cosine), best first."""
        k = min(k, len(self.files))
        if self.approximate is not None and not exact:
            return self._approximate(vector, k)
        scores = torch.empty(len(self.files))
        for vectors, (numbers, rows) in zip(self.vectors, self._places, strict=True):
            scores[numbers] = _product(torch.from_numpy(vectors), vector)[rows]
        best = scores.topk(k)
        return [*zip(best.indices.tolist(), best.values.tolist(), strict=True)]

    def _approximate(self, vector: Tensor, k: int) -> list[tuple[int, float]]:
        if self._faiss is None:
            if find_spec("faiss") is None:
                raise UsageError(f"this index has an approximate part, but {FAISS_HINT}, or use --exact (exact=True).")
            import faiss  # pyright: ignore[reportMissingImports] - an extra

            self._faiss = faiss.read_index(str(self.approximate), faiss.IO_FLAG_MMAP)
        scores, rows = self._faiss.search(vector[None].numpy(), k)
        return [(int(row), float(score)) for row, score in zip(rows[0], scores[0], strict=True) if row >= 0]

    def _reranked(self, text: str, results: list[SearchResult]) -> list[SearchResult]:
        readable, images = [], []
        for result in results:
            try:  # resized at once: 32 large photos would not fit into memory
                images.append(self.model.processor.pixel_values(result.path).permute(1, 2, 0).numpy())
                readable.append(result)
            except BadImageError as error:
                log.warning("left out: %s", error)
        if not readable:
            return []
        model: Any = self.model.model
        encoded = encode(model, self.model.processor, images, [text])
        assert encoded.images is not None
        pairs = torch.tensor([(image, 0) for image in range(len(images))])
        scores = pair_scores(model, encoded.images, encoded.texts, pairs).double().sigmoid().tolist()
        found = [
            SearchResult(result.path, score, "probability") for result, score in zip(readable, scores, strict=True)
        ]
        return sorted(found, key=lambda result: -result.score)


def _product(vectors: Tensor, vector: Tensor) -> Tensor:
    """Multiply (N, E) fp16 by (E,) fp32 in chunks."""
    # One buffer for all chunks: a new allocation for each costs page faults, ten times the time of the product.
    found, buffer = torch.empty(len(vectors)), torch.empty(ROWS_PER_CHUNK, vectors.shape[1])
    for first in range(0, len(vectors), ROWS_PER_CHUNK):
        chunk = vectors[first : first + ROWS_PER_CHUNK]
        torch.mv(buffer[: len(chunk)].copy_(chunk), vector, out=found[first : first + len(chunk)])
    return found


def thumbnail_uri(path: str) -> str | None:
    """Encode a small copy of an image file as a data URI; None: it can't be read."""
    try:
        image = load_image(path)
    except BadImageError:
        return None
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def names_image(text: str) -> bool:
    """Return whether a string names an image file rather than being a text: it ends as one, or the file exists."""
    return os.path.splitext(text)[1].lower() in IMAGE_ENDINGS or os.path.isfile(text)


def write_approximate(index: ImageIndex, manifest: Path) -> None:
    """Write the approximate index of a merged part, and log its recall against exact search."""
    import faiss  # pyright: ignore[reportMissingImports] - an extra

    vectors, size = index.vectors[0], index.facts.embedding_size
    num_lists = max(1, min(int(4 * len(vectors) ** 0.5), len(vectors) // 40))
    found = faiss.IndexIVFScalarQuantizer(
        faiss.IndexFlatIP(size), size, num_lists, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    )
    chosen = np.random.default_rng(0).permutation(len(vectors))
    found.train(vectors[np.sort(chosen[: 64 * num_lists])].astype(np.float32))
    for first in range(0, len(vectors), 65536):
        found.add(vectors[first : first + 65536].astype(np.float32))
    queries = vectors[np.sort(chosen[:RECALL_QUERIES])].astype(np.float32)
    k = min(RECALL_K + 1, len(vectors))  # an image is its own nearest neighbour
    exact = [{i for i, _ in index.nearest(torch.from_numpy(query), k, exact=True)} for query in queries]
    for width in (2**n for n in range(20)):
        found.nprobe = min(width, num_lists)
        rows = found.search(queries, k)[1]
        recall = sum(len(truth & {*row}) for truth, row in zip(exact, rows.tolist(), strict=True)) / (k * len(queries))
        if recall >= MIN_RECALL or found.nprobe == num_lists:
            break
    file = manifest.with_suffix(APPROXIMATE)
    faiss.write_index(found, f"{file}.tmp")
    os.replace(f"{file}.tmp", file)
    log.info("faiss: %d of %d lists are searched, recall@%d %.3f against exact search on %d images", found.nprobe,
             num_lists, k, recall, len(queries))  # fmt: skip
