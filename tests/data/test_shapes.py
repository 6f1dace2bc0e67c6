"""The embedded data set: what data/shapes/prepare.py writes and whether it is true."""

from __future__ import annotations

import filecmp
import json
import random
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

SHAPES = Path(__file__).resolve().parents[2] / "data" / "shapes"
SEED = 3
COUNTS = {"train": 600, "val": 40, "test": 200}
SPLITS = tuple(COUNTS)

sys.path.insert(0, str(SHAPES))
import captions as caption_module  # noqa: E402
import foils as foil_module  # noqa: E402
import scenes as scene_module  # noqa: E402
from meaning import Meaning, Thing, holds  # noqa: E402

sys.path.remove(str(SHAPES))


def run_prepare(out: Path, *options: str, counts: dict[str, int] = COUNTS) -> subprocess.CompletedProcess[str]:
    """Runs the script as a user does."""
    numbers = [text for split, count in counts.items() for text in (f"--{split}", str(count))]
    command = [sys.executable, str(SHAPES / "prepare.py"), "--out", str(out), "--seed", str(SEED), *numbers]
    return subprocess.run([*command, *options], capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A small set and what the script printed."""
    out = tmp_path_factory.mktemp("shapes")
    finished = run_prepare(out, "--jobs", "1")
    assert finished.returncode == 0, finished.stderr
    return out, finished.stdout


@pytest.fixture(scope="module")
def root(made: tuple[Path, str]) -> Path:
    """The folder of the small set."""
    return made[0]


def load(root: Path, name: str) -> Any:
    """An annotation file."""
    return json.loads((root / "annotations" / f"{name}.json").read_text())


def captions_by_image(root: Path, name: str) -> dict[int, list[str]]:
    """The captions of each image id."""
    found: dict[int, list[str]] = defaultdict(list)
    for annotation in load(root, name)["annotations"]:
        found[annotation["image_id"]].append(annotation["caption"])
    return found


def scene_of(image: dict[str, Any]) -> scene_module.Scene:
    """The scene that a captions file describes."""
    objects = tuple(scene_module.Object(**obj) for obj in image["objects"])
    return scene_module.Scene(objects, image["background"])


def split_and_index(image: dict[str, Any]) -> tuple[str, int]:
    """What a scene is made from: "test/000007.png" is index 6 of test."""
    split, name = image["file_name"].split("/")
    return split, int(name.removesuffix(".png")) - 1


def written_captions(image: dict[str, Any]) -> list[caption_module.Caption]:
    """The captions of an image with their meanings, made again."""
    split, index = split_and_index(image)
    rng = scene_module.generator(SEED, split, index, "captions")
    return caption_module.write_captions(scene_of(image), rng)


def test_prepare_same_seed_gives_equal_bytes_whatever_jobs(root: Path, tmp_path: Path) -> None:
    assert run_prepare(tmp_path, "--jobs", "3").returncode == 0
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert filecmp.cmpfiles(root, tmp_path, names, shallow=False) == (names, [], [])


def test_prepare_scene_does_not_depend_on_the_number_of_scenes(root: Path, tmp_path: Path) -> None:
    assert run_prepare(tmp_path, counts={"train": 64, "val": 16, "test": 32}).returncode == 0
    for split in SPLITS:
        few, many = load(tmp_path, f"captions_{split}"), load(root, f"captions_{split}")
        assert few["images"] == many["images"][: len(few["images"])]
        assert few["annotations"] == many["annotations"][: len(few["annotations"])]


def test_prepare_keeps_a_complete_set(root: Path) -> None:
    marker = root / "annotations" / "captions_train.json"
    before = marker.stat().st_mtime_ns
    finished = run_prepare(root)
    assert finished.returncode == 0
    assert "already" in finished.stdout
    assert marker.stat().st_mtime_ns == before


def test_boxes_of_an_earlier_set_are_added_and_equal_those_of_a_new_one(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "annotations", tmp_path / "annotations")
    (tmp_path / "annotations" / "instances_val.json").unlink()
    finished = run_prepare(tmp_path)
    assert finished.returncode == 0 and "instances_val.json is added" in finished.stdout
    names = [path.name for path in (root / "annotations").iterdir()]
    assert filecmp.cmpfiles(root / "annotations", tmp_path / "annotations", names, shallow=False) == (names, [], [])


def test_boxes_end_where_the_pixels_of_their_shapes_do(root: Path) -> None:
    content = load(root, "instances_train")
    names = {category["id"]: category["name"] for category in content["categories"]}
    by_image = defaultdict(list)
    for annotation in content["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    assert len(names) == 40 and [image["id"] for image in content["images"]] == sorted(by_image)
    seen = set()
    for image in load(root, "captions_train")["images"][:200]:
        boxes = by_image[image["id"]]
        described = [f"{obj['color']} {obj['shape']}" for obj in image["objects"]]
        assert [names[box["category_id"]] for box in boxes] == described
        if len(boxes) > 1:  # others may be close
            continue
        seen.add(image["objects"][0]["shape"])
        pixels = np.asarray(Image.open(root / "images" / image["file_name"])).astype(int)
        rows, columns = np.nonzero(np.abs(pixels - pixels[0, 0]).max(axis=2) > 8)
        left, top, width, height = boxes[0]["bbox"]
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert found == pytest.approx([left, top, left + width, top + height], abs=1.3)
    assert seen == {*scene_module.SHAPES}


def test_prepare_finishes_an_interrupted_run_with_other_arguments(root: Path, tmp_path: Path) -> None:
    run_prepare(tmp_path, counts={"train": 80, "val": 16, "test": 32})
    (tmp_path / "annotations" / "captions_train.json").unlink()
    assert run_prepare(tmp_path, counts={"train": 64, "val": 16, "test": 32}).returncode == 0
    assert len(load(tmp_path, "captions_train")["images"]) == 64
    assert len(list((tmp_path / "images" / "train").iterdir())) == 64


@pytest.mark.parametrize(("option", "value"), [("--train", "0"), ("--size", "8"), ("--jobs", "0")])
def test_prepare_names_a_bad_value_and_what_is_allowed(tmp_path: Path, option: str, value: str) -> None:
    finished = run_prepare(tmp_path, option, value)
    assert finished.returncode == 2
    assert f"{option} is {value}; it must be a number from" in finished.stderr


def test_a_few_scenes_may_share_captions(tmp_path: Path) -> None:
    """One caption of 5 scenes is true of another by chance; the bar is for sets."""
    finished = run_prepare(tmp_path, "--seed", "10", counts={"train": 5, "val": 5, "test": 5})
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize("split", SPLITS)
def test_images_exist_in_the_requested_size(root: Path, split: str) -> None:
    images = load(root, f"captions_{split}")["images"]
    assert len(images) == COUNTS[split]
    for image in images:
        with Image.open(root / "images" / image["file_name"]) as image:
            assert (image.size, image.mode) == ((64, 64), "RGB")


@pytest.mark.parametrize("split", SPLITS)
def test_images_show_each_object_in_its_color(root: Path, split: str) -> None:
    palette = scene_module.COLORS
    for record in load(root, f"captions_{split}")["images"][:40]:
        image = Image.open(root / "images" / record["file_name"])
        for obj in record["objects"]:
            pixel = image.getpixel((int(obj["x"] * 64), int(obj["y"] * 64)))
            far = {name: sum(abs(a - b) for a, b in zip(pixel, palette[name], strict=True)) for name in palette}
            assert min(far, key=far.__getitem__) == obj["color"]


@pytest.mark.parametrize("split", SPLITS)
def test_captions_are_five_different_short_ones(root: Path, split: str) -> None:
    captions = captions_by_image(root, f"captions_{split}")
    assert len(captions) == COUNTS[split]
    for texts in captions.values():
        assert len(set(texts)) == len(texts) == 5
        assert all(text == text.lower() and len(text.split()) <= 30 for text in texts)


@pytest.mark.parametrize("split", SPLITS)
def test_captions_are_strictly_true(root: Path, split: str) -> None:
    texts = captions_by_image(root, f"captions_{split}")
    for image in load(root, f"captions_{split}")["images"]:
        captions = written_captions(image)
        assert [caption.text for caption in captions] == texts[image["id"]]
        assert all(holds(caption.meaning, scene_of(image), strict=True) for caption in captions)


def test_captions_are_true_of_few_other_scenes(made: tuple[Path, str]) -> None:
    root, printed = made
    images = load(root, "captions_test")["images"]
    scenes = [scene_of(image) for image in images]
    meanings = [written_captions(image)[0].meaning for image in images]
    true_of = [sum(holds(meaning, scene) for scene in scenes) - 1 for meaning in meanings]
    assert sum(true_of) / (len(scenes) * (len(scenes) - 1)) < 0.02
    assert "captions satisfied by other scenes:" in printed


def test_held_out_pairs_leave_every_color_and_shape_partners() -> None:
    colors, shapes = zip(*scene_module.HELD_OUT, strict=True)
    assert max(Counter(colors).values()) == 1
    assert max(Counter(shapes).values()) == 2


@pytest.mark.parametrize("name", ["train", "val", "test_seen"])
def test_held_out_pairs_never_occur_outside_unseen(root: Path, name: str) -> None:
    held_out = set(scene_module.HELD_OUT)
    content = load(root, f"captions_{name}")
    assert content["images"]
    assert not any((o["color"], o["shape"]) in held_out for image in content["images"] for o in image["objects"])
    words = [f"{color} {shape}" for color, shape in held_out]
    assert not any(pair in annotation["caption"] for annotation in content["annotations"] for pair in words)


@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_questions_about_held_out_pairs_are_only_in_unseen(root: Path, name: str) -> None:
    unseen = set(captions_by_image(root, "captions_test_unseen"))
    questions = [q for q in load(root, f"questions_{name}")["questions"] if q["image_id"] not in unseen]
    assert questions
    for color, shape in scene_module.HELD_OUT:
        for words in (f"{color} {shape}", f"{shape} {color}?"):
            assert not any(words in question["question"] for question in questions)


def test_held_out_pairs_are_named_in_every_unseen_caption(root: Path) -> None:
    captions = captions_by_image(root, "captions_test_unseen")
    images = load(root, "captions_test_unseen")["images"]
    assert len(images) == COUNTS["test"] // 2
    for image in images:
        pairs = {(o["color"], o["shape"]) for o in image["objects"]} & set(scene_module.HELD_OUT)
        assert pairs
        for text in captions[image["id"]]:
            assert any(f"{color} {shape}" in text for color, shape in pairs)


def test_seen_and_unseen_are_a_partition_of_test(root: Path) -> None:
    seen, unseen, both = (set(captions_by_image(root, f"captions_{n}")) for n in ("test_seen", "test_unseen", "test"))
    assert not seen & unseen
    assert seen | unseen == both


def test_foils_differ_from_captions_and_are_false(root: Path) -> None:
    foils = {foil["filename"]: foil for foil in load(root, "foils_test").values()}
    assert len(foils) > 0.9 * COUNTS["test"]
    for image in load(root, "captions_test")["images"]:
        if image["file_name"] not in foils:
            continue
        foil = foils[image["file_name"]]
        rng = scene_module.generator(SEED, *split_and_index(image), "foil")
        proposed = foil_module.propose_foils(scene_of(image), written_captions(image), rng)
        made = [p for p in proposed if (p.caption.text, p.negative.text) == (foil["caption"], foil["negative_caption"])]
        assert made and {p.category for p in proposed} == {foil["category"]}
        assert not any(holds(p.negative.meaning, scene_of(image)) for p in made)
        assert foil["negative_caption"] not in {caption.text for caption in written_captions(image)}


def test_foils_cover_all_categories_roughly_evenly(root: Path) -> None:
    counts = Counter(foil["category"] for foil in load(root, "foils_test").values())
    assert set(counts) == set(foil_module.FOILS)
    assert min(counts.values()) > 0.1 * sum(counts.values())


def test_no_word_tells_a_caption_from_its_foil() -> None:
    balance, first, chosen = foil_module.WordBalance(), Counter(), Counter()
    for index in range(1, 2001, 2):  # scenes without held-out pairs
        scene = scene_module.sample_scene(SEED, "test", index)
        written = caption_module.write_captions(scene, scene_module.generator(SEED, "test", index, "captions"))
        foils = foil_module.propose_foils(scene, written, scene_module.generator(SEED, "test", index, "foil"))
        if not foils:
            continue
        pairs = [(foil.caption.text, foil.negative.text) for foil in foils]
        for surplus, (caption, negative) in (
            (first, pairs[0]),
            (chosen, pairs[balance.choose(foils[0].category, False, pairs)]),
        ):
            surplus.update(foils[0].category + word for word in set(caption.split()) - set(negative.split()))
            surplus.subtract(foils[0].category + word for word in set(negative.split()) - set(caption.split()))
    assert max(map(abs, chosen.values())) < 10 < 40 < max(map(abs, first.values()))


def test_the_foil_that_balances_words_is_chosen() -> None:
    balance = foil_module.WordBalance()
    to_four = ("two cats", "four cats")
    to_two = ("four cats", "two cats")
    assert balance.choose("count", False, [to_four, to_two]) == 0  # a tie
    assert balance.choose("count", True, [to_four, to_two]) == 0  # of its own
    assert balance.choose("count", False, [to_four, to_two]) == 1
    assert foil_module.word_changes("a red cat, a dog", "a cat, a dog") == {
        "red": 1,
        "a red": 1,
        "red cat": 1,
        "a cat": -1,
    }


def test_swapped_foils_use_the_same_words(root: Path) -> None:
    swaps = [f for f in load(root, "foils_test").values() if f["category"] == "swap_attribute"]
    assert swaps
    for foil in swaps:
        texts = [foil[name].replace(",", "").split() for name in ("caption", "negative_caption")]
        # "a" may turn into "an" before "orange"
        first, second = (sorted("a" if word == "an" else word for word in words) for words in texts)
        assert first == second


@pytest.mark.parametrize("split", SPLITS)
def test_questions_have_ten_equal_answers(root: Path, split: str) -> None:
    questions = load(root, f"questions_{split}")["questions"]
    answers = load(root, f"answers_{split}")["annotations"]
    assert [q["question_id"] for q in questions] == [a["question_id"] for a in answers]
    assert len({q["question_id"] for q in questions}) == len(questions) > 2.9 * COUNTS[split]
    for question, annotation in zip(questions, answers, strict=True):
        assert question["question"].lower().startswith(annotation["question_type"])
        assert [answer["answer_id"] for answer in annotation["answers"]] == list(range(1, 11))
        assert {answer["answer"] for answer in annotation["answers"]} == {annotation["multiple_choice_answer"]}


def test_no_question_has_two_answers(root: Path) -> None:
    answers = {a["question_id"]: a["multiple_choice_answer"] for a in load(root, "answers_test")["annotations"]}
    found: dict[tuple[int, str], set[str]] = defaultdict(set)
    for question in load(root, "questions_test")["questions"]:
        found[question["image_id"], question["question"]].add(answers[question["question_id"]])
    assert all(len(values) == 1 for values in found.values())


def test_questions_about_counts_and_attributes_are_answered_rightly(root: Path) -> None:
    objects = {image["id"]: image["objects"] for image in load(root, "captions_train")["images"]}
    answers = {a["question_id"]: a["multiple_choice_answer"] for a in load(root, "answers_train")["annotations"]}
    values = (*scene_module.COLORS, *scene_module.SHAPES, *scene_module.SIZES)
    singular = {value: value for value in values} | {value + "s": value for value in values}
    singular["crosses"] = "cross"
    checked = Counter()
    for question in load(root, "questions_train")["questions"]:
        words = question["question"].rstrip("?").lower().split()
        named = {singular[word] for word in words if word in singular}
        present = [{obj["color"], obj["shape"], obj["size"]} for obj in objects[question["image_id"]]]
        count = sum(named <= own for own in present)
        start = " ".join(words[:2])
        expected = {"how many": str(count), "is there": "yes" if count else "no"}
        if start in expected:
            assert answers[question["question_id"]] == expected[start], question
            checked[start] += 1
    assert min(checked["how many"], checked["is there"]) > 100


def test_questions_balance_yes_and_no(root: Path) -> None:
    answers = [a for a in load(root, "answers_train")["annotations"] if a["answer_type"] == "yes/no"]
    share = sum(a["multiple_choice_answer"] == "yes" for a in answers) / len(answers)
    assert 0.42 < share < 0.58
    assert {a["answer_type"] for a in load(root, "answers_train")["annotations"]} == {
        "yes/no",
        "number",
        "other",
    }


def test_tokenizer_knows_every_word_of_test(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(root / "tokenizer")
    texts = [a["caption"] for a in load(root, "captions_test")["annotations"]]
    texts += [q["question"] for q in load(root, "questions_test")["questions"]]
    encoded = tokenizer(texts)["input_ids"]
    assert len(tokenizer) <= 400
    for text, ids in zip(texts, encoded, strict=True):
        assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
        assert tokenizer.unk_token_id not in ids
        decoded = tokenizer.decode(ids, skip_special_tokens=True)
        assert decoded.replace(" ", "") == text.lower().replace(" ", "")
    assert (tokenizer.pad_token_id, tokenizer.mask_token) == (0, "[MASK]")


RED_CIRCLE = scene_module.Object("circle", "red", "small", x=0.2, y=0.5, half=0.1)
BLUE_SQUARE = scene_module.Object("square", "blue", "large", x=0.8, y=0.5, half=0.17)
SCENE = scene_module.Scene((RED_CIRCLE, BLUE_SQUARE), "dark")
CIRCLE, SQUARE = Thing(color="red", shape="circle"), Thing(color="blue", shape="square")


@pytest.mark.parametrize(
    ("meaning", "is_true"),
    [
        (Meaning((CIRCLE, SQUARE), ((0, "left of", 1),)), True),
        (Meaning((CIRCLE, SQUARE), ((0, "right of", 1),)), False),
        (Meaning((CIRCLE,), total=2), True),
        (Meaning((CIRCLE,), total=3), False),
        (Meaning((CIRCLE,), background="light"), False),
        (Meaning((Thing(shape="circle", count=1),)), True),
        (Meaning((Thing(shape="circle", count=2),)), False),
        (Meaning((CIRCLE, CIRCLE)), False),
        (Meaning((Thing(color="red", shape="square"),)), False),
        (Meaning((Thing(shape="circle", place="on the left"),)), True),
        (Meaning((Thing(shape="circle", place="on the right"),)), False),
    ],
)
def test_holds_reads_a_as_exists_and_numbers_as_exact(meaning: Meaning, is_true: bool) -> None:
    assert holds(meaning, SCENE) is is_true
    assert holds(meaning, SCENE, strict=True) is is_true


def test_holds_finds_doubtful_relations_true_only_when_not_strict() -> None:
    near = scene_module.Object("square", "blue", "small", x=0.25, y=0.9, half=0.1)
    meaning = Meaning((CIRCLE, SQUARE), ((0, "left of", 1),))
    scene = scene_module.Scene((RED_CIRCLE, near), "dark")
    assert holds(meaning, scene)
    assert not holds(meaning, scene, strict=True)


def test_scenes_never_overlap() -> None:
    for index in random.Random(0).sample(range(100_000), 200):
        objects = scene_module.sample_scene(SEED, "train", index).objects
        for i, first in enumerate(objects):
            for second in objects[:i]:
                distance = max(abs(first.x - second.x), abs(first.y - second.y))
                assert distance > first.half + second.half
