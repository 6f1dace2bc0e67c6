"""The encoder cache: what it stores, what it detects, and its messages."""

import logging
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import MASK, VOCAB, tiny_examples, tiny_processor
from torch import Tensor

from mmbert.data import encoder_cache
from mmbert.data.encoder_cache import EncoderCache, StoredTensor
from mmbert.data.images import BadImageError
from mmbert.data.masking import Masking
from mmbert.data.pairs import Pairs
from mmbert.data.row_store import INDEX, META, ROWS, RowStore
from mmbert.data.samples import Augmentation, View
from mmbert.errors import UsageError

FACTS = {"weights": "a"}
ROW = 12


def digest(number: int) -> bytes:
    return number.to_bytes(16, "little")


def rows(*numbers: int) -> np.ndarray:
    return np.array([[number] * ROW for number in numbers], dtype=np.uint8)


def store(folder: Path, facts: dict[str, str] = FACTS) -> RowStore:
    return RowStore(folder, facts, ROW)


def test_store_returns_its_rows_after_it_is_opened_again_and_after_pickling(tmp_path: Path) -> None:
    first = store(tmp_path)
    first.append([digest(1), digest(2)], rows(1, 2))
    assert first[digest(1)].tolist() == [1] * ROW
    first.append([digest(3)], rows(3))
    pickled = pickle.dumps(first)
    for opened in (first, store(tmp_path), pickle.loads(pickled)):  # noqa: S301 - made here
        assert [opened[digest(i)].tolist() for i in (1, 2, 3)] == rows(1, 2, 3).tolist()
        assert digest(4) not in opened
    assert ROW * 3 < len(pickled) < 2000, "the memory map is not pickled"


@pytest.mark.parametrize(
    ("damage", "left"),
    [
        (lambda f: cut(f / INDEX, -5), [1, 2]),  # killed while a record was written
        (lambda f: cut(f / ROWS, -1), [1, 2]),  # power was lost before the row was on the disk
        (lambda f: flip(f / ROWS, ROW), [1, 3]),
        (lambda f: flip(f / INDEX, 24), [1, 3]),
        (lambda f: (f / INDEX).unlink(), []),
        (lambda f: (f / ROWS).unlink(), []),
        (lambda f: (f / META).unlink(), []),
        (lambda f: (f / META).write_bytes(b"\xff{"), []),
    ],
)
def test_damaged_rows_are_not_read_and_can_be_written_again(
    damage: Callable[[Path], object], left: list[int], tmp_path: Path
) -> None:
    store(tmp_path).append([digest(i) for i in (1, 2, 3)], rows(1, 2, 3))
    damage(tmp_path)
    opened = store(tmp_path)
    assert [i for i in (1, 2, 3) if digest(i) in opened] == left
    lost = [i for i in (1, 2, 3) if i not in left]
    opened.append([digest(i) for i in lost], rows(*lost))
    for found in (opened, store(tmp_path)):
        assert [found[digest(i)].tolist() for i in (1, 2, 3)] == rows(1, 2, 3).tolist()


def cut(file: Path, end: int) -> None:
    file.write_bytes(file.read_bytes()[:end])


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_foreign_store_is_emptied_with_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = store(tmp_path)
    old.append([digest(1)], rows(1))
    reader = store(tmp_path)
    assert len(store(tmp_path, {"weights": "b"})) == 0
    assert [r.message for r in caplog.records if "filled by other weights" in r.message] != []
    assert len(caplog.records) == 1
    assert reader[digest(1)].tolist() == [1] * ROW


def images(folder: Path, count: int = 5) -> list[Path]:
    return [e.image for e in tiny_examples(folder, [("a cat",)] * count)]


def mean_states(pixel_values: Tensor) -> Tensor:
    """Stands for an encoder: (B, 2, 3) means of the channels, and their double."""
    means = pixel_values.float().mean(dim=(2, 3))
    return torch.stack([means, 2 * means], dim=1)


def cache(root: Path, **options: object) -> EncoderCache:
    settings = tiny_processor().image_settings
    return EncoderCache(root, FACTS, StoredTensor((2, 3), torch.float32), settings, **options)  # type: ignore[arg-type]


def test_cache_holds_each_image_once_and_finds_it_by_content(tmp_path: Path) -> None:
    files = images(tmp_path)
    copy = tmp_path / "copy.png"
    shutil.copy(files[0], copy)
    sizes: list[int] = []

    def encode(pixel_values: Tensor) -> Tensor:
        sizes.append(len(pixel_values))
        return mean_states(pixel_values)

    first = cache(tmp_path / "cache")
    assert first.fill([(f, None) for f in [*files, copy]], encode, batch_size=3)
    assert sizes == [3, 3], "five distinct images; the second batch is padded"
    processor = tiny_processor()
    for file in [*files, copy]:
        assert torch.equal(first.hidden_states(file), mean_states(processor.pixel_values(file)[None])[0])
    again, moved = cache(tmp_path / "cache"), tmp_path / "moved.png"
    files[1].rename(moved)
    assert again.fill([(moved, None), (files[0], None)], encode, batch_size=3)
    assert len(sizes) == 2, "a file that was moved is found by its content"
    shutil.copy(files[2], files[0])
    changed = cache(tmp_path / "cache")
    assert changed.fill([(files[0], None)], encode, batch_size=3)
    assert torch.equal(changed.hidden_states(files[0]), first.hidden_states(files[2]))


def test_fill_continues_after_an_error(tmp_path: Path) -> None:
    files, calls = images(tmp_path), [0]

    def failing(pixel_values: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return mean_states(pixel_values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder_cache, "BYTES_PER_WRITE", 1)
        with pytest.raises(KeyboardInterrupt):
            cache(tmp_path / "cache").fill([(f, None) for f in files], failing, batch_size=2)
    calls[0] = 10
    assert cache(tmp_path / "cache").fill([(f, None) for f in files], failing, batch_size=2)
    assert calls[0] == 11, "only the last image is computed again"


def test_unreadable_images_are_named_or_noted(tmp_path: Path) -> None:
    files = images(tmp_path)
    files[2].write_bytes(b"no image")
    with pytest.raises(BadImageError, match=r"2\.png"):
        cache(tmp_path / "cache").fill([(f, None) for f in files], mean_states, batch_size=2)
    found = cache(tmp_path / "cache")
    found.fill([(f, None) for f in files], mean_states, batch_size=2, skip_unreadable=True)
    with pytest.raises(BadImageError) as error:
        found.hidden_states(files[2])
    with pytest.raises(BadImageError) as expected:
        tiny_processor().pixel_values(files[2])
    assert str(error.value) == str(expected.value)


def test_disk_that_is_too_small_gives_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = images(tmp_path)
    monkeypatch.setattr(encoder_cache, "SPARE_BYTES", 1 << 60)
    with pytest.raises(UsageError, match=r"data\.cache: 5 images .* GB to spare; name a folder on a larger disk"):
        cache(tmp_path / "cache").fill([(f, None) for f in files], mean_states, batch_size=2)


def test_cache_without_being_asked_leaves_large_ones_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mmbert")
    requests = [(f, None) for f in images(tmp_path)]
    assert not cache(tmp_path / "cache").fill(requests, mean_states, batch_size=2, max_bytes=5 * 24 - 1)
    assert "data.cache=FOLDER" in caplog.text
    assert cache(tmp_path / "cache").fill(requests, mean_states, batch_size=2, max_bytes=5 * 24)


def test_folder_that_can_not_be_written_gives_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"data\.cache: .*file.*; name a folder that can be written"):
        cache(tmp_path / "file/cache").fill([(images(tmp_path)[0], None)], mean_states, batch_size=2)


def pairs(folder: Path, *, views: int) -> Pairs:
    examples = tiny_examples(folder, [("a cat on the left",), ("a dog", "a cat on the right"), ("two birds",)])
    masking = Masking(
        mask_token_id=MASK, ordinary_ids=np.arange(5, VOCAB), special_ids=frozenset(range(5)), probability=0.5,
        whole_word=False,
    )  # fmt: skip
    data = Pairs(examples, tiny_processor(), masking, seed=3, augmentation=Augmentation(0.5, True))
    data.views = views
    return data


def test_views_are_chosen_by_epoch_and_mirror_no_left_or_right(tmp_path: Path) -> None:
    data = pairs(tmp_path, views=3)
    requests = list(data.cache_requests())
    assert len(requests) == 3 * (1 + 2 + 1), "an image whose captions differ in left or right has both kinds"
    found = cache(tmp_path / "cache", augmentation=Augmentation(0.5, True), seed=3)
    found.fill(requests, mean_states, batch_size=4)
    data.cache = found
    of_epochs = [data[epoch, 0].pixel_values for epoch in range(40)]
    distinct = {tuple(x.flatten().tolist()) for x in of_epochs}
    assert distinct == {tuple(found.hidden_states(data.examples[0].image, View(n, False)).flatten().tolist())
                        for n in range(3)}  # fmt: skip
    assert torch.equal(data[7, 0].pixel_values, pairs_with(data, tmp_path, found)[7, 0].pixel_values)


def pairs_with(like: Pairs, folder: Path, found: EncoderCache) -> Pairs:
    other = pairs(folder, views=like.views)
    other.cache = found
    return other
