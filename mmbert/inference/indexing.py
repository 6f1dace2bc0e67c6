"""Write the index of a folder of images: resumable after a kill, incremental, distributed over processes."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mmbert.data.images import FORMATS, BadImageError, read_content
from mmbert.data.processor import MMBertProcessor
from mmbert.errors import DataError, UsageError, printable
from mmbert.inference.capabilities import objectives_of
from mmbert.inference.index import FAISS_HINT, IMAGE_ENDINGS, ImageIndex, check_model, model_hash, write_approximate
from mmbert.inference.index_files import (
    APPROXIMATE,
    FACTS_FILE,
    MANIFEST,
    VECTORS,
    Entry,
    IndexFacts,
    PartWriter,
    is_merged,
    part_number,
    read_parts,
    write_merged,
)  # fmt: skip
from mmbert.inference.loaded import LoadedModel, load
from mmbert.runtime.distributed import all_gather_list, rank, world_size
from mmbert.runtime.files import atomic_write_text
from mmbert.runtime.progress import ProgressLog
from mmbert.runtime.signals import StopSignals

log = logging.getLogger("mmbert")

EXACT_LIMIT = 1_000_000
"""Images up to which exact search takes less than a second."""


class IndexReport(NamedTuple):
    """Counts of one run of `build_index`."""

    images: int  # in the index
    encoded: int  # new or changed
    deleted: int
    unreadable: dict[str, str]  # file or folder -> reason


class FolderScan(NamedTuple):
    """Image files in and below a folder."""

    files: dict[str, tuple[int, int]]  # relative path -> size and modification time (ns); -1, 0: a broken link
    unreadable: dict[str, str]  # folder -> reason
    repeated: list[str]  # links to folders that are read anyway, loops among them


class _Plan(NamedTuple):
    """What rank 0 decided for all processes."""

    facts: IndexFacts
    number: int  # of the part to write
    jobs: list[tuple[str, int, int, str]]  # file, size, mtime_ns, digest of the content that is indexed, or ""


def build_index(
    model: str | Path | LoadedModel,
    folder: str | Path,
    out: str | Path,
    *,
    batch_size: int = 64,
    num_workers: int = 1,
    device: str | torch.device | None = None,
    allow_import: str | Sequence[str] = (),
    approximate: bool = False,
) -> IndexReport:
    """Encode the images in and below a folder for `mmbert.load_index`, or bring such an index up to date.

    Only new and changed images are encoded: where size or modification time differ, the content's digest decides.
    After a kill the next call goes on. Every process of a process group encodes its share. Hidden files and folders
    are left out; links to folders are followed once.

    Args:
        model: Pretrained with itc, or its folder.
        folder: The images.
        out: Folder of the index; created where it is missing.
        batch_size: Images per encoder call.
        num_workers: Processes that decode images, for each process.
        device: See `mmbert.load`.
        allow_import: See `mmbert.load`.
        approximate: Also write an approximate index (faiss, IVF with fp16 vectors) and log its recall.

    Raises:
        UsageError: No such folder, no image in it, a model without itc, an index of another model or folder, an index
            that another process is writing, or faiss is missing.
        DataError: A file of the index is broken, or can't be written.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
        if value < least:
            raise UsageError(f"{name}={value}: must be {least} or more.")
    if approximate and find_spec("faiss") is None:
        raise UsageError(f"an approximate index needs faiss: {FAISS_HINT}.")
    if not Path(folder).is_dir():
        raise UsageError(f"'{folder}' is no folder; give the folder of the images.")
    loaded = model if isinstance(model, LoadedModel) else load(model, device, allow_import=allow_import)
    objectives_of(loaded.model, loaded.name, "indexing", "itc")
    index, digest = Path(out), model_hash(loaded)
    with _report_write_errors(index), _Coordinator(index) as coordinator:
        plan, scan = coordinator.decide(lambda: _plan(loaded, digest, Path(folder), index))
        if digest != plan.facts.model_hash:
            raise UsageError(f"'{loaded.name}' is another model than that of rank 0; give all processes the same.")
        own = plan.jobs[rank() :: world_size()]
        encoded = sum(all_gather_list([_encode(loaded, plan, own, index, batch_size, num_workers)]))
        return coordinator.decide(lambda: _finish(loaded, plan, scan, index, encoded, approximate))


class _Coordinator:
    """Context manager in which rank 0 holds the lock of the index and decides for all processes."""

    def __init__(self, index: Path):
        self._index = index
        self._lock: FileLock | None = None

    def __enter__(self) -> "_Coordinator":
        return self

    def decide(self, work: Any) -> Any:
        """Run `work` in rank 0, and return its result, or raise its error, in every process."""
        found: list[Any] = []
        if rank() == 0:
            try:
                self._acquire()
                found = [work()]
            except (UsageError, DataError, OSError) as error:
                found = [error]
        result = all_gather_list(found)[0]
        if isinstance(result, Exception):
            raise result
        return result

    def _acquire(self) -> None:
        if self._lock is not None:
            return
        if self._index.is_dir() and not (self._index / FACTS_FILE).is_file() and any(
            not path.name.startswith(".") for path in self._index.iterdir()
        ):  # fmt: skip
            raise UsageError(f"--out {self._index}: this folder is no index and not empty; give a new one.")
        self._index.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._index / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise UsageError(f"--out {self._index}: another process is writing this index; wait for it.") from None
        self._lock = lock

    def __exit__(self, *_: object) -> None:
        if self._lock is None:
            return
        self._lock.release()
        if not (self._index / FACTS_FILE).is_file():  # an error before anything was written
            with suppress(OSError):
                (self._index / ".lock").unlink(missing_ok=True)
                self._index.rmdir()


@contextmanager
def _report_write_errors(index: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        place, reason = str(error.filename or index), error.strerror or str(error)
        raise DataError(place, reason, "a folder that can be written; the next run goes on") from error


def _plan(model: LoadedModel, digest: str, folder: Path, index: Path) -> tuple[_Plan, FolderScan]:
    contrast = objectives_of(model.model, model.name, "indexing", "itc")["itc"]
    contrast.check_one_vector("an image index")
    root = os.path.abspath(folder)
    source = os.path.abspath(model.name) if Path(model.name).is_dir() else model.name
    facts = IndexFacts(source, digest, contrast.image_projection.out_features, root)
    if (index / FACTS_FILE).is_file():
        before = IndexFacts.read(index)
        check_model(before, index, model)
        if not os.path.samefile(before.folder, root) if os.path.isdir(before.folder) else False:
            raise UsageError(f"'{index}' is the index of '{before.folder}', not of '{folder}'; give another --out.")
    scan = scan_folder(root)
    if not scan.files:
        why = f" ({next(iter(scan.unreadable.values()))})" if scan.unreadable else ""
        raise UsageError(f"'{folder}' has no image in it or below it{why}; {', '.join(FORMATS)} are read.")
    atomic_write_text(index / FACTS_FILE, json.dumps(asdict(facts), indent=1) + "\n")
    entries, _, manifests = read_parts(index, facts.embedding_size, drop_missing=True)
    for file in [*index.glob(f"*{VECTORS}"), *index.glob(f"*{APPROXIMATE}")]:
        if file.with_suffix(MANIFEST) not in manifests:  # a kill came between the two files
            file.unlink()
    number = 1 + max(map(part_number, manifests), default=0)
    jobs = [
        (file, *stat, entry.digest if (entry := entries.get(file)) else "")
        for file, stat in scan.files.items()
        if file not in entries or (entries[file].size, entries[file].mtime_ns) != stat
    ]
    return _Plan(facts, number, jobs), scan


def scan_folder(root: str | Path) -> FolderScan:
    """List the image files in and below a folder, sorted, by their endings."""
    scan, visited = FolderScan({}, {}, []), set()
    folders, links = [""], []
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)  # links last: a folder's own path has priority
        path = os.path.join(root, folder)
        try:
            info = os.stat(path)
            if (info.st_dev, info.st_ino) in visited:
                scan.repeated.append(folder)
                continue
            visited.add((info.st_dev, info.st_ino))
            with os.scandir(path) as found:
                items = sorted(found, key=lambda item: item.name)
            for item in items:
                name = f"{folder}/{item.name}" if folder else item.name
                if item.name.startswith("."):
                    continue
                if item.is_dir():
                    (links if item.is_symlink() else folders).append(name)
                elif os.path.splitext(item.name)[1].lower() in IMAGE_ENDINGS:
                    scan.files[name] = _stat(item)
        except OSError as error:
            scan.unreadable[folder or "."] = error.strerror or str(error)
    return FolderScan(dict(sorted(scan.files.items())), scan.unreadable, scan.repeated)


def _stat(item: "os.DirEntry[str]") -> tuple[int, int]:
    try:
        info = item.stat()
        return info.st_size, info.st_mtime_ns
    except OSError:  # a broken link, which `load_image` names
        return -1, 0


class _Images(Dataset[tuple[Entry, Tensor | None]]):
    """Data set of (entry, image): None where the content is the indexed one, or can't be read."""

    def __init__(self, processor: MMBertProcessor, root: str, jobs: Sequence[tuple[str, int, int, str]]):
        self.processor, self.root, self.jobs = processor, root, jobs

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, number: int) -> tuple[Entry, Tensor | None]:
        file, size, mtime_ns, known = self.jobs[number]
        path = os.path.join(self.root, file)
        try:
            content = read_content(path)
            digest = hashlib.blake2b(content, digest_size=16).hexdigest()
            if digest == known:
                return Entry(file, size, mtime_ns, digest), None
            return Entry(file, size, mtime_ns, digest), self.processor.pixel_values(content)
        except BadImageError as error:
            return Entry(file, size, mtime_ns, error=error.reason), None


def _collate(items: list[tuple[Entry, Tensor | None]]) -> tuple[list[Entry], list[Entry], Tensor | None]:
    """Separate the entries without an image from those with one, and stack the images: a single tensor is shared."""
    pixels = [image for _, image in items if image is not None]
    without = [entry for entry, image in items if image is None]
    return without, [entry for entry, image in items if image is not None], torch.stack(pixels) if pixels else None


@torch.no_grad()
def _encode(
    model: LoadedModel,
    plan: _Plan,
    jobs: Sequence[tuple[str, int, int, str]],
    index: Path,
    batch_size: int,
    num_workers: int,
) -> int:
    """Encode the images of this process, and return how many there were."""
    if not jobs:
        return 0
    entries, parts, _ = read_parts(index, plan.facts.embedding_size, drop_missing=True, before=plan.number)
    contrast = objectives_of(model.model, model.name, "indexing", "itc")["itc"]
    loader = DataLoader(
        _Images(model.processor, plan.facts.folder, jobs),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=_collate,
        worker_init_fn=StopSignals.worker_init_fn(),
        generator=torch.Generator(),  # so that the global generator does not advance
    )
    writer, encoded = PartWriter(index, f"{plan.number:06d}-rank-{rank():04d}"), 0
    progress = ProgressLog("index", len(jobs))
    try:
        for without, readable, pixels in loader:
            for entry in without:
                if entry.error:
                    writer.add([entry])
                else:
                    known = entries[entry.file]
                    writer.add([entry], parts[known.part][known.row][None])
            if pixels is not None:
                tokens = model.core.encode_image(model.processor.image_settings.normalize(pixels.to(model.device)))
                writer.add(readable, contrast.embed_image(tokens).half().cpu().numpy())
                encoded += len(readable)
            progress.add(len(without) + len(readable))
        writer.commit()
    finally:
        writer.close()
        progress.stop()
    return encoded


def _finish(
    model: LoadedModel, plan: _Plan, scan: FolderScan, index: Path, encoded: int, approximate: bool
) -> IndexReport:
    """Merge all parts, drop deleted files, and remove the parts."""
    entries, parts, manifests = read_parts(index, plan.facts.embedding_size, drop_missing=True)
    kept = {
        file: entry for file, entry in sorted(entries.items()) if file in scan.files or _is_below(file, scan.unreadable)
    }
    indexed = [entry for entry in kept.values() if not entry.error]
    if not indexed:
        first = next(iter(kept.values()))
        raise DataError(f"{plan.facts.folder}/{first.file}", first.error, f"an image: all {len(kept):,} are unreadable")
    if not is_merged(manifests) or len(kept) != len(entries):
        merged = index / f"{plan.number + 1:06d}-merged"
        write_merged(merged, kept, parts)
        for manifest in manifests:  # the oldest first, since later ones have priority
            for ending in (MANIFEST, VECTORS, APPROXIMATE):
                manifest.with_suffix(ending).unlink(missing_ok=True)
    if approximate:
        write_approximate(ImageIndex(index, plan.facts, model), next(index.glob(f"*{MANIFEST}")))
    elif len(indexed) > EXACT_LIMIT:
        log.info("%s images: --faiss makes search faster, with a recall that it prints", f"{len(indexed):,}")
    unreadable = scan.unreadable | {entry.file: entry.error for entry in kept.values() if entry.error}
    for link in scan.repeated[:1]:
        count = len(scan.repeated)
        log.info("%d links to folders that are read anyway were left out, first %s", count, printable(link))
    return IndexReport(len(indexed), encoded, len(entries) - len(kept), unreadable)


def _is_below(file: str, folders: dict[str, str]) -> bool:
    return any(file.startswith(f"{folder}/") for folder in folders)
