"""Generate the data set "shapes": images of colored shapes with captions, questions and foils.

    mmbert data prepare shapes
    python data/shapes/prepare.py

It needs Pillow and `tokenizers`, neither the network nor mmbert. The files have the formats of COCO captions, COCO
instances, VQAv2 and SugarCrepe. This script distributes the scenes over processes and saves the files; `scenes.py`
samples and draws scenes, `meaning.py` holds the meaning of captions and checks it, `captions.py`, `foils.py` and
`questions.py` write texts, `wordpiece.py` makes the tokenizer.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from captions import Caption, write_captions
from foils import WordBalance, propose_foils
from meaning import holds
from questions import Question, write_questions
from scenes import COLORS, SHAPES, SPLITS, bounding_box, draw_scene, generator, sample_scene
from wordpiece import write_tokenizer

VERSION = "2"  # increase it when the same arguments make different files
IMAGE_ID_STEP = 1_000_000  # the ids of each split start at a multiple: 1000001 is train/000001.png
CHUNK = 250  # scenes that a process gets at a time
MAX_SHARE = 0.02  # fraction of the other scenes of which a caption may be true
SHARE_SAMPLE = 500  # scenes that the fraction is computed from
MIN_SHARE_SAMPLE = 30  # in a smaller set it is above the bar by chance
CATEGORIES = {f"{color} {shape}": shape for color in COLORS for shape in SHAPES}  # class of a box -> supercategory
LICENSE = {"id": 1, "name": "the license of the mmbert repository", "url": ""}

Json = dict[str, Any]


class Task(NamedTuple):
    """Consecutive scenes of one split, for one process."""

    out: Path
    split: str
    start: int
    stop: int
    seed: int
    size: int


def make_chunk(task: Task) -> list[Json]:
    """Draw the images of a task to disk and return one record for each scene."""
    return [make_scene(task, index) for index in range(task.start, task.stop)]


def make_scene(task: Task, index: int) -> Json:
    """Draw one image to disk and return its entries for all annotation files."""
    seed, split = task.seed, task.split
    scene = sample_scene(seed, split, index)
    file_name = f"{split}/{index + 1:06d}.png"
    image = draw_scene(scene, task.size, generator(seed, split, index, "drawing"))
    image.save(task.out / "images" / file_name, compress_level=1)

    captions = write_captions(scene, generator(seed, split, index, "captions"))
    foils = propose_foils(scene, captions, generator(seed, split, index, "foil")) if split == "test" else []
    image_id = (SPLITS.index(split) + 1) * IMAGE_ID_STEP + index + 1
    return {
        "image": {
            "id": image_id,
            "file_name": file_name,
            "width": task.size,
            "height": task.size,
            "background": scene.background,
            "objects": [asdict(obj) for obj in scene.objects],
        },
        "unseen": scene.held_out is not None,
        "captions": [caption.text for caption in captions],
        "questions": write_questions(scene, generator(seed, split, index, "questions")),
        "foils": [
            {
                "filename": file_name,
                "caption": foil.caption.text,
                "negative_caption": foil.negative.text,
                "category": foil.category,
            }
            for foil in foils
        ],
    }


def make_split(args: argparse.Namespace, split: str, pool: multiprocessing.pool.Pool | None) -> list[Json]:
    """Make all scenes of a split, in order."""
    count = getattr(args, split)
    (args.out / "images" / split).mkdir(parents=True, exist_ok=True)
    for path in (args.out / "images" / split).glob("[0-9]*.png"):
        if int(path.stem) > count:
            path.unlink()  # of an earlier set with more scenes
    tasks = [
        Task(args.out, split, start, min(start + CHUNK, count), args.seed, args.size)
        for start in range(0, count, CHUNK)
    ]
    return [record for chunk in (pool.imap if pool else map)(make_chunk, tasks) for record in chunk]


def choose_foils(records: list[Json]) -> list[Json]:
    """One foil of each scene that permits one."""
    balance = WordBalance()
    chosen = []
    for record in records:
        if foils := record["foils"]:
            pairs = [(foil["caption"], foil["negative_caption"]) for foil in foils]
            chosen.append(foils[balance.choose(foils[0]["category"], record["unseen"], pairs)])
    return chosen


def caption_file(info: Json, records: list[Json]) -> Json:
    """Content of a file in the format of COCO captions."""
    annotations = [
        {"id": 10 * record["image"]["id"] + k, "image_id": record["image"]["id"], "caption": text}
        for record in records
        for k, text in enumerate(record["captions"])
    ]
    images = [{**record["image"], "license": LICENSE["id"]} for record in records]
    return {"info": info, "licenses": [LICENSE], "images": images, "annotations": annotations}


def box_file(info: Json, images: list[Json]) -> Json:
    """Content of a file in the format of COCO instances, without segmentations; a class is a color and a shape.

    Args:
        info: As in the other files.
        images: The images of a captions file.
    """
    numbers = {name: number for number, name in enumerate(CATEGORIES, 1)}
    annotations = []
    for image in images:
        for k, obj in enumerate(image["objects"]):
            box = bounding_box(obj["shape"], obj["x"], obj["y"], obj["half"])
            left, top, width, height = (round(fraction * image["width"], 2) for fraction in box)
            annotations.append(
                {
                    "id": 10 * image["id"] + k,
                    "image_id": image["id"],
                    "category_id": numbers[f"{obj['color']} {obj['shape']}"],
                    "bbox": [left, top, width, height],
                    "area": round(width * height, 2),
                    "iscrowd": 0,
                }
            )
    kept = ("id", "file_name", "width", "height", "license")
    return {
        "info": info,
        "licenses": [LICENSE],
        "images": [{key: image[key] for key in kept} for image in images],
        "annotations": annotations,
        "categories": [{"id": numbers[n], "name": n, "supercategory": CATEGORIES[n]} for n in numbers],
    }


def add_box_files(folder: Path, info: Json) -> None:
    """Write the files of boxes that a set of an earlier version lacks; its captions files have the objects."""
    for split in SPLITS:
        file = folder / f"instances_{split}.json"
        if not file.exists():
            captions = json.loads((folder / f"captions_{split}.json").read_text(encoding="utf-8"))
            write_json(file, box_file(info, captions["images"]))
            print(f"{file} is added to this set.")


def vqa_files(info: Json, split: str, records: list[Json]) -> tuple[Json, Json]:
    """Contents of the files of VQAv2 questions and answers; all ten answers are the same."""
    questions, answers = [], []
    for record in records:
        image_id = record["image"]["id"]
        question: Question
        for k, question in enumerate(record["questions"]):
            ids = {"image_id": image_id, "question_id": 1000 * image_id + k}
            questions.append({**ids, "question": question.text})
            answer = {"answer": question.answer, "answer_confidence": "yes"}
            answers.append(
                {
                    **ids,
                    "question_type": question.question_type,
                    "answer_type": question.answer_type,
                    "multiple_choice_answer": question.answer,
                    "answers": [{**answer, "answer_id": number} for number in range(1, 11)],
                }
            )
    license_ = {"name": LICENSE["name"], "url": LICENSE["url"]}
    head = {"info": info, "license": license_, "data_type": "shapes", "data_subtype": split}
    return {**head, "task_type": "Open-Ended", "questions": questions}, {**head, "annotations": answers}


def satisfied_share(seed: int, split: str, count: int) -> float:
    """Mean fraction of the other scenes of the split of which a caption is true; doubtful cases count as true."""
    indices = range(min(count, SHARE_SAMPLE))
    scenes = [sample_scene(seed, split, index) for index in indices]
    captions: list[Caption] = []
    for index in indices:
        written = write_captions(scenes[index], generator(seed, split, index, "captions"))
        captions.append(written[index % len(written)])
    satisfied = sum(holds(captions[i].meaning, scenes[j]) for i in indices for j in indices if i != j)
    return satisfied / max(1, len(indices) * (len(indices) - 1))


def write_json(path: Path, content: Json) -> None:
    """Atomically write a JSON file."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content) + "\n", encoding="utf-8")
    partial.replace(path)


def write_annotations(args: argparse.Namespace, info: Json, records: dict[str, list[Json]], foils: list[Json]) -> None:
    """Write all annotation files; `captions_train.json` comes last and marks the set as complete."""
    folder = args.out / "annotations"
    for split in reversed(SPLITS):
        questions, answers = vqa_files(info, split, records[split])
        write_json(folder / f"questions_{split}.json", questions)
        write_json(folder / f"answers_{split}.json", answers)
    write_json(folder / "foils_test.json", dict(enumerate(foils)))
    for name, unseen in (("seen", False), ("unseen", True)):
        chosen = [record for record in records["test"] if record["unseen"] == unseen]
        write_json(folder / f"captions_test_{name}.json", caption_file(info, chosen))
    captions = {split: caption_file(info, records[split]) for split in reversed(SPLITS)}
    for split, content in captions.items():
        write_json(folder / f"instances_{split}.json", box_file(info, content["images"]))
    for split, content in captions.items():
        write_json(folder / f"captions_{split}.json", content)


def is_complete(args: argparse.Namespace, info: Json) -> bool:
    """Whether the folder holds the complete set of these arguments."""
    marker = args.out / "annotations" / "captions_train.json"
    return marker.exists() and json.loads(marker.read_text(encoding="utf-8"))["info"] == info


def texts_of(records: list[Json]) -> Iterator[str]:
    """All captions, questions and answers."""
    for record in records:
        yield from record["captions"]
        for question in record["questions"]:
            yield question.text
            yield question.answer


def parse_arguments() -> argparse.Namespace:
    """Parse and validate the command line."""
    parser = argparse.ArgumentParser(
        description="Generate images of colored shapes with captions, questions and foils."
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, help="folder to write to")
    parser.add_argument("--train", type=int, default=20000, help="number of training scenes")
    parser.add_argument("--val", type=int, default=1000, help="number of validation scenes")
    parser.add_argument(
        "--test", type=int, default=2000, help="number of test scenes, half of them with held-out pairs"
    )
    parser.add_argument("--size", type=int, default=64, help="side of the images in pixels")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes other scenes")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="number of processes")
    parser.add_argument("--force", action="store_true", help="generate the set again even if it is complete")
    args = parser.parse_args()
    for name, low, high in (
        *((split, 2, IMAGE_ID_STEP - 1) for split in SPLITS),
        ("size", 32, 1024),
        ("seed", 0, 2**31 - 1),
        ("jobs", 1, 1024),
    ):
        value = getattr(args, name)
        if not low <= value <= high:
            parser.error(f"--{name} is {value}; it must be a number from {low} to {high}.")
    return args


def main() -> int:
    """Generate the set and return the exit code."""
    args = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes of the pool end, too
    started = time.perf_counter()
    arguments = {name: getattr(args, name) for name in (*SPLITS, "size", "seed")}
    info = {"description": "mmbert shapes", "version": VERSION, "arguments": arguments}
    if not args.force and is_complete(args, info):
        add_box_files(args.out / "annotations", info)
        print(f"{args.out} already holds this set; --force generates it again.")
        return 0

    (args.out / "annotations").mkdir(parents=True, exist_ok=True)
    (args.out / "annotations" / "captions_train.json").unlink(missing_ok=True)
    # Starting a process takes longer than making a few scenes.
    jobs = min(args.jobs, -(-args.train // CHUNK))
    # Each process ends at a signal at once: the handler above would raise in the middle of waiting for a task, after
    # which the process was sometimes never joined and the command hung with its set complete.
    pool = multiprocessing.Pool(jobs, signal.signal, (signal.SIGTERM, signal.SIG_DFL)) if jobs > 1 else None
    try:
        records = {split: make_split(args, split, pool) for split in SPLITS}
        counts = [(args.seed, split, getattr(args, split)) for split in SPLITS]
        shares = pool.starmap(satisfied_share, counts) if pool else [satisfied_share(*count) for count in counts]
    finally:
        if pool:
            pool.terminate()
    by_split = ", ".join(f"{split} {share:.2%}" for split, share in zip(SPLITS, shares, strict=True))
    print(f"captions satisfied by other scenes: {max(shares):.2%} (bar {MAX_SHARE:.0%}; {by_split})")
    if max(shares) > MAX_SHARE and min(getattr(args, split) for split in SPLITS) >= MIN_SHARE_SAMPLE:
        print(f"error: the share must be at most {MAX_SHARE:.0%}; make captions more specific.", file=sys.stderr)
        return 1

    vocabulary = write_tokenizer(args.out / "tokenizer", texts_of(records["train"]))
    foils = choose_foils(records["test"])
    write_annotations(args, info, records, foils)
    num_questions = sum(len(record["questions"]) for split in SPLITS for record in records[split])
    scenes = " + ".join(f"{len(records[split])} {split}" for split in SPLITS)
    print(
        f"{scenes} scenes, 5 captions each, {num_questions} questions, {len(foils)} foils, "
        f"{vocabulary} tokens in {time.perf_counter() - started:.1f} s -> {args.out}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
