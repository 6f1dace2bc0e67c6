"""`mmbert index` and `mmbert search`: exact results, updates, kills, several processes, and errors in one sentence."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interrupted import killed_at
from PIL import Image
from processes import in_processes
from ranking import tiny_model
from tiers import tier
from tiny import tiny_processor

import mmbert
from mmbert.cli.main import main
from mmbert.errors import DataError, UsageError
from mmbert.inference import index_files, indexing
from mmbert.inference.index import ImageIndex, model_hash
from mmbert.inference.index_files import FACTS_FILE, PartWriter, read_parts
from mmbert.inference.indexing import IndexReport, build_index, scan_folder
from mmbert.inference.loaded import LoadedModel, load


def saved(folder: Path, **options: Any) -> str:
    tiny_model(**options).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(model_folder: str) -> LoadedModel:
    return load(model_folder, "cpu")


def write_image(file: Path, seed: int) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(file)
    return file


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Seven images at three depths."""
    names = ("a.png", "b.JPG", "deep/c.png", "deep/er/d.webp", "deep/er/e.gif", "f.bmp", "z/ü.tiff")
    for seed, name in enumerate(names):
        write_image(tmp_path / "photos" / name, seed)
    (tmp_path / "photos/notes.txt").write_text("no image")
    write_image(tmp_path / "photos/.hidden/x.png", 0)
    return tmp_path / "photos"


def build(model: LoadedModel, photos: Path, **options: Any) -> IndexReport:
    return build_index(model, photos, photos.parent / "index", num_workers=0, **options)


def opened(model: LoadedModel, photos: Path) -> ImageIndex:
    return mmbert.load_index(photos.parent / "index", model)


def vectors_by_file(index: ImageIndex) -> dict[str, np.ndarray]:
    """The vector of each image, whichever part it is in."""
    found = {}
    for vectors, (numbers, rows) in zip(index.vectors, index._places, strict=True):
        found |= {index.files[n]: np.asarray(vectors[r]) for n, r in zip(numbers.tolist(), rows.tolist(), strict=True)}
    return found


def assert_complete(model: LoadedModel, photos: Path, index: ImageIndex) -> None:
    """Every image of the folder has the vector that the model gives it alone, and nothing else is there."""
    files = {str(file.relative_to(photos)) for file in photos.rglob("*.*") if file.suffix.lower() != ".txt"}
    files = {file for file in files if not file.startswith(".")}
    found = vectors_by_file(index)
    assert found.keys() == files
    for file, vector in found.items():
        expected = model.embed(images=photos / file).images
        assert expected is not None
        np.testing.assert_allclose(vector.astype(np.float32), expected[0].numpy(), atol=1e-3)


def test_search_finds_what_a_full_product_finds(model: LoadedModel, photos: Path) -> None:
    assert build(model, photos) == IndexReport(7, 7, 0, {})
    index = opened(model, photos)
    assert_complete(model, photos, index)
    found = index.search("a red cat", k=7)
    text, images = model.embed(texts="a red cat").texts, model.embed(images=[r.path for r in found]).images
    assert text is not None and images is not None
    cosines = (images @ text[0]).tolist()
    assert [result.score for result in found] == pytest.approx(cosines, abs=2e-3)
    scores = [result.score for result in found]
    assert scores == sorted(scores, reverse=True) and {result.kind for result in found} == {"cosine"}
    assert [*index.search("a red cat", k=2)] == found[:2] and len(index.search("a red cat", k=50)) == 7


def test_search_by_image_in_every_form(model: LoadedModel, photos: Path) -> None:
    build(model, photos)
    index, file = opened(model, photos), photos / "deep/c.png"
    for query in (file, str(file), file.read_bytes(), Image.open(file), np.asarray(Image.open(file))):
        best = index.search(query, k=1)[0]
        assert (best.path, best.score) == (str(file), pytest.approx(1, abs=1e-3))


def test_reranking_orders_the_shortlist_by_the_match_probability(model: LoadedModel, photos: Path) -> None:
    build(model, photos)
    index = opened(model, photos)
    shortlist = [result.path for result in index.search("a red cat", k=4)]
    found = index.search("a red cat", k=3, rerank=4)
    expected = sorted(((model.match(path, "a red cat").scores[0], path) for path in shortlist), reverse=True)[:3]
    assert [result.path for result in found] == [path for _, path in expected]
    assert [result.score for result in found] == pytest.approx([score for score, _ in expected], abs=1e-5)
    assert found[0].kind == "probability"
    Path(shortlist[0]).unlink()
    assert index.search("a red cat", k=4, rerank=2) == index.search("a red cat", k=4, rerank=4), "k images at least"
    assert len(index.search("a red cat", k=4, rerank=4)) == 3, "a file that is gone is left out"


def test_only_new_and_changed_images_are_encoded(model: LoadedModel, photos: Path) -> None:
    build(model, photos)
    before = {file.name: file.stat().st_mtime_ns for file in (photos.parent / "index").glob("*merged*")}
    assert build(model, photos) == IndexReport(7, 0, 0, {})
    assert before == {file.name: file.stat().st_mtime_ns for file in (photos.parent / "index").glob("*merged*")}
    write_image(photos / "new.png", 50)
    write_image(photos / "a.png", 51)
    os.utime(photos / "b.JPG", ns=(1, 1))  # copied: another time, the same content
    (photos / "f.bmp").unlink()
    shutil.rmtree(photos / "z")
    assert build(model, photos) == IndexReport(6, 2, 2, {})
    assert_complete(model, photos, opened(model, photos))
    names = sorted(file.name for file in (photos.parent / "index").iterdir() if not file.name.startswith("."))
    assert len(names) == 3 and names[2] == FACTS_FILE, "the parts are merged"


def test_a_moved_folder_keeps_its_vectors_and_another_is_refused(model: LoadedModel, photos: Path) -> None:
    build(model, photos)
    other = photos.parent / "other"
    write_image(other / "x.png", 0)
    with pytest.raises(UsageError, match=r"is the index of .*photos', not of .*other'; give another --out"):
        build_index(model, other, photos.parent / "index", num_workers=0)
    moved = photos.rename(photos.parent / "moved")
    assert build_index(model, moved, photos.parent / "index", num_workers=0) == IndexReport(7, 0, 0, {})
    assert opened(model, photos).search(moved / "a.png", k=1)[0].path == str(moved / "a.png")


def test_links_are_followed_once(photos: Path, tmp_path: Path) -> None:
    (photos / "deep/loop").symlink_to(photos)
    (photos / "again").symlink_to(photos / "deep")
    write_image(tmp_path / "outside/o.png", 0)
    (photos / "linked").symlink_to(tmp_path / "outside")
    scan = scan_folder(photos)
    assert len(scan.files) == 8 and "linked/o.png" in scan.files
    assert sorted(scan.repeated) == ["again", "deep/loop"]


def test_unreadable_files_are_named_and_counted(
    model_folder: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "text.jpg").write_text("no image")
    (photos / "broken.png").write_bytes((photos / "a.png").read_bytes()[:200])
    (photos / "nowhere.png").symlink_to(photos / "missing.png")
    command = ["index", model_folder, str(photos), "--out", str(photos.parent / "index"), "--num_workers", "1"]
    main(command)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("7 new or changed, 0 deleted, 3 unreadable")
    assert [line.split(": ")[1] for line in lines[1:]] == ["broken.png", "nowhere.png", "text.jpg"]
    assert "truncated or damaged" in lines[1] and "no such file" in lines[2] and "text" in lines[3]
    main([*command, "--json"])  # they are not tried again
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["encoded"], len(found["unreadable"])) == (7, 0, 3)
    (photos / "text.jpg").unlink()
    write_image(photos / "text.jpg", 9)
    main(command)
    assert "1 new or changed, 0 deleted, 2 unreadable" in capsys.readouterr().out


def test_commands_print_paths_and_write_a_contact_sheet(
    model_folder: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = photos / "<script>alert(1)<\u2028script>.png"
    shutil.copy(photos / "a.png", hostile)
    index = str(tmp_path / "index")
    main(["index", model_folder, str(photos), "--out", index, "--num_workers", "0"])
    capsys.readouterr()
    main(["search", index, "a red <b>cat", "-k", "8", "--html", str(tmp_path / "sheet.html")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9 and all(str(photos) in line for line in lines[:8])
    page = (tmp_path / "sheet.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 8 and "<script" not in page and "<b>" not in page
    main(["search", index, str(photos / "f.bmp"), "-k", "1", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found[0]["path"] == str(photos / "f.bmp") and found[0]["kind"] == "cosine"


def test_what_was_written_before_a_kill_is_kept(model: LoadedModel, photos: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(index_files, "SECONDS_PER_COMMIT", 0.0)

    def stop(self: PartWriter, entries: Any, vectors: Any = None, add: Callable[..., None] = PartWriter.add) -> None:
        add(self, entries, vectors)
        if "deep/er/d.webp" in [entry.file for entry in entries]:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PartWriter, "add", stop)
        with pytest.raises(KeyboardInterrupt):
            build(model, photos, batch_size=1)
    assert len(opened(model, photos)) == 4, "an unfinished index can be searched"
    part = next((photos.parent / "index").glob("*.jsonl"))
    with part.open("a") as manifest, part.with_suffix(".vectors").open("ab") as vectors:
        manifest.write('{"file": "f.bmp", "si')  # torn tails
        vectors.write(b"\0" * 13)
    assert build(model, photos).encoded == 3
    assert_complete(model, photos, opened(model, photos))


def test_kills_lose_nothing(model: LoadedModel, photos: Path, monkeypatch: Any) -> None:
    for seed in range(10, 10 + tier(20, 300)):
        write_image(photos / f"more/{seed}.png", seed)
    monkeypatch.setattr(index_files, "SECONDS_PER_COMMIT", 0.0)
    slow = LoadedModel.device.fget  # a pause in every batch, so that the kills come while indexing
    monkeypatch.setattr(LoadedModel, "device", property(lambda self: (time.sleep(0.02), slow(self))[1]))  # pyright: ignore
    index, done, random = photos.parent / "index", 0, np.random.default_rng(0)
    for _ in range(tier(2, 20)):
        if not killed_at(
            lambda: build(model, photos, batch_size=1), seconds=0.1 + random.uniform(0, tier(15, 60)) / 100
        ):
            continue
        if (index / FACTS_FILE).is_file():
            entries, _, _ = read_parts(index, opened(model, photos).facts.embedding_size)
            assert len(entries) >= done, "no line of an earlier run is lost"
            done = len(entries)
    monkeypatch.undo()
    report = build(model, photos)
    assert report.images == 7 + tier(20, 300) and report.encoded == report.images - done
    assert_complete(model, photos, opened(model, photos))


def test_a_truncated_index_is_reported_and_repaired(model: LoadedModel, photos: Path) -> None:
    build(model, photos)
    file = next((photos.parent / "index").glob("*.vectors"))
    with file.open("r+b") as vectors:
        vectors.truncate(5 * 2 * 8 + 3)
    with pytest.raises(DataError, match=r"truncated: 5 vectors, .* number 6; .*run mmbert index once more"):
        opened(model, photos)
    assert build(model, photos) == IndexReport(7, 2, 0, {})
    assert_complete(model, photos, opened(model, photos))


def test_processes_encode_shards_of_one_index(model: LoadedModel, photos: Path, tmp_path: Path) -> None:
    def work(rank: int) -> list[Any]:
        return [*build(model, photos)]

    reports = in_processes(2, work, tmp_path)
    assert reports[0] == reports[1] == [7, 7, 0, {}]
    together = vectors_by_file(opened(model, photos))
    shutil.rmtree(tmp_path / "index")
    build(model, photos)
    alone = vectors_by_file(opened(model, photos))
    assert [*together] == [*alone]
    assert all(np.allclose(together[file], alone[file], atol=1e-3) for file in alone)


def test_an_index_of_another_model_is_refused(model: LoadedModel, photos: Path, tmp_path: Path) -> None:
    build(model, photos)
    again = load(model.name, "cpu")
    assert model_hash(again) == model_hash(model)
    with torch.no_grad():
        again.core.word_embeddings[3, 0] += 1e-3
    for use in (lambda: opened(again, photos), lambda: build(again, photos)):
        with pytest.raises(UsageError, match="was made with another model"):
            use()
    memory = LoadedModel(model.model, model.processor)
    assert len(mmbert.load_index(tmp_path / "index", memory)) == 7, "where it was loaded from does not matter"


def test_bad_input_is_one_sentence(
    model_folder: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index, empty = str(tmp_path / "index"), tmp_path / "empty"
    empty.mkdir()
    matching, contrastive = (
        saved(tmp_path / name, objectives={name: 1.0 if name == "itm" else {"embedding_size": 8}})
        for name in ("itm", "itc")
    )
    only_text = tmp_path / "only_text"
    only_text.mkdir()
    (only_text / "a.jpg").write_text("no image")
    main(["index", model_folder, str(photos), "--out", index, "--num_workers", "0"])
    other = str(tmp_path / "contrastive_index")
    main(["index", contrastive, str(photos), "--out", other, "--num_workers", "0"])
    capsys.readouterr()
    for code, message, *arguments in (
        (2, "needs a model that was pretrained with the objective itc", "index", matching, str(photos), "--out", "x"),
        (
            2,
            "has no image in it or below it; JPEG, PNG",
            "index",
            model_folder,
            str(empty),
            "--out",
            str(tmp_path / "x"),
        ),
        (2, "is no folder", "index", model_folder, str(tmp_path / "nowhere"), "--out", "x"),
        (1, "all 1 are unreadable", "index", model_folder, str(only_text), "--out", str(tmp_path / "y")),
        (2, "is no index and not empty", "index", model_folder, str(photos), "--out", str(photos)),
        (2, "was made with another model", "index", contrastive, str(photos), "--out", index),
        (2, "was made with another model", "search", index, "a cat", "--model", contrastive),
        (2, "is no index: it has no index.json", "search", str(empty), "a cat"),
        (1, "no_such.png: no such file", "search", index, "no_such.png"),
        (2, "the text to search for is empty", "search", index, " "),
        (2, "k=0: must be a whole number of 1 or more", "search", index, "a cat", "-k", "0"),
        (2, "re-ranking fuses a text", "search", index, str(photos / "a.png"), "--rerank", "3"),
        (2, "pretrained with the objective itm", "search", other, "a cat", "--rerank", "3"),
        (2, "its folder does not exist", "search", index, "a cat", "--html", str(tmp_path / "no/sheet.html")),
        (2, "is a folder; give a file", "search", index, "a cat", "--html", str(tmp_path)),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*arguments])
        error = capsys.readouterr().err
        assert stopped.value.code == code and message in error and error.count("error:") == 1, (arguments, error)
    assert not (tmp_path / "x").exists()
    (Path(index) / FACTS_FILE).write_text('{"format": 7}')
    with pytest.raises(DataError, match=r"index\.json: .*make the index anew"):
        mmbert.load_index(index)


def test_a_second_process_that_writes_is_refused(model: LoadedModel, photos: Path, monkeypatch: Any) -> None:
    build(model, photos)
    messages = []

    def during(*_: Any) -> int:
        with pytest.raises(UsageError, match="another process is writing this index") as caught:
            build(model, photos)
        messages.append(caught)
        return 0

    monkeypatch.setattr(indexing, "_encode", during)
    indexing.build_index(model, photos, photos.parent / "index", num_workers=0)
    assert messages


def test_approximate_index_finds_nearly_the_same(
    model: LoadedModel, photos: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    if indexing.find_spec("faiss") is None:
        pytest.skip("needs faiss-cpu (pip install 'mmbert[faiss]')")
    with caplog.at_level("INFO", logger="mmbert"):
        build(model, photos, approximate=True)
    assert "recall@7 1.000 against exact search on 7 images" in caplog.text
    index = opened(model, photos)
    assert index.approximate is not None
    exact, found = (index.search("a red cat", k=5, exact=exact) for exact in (True, False))
    assert [result.path for result in found] == [result.path for result in exact]
    assert [result.score for result in found] == pytest.approx([result.score for result in exact], abs=1e-3)
    write_image(photos / "new.png", 1)
    build(model, photos)
    assert opened(model, photos).approximate is None, "it is out of date"
    monkeypatch.setattr(indexing, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'mmbert\[faiss\]'"):
        build(model, photos, approximate=True)
