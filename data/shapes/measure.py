"""Prints the numbers of README.md about the set that `prepare.py` made beside this file.

python data/shapes/measure.py
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from captions import write_captions
from foils import WordBalance, propose_foils, word_changes
from meaning import holds
from scenes import SPLITS, generator, sample_scene
from tokenizers import Tokenizer

FOLDER = Path(__file__).resolve().parent


def load(name: str) -> Any:
    """An annotation file."""
    return json.loads((FOLDER / "annotations" / f"{name}.json").read_text(encoding="utf-8"))


def print_caption_lengths() -> None:
    """Prints how many tokens captions have."""
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer" / "tokenizer.json"))
    for split in SPLITS:
        texts = [annotation["caption"] for annotation in load(f"captions_{split}")["annotations"]]
        lengths = [len(encoding.ids) for encoding in tokenizer.encode_batch(texts)]
        middle = statistics.median(lengths)
        print(f"{split}: {len(texts)} captions, median {middle:.0f} tokens, largest {max(lengths)}")


def print_question_prior() -> None:
    """Prints how often the commonest training answer of the question type is right in test."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    yes_or_no: Counter[str] = Counter()
    for annotation in load("answers_train")["annotations"]:
        counts[annotation["question_type"]][annotation["multiple_choice_answer"]] += 1
        yes_or_no[annotation["multiple_choice_answer"]] += annotation["answer_type"] == "yes/no"
    right = defaultdict(list)
    for annotation in load("answers_test")["annotations"]:
        guess = counts[annotation["question_type"]].most_common(1)[0][0]
        for group in ("all", annotation["answer_type"]):
            right[group].append(guess == annotation["multiple_choice_answer"])
    print(f"yes among yes/no answers of train: {yes_or_no['yes'] / yes_or_no.total():.1%}")
    print("question-only prior: " + ", ".join(f"{group} {statistics.mean(right[group]):.1%}" for group in right))


def print_recall_ceiling(seed: int) -> None:
    """Prints the text-to-image recall@1 of a model that finds all fitting images and guesses among them."""
    for name in ("test_seen", "test_unseen"):
        indices = [int(Path(image["file_name"]).stem) - 1 for image in load(f"captions_{name}")["images"]]
        scenes = [sample_scene(seed, "test", index) for index in indices]
        fitting = []
        for k in range(0, len(indices), 5):
            written = write_captions(scenes[k], generator(seed, "test", indices[k], "captions"))
            fitting.append(sum(holds(written[k // 5 % 5].meaning, scene) for scene in scenes))
        print(f"{name}: recall@1 ceiling {statistics.mean(1 / number for number in fitting):.1%}")


def sample_foils(seed: int, count: int) -> dict[tuple[str, bool], list[dict[str, int]]]:
    """(category, whether the scene has a held-out pair) -> the changed words of the foils of other test scenes."""
    balance, found = WordBalance(), defaultdict(list)
    for index in range(count):
        scene = sample_scene(seed, "test", index)
        captions = write_captions(scene, generator(seed, "test", index, "captions"))
        if foils := propose_foils(scene, captions, generator(seed, "test", index, "foil")):
            key = foils[0].category, scene.held_out is not None
            pairs = [(foil.caption.text, foil.negative.text) for foil in foils]
            found[key].append(word_changes(*pairs[balance.choose(*key, pairs)]))
    return found


def print_text_only_accuracy(seed: int, count: int = 10_000) -> None:
    """Prints how often words alone tell a caption from its foil.

    Each word, and each pair of adjacent words, has a weight: the logarithm of how much more frequent it is in the
    captions than in the foils of `count` other scenes.
    """
    unseen = {image["file_name"] for image in load("captions_test_unseen")["images"]}
    groups = defaultdict(list)
    for foil in load("foils_test").values():
        changes = word_changes(foil["caption"], foil["negative_caption"])
        groups[foil["category"], foil["filename"] in unseen].append(changes)
    others = sample_foils(seed + 1, count)
    for key in sorted(groups):
        in_captions, in_foils = Counter[str](), Counter[str]()
        for change in others[key]:
            in_captions.update({term: n for term, n in change.items() if n > 0})
            in_foils.update({term: -n for term, n in change.items() if n < 0})
        scores = [
            sum(n * math.log((in_captions[term] + 1) / (in_foils[term] + 1)) for term, n in change.items())
            for change in groups[key]
        ]
        accuracy = statistics.mean(0.5 if score == 0 else float(score > 0) for score in scores)
        half = "test_unseen" if key[1] else "test_seen"
        print(f"{key[0]}, {half}: {len(scores)} foils, by words alone {accuracy:.1%}")


def main() -> None:
    """Prints all numbers."""
    print_caption_lengths()
    print_question_prior()
    seed = load("captions_val")["info"]["arguments"]["seed"]
    print_recall_ceiling(seed)
    print_text_only_accuracy(seed)
    print("foils:", dict(Counter(foil["category"] for foil in load("foils_test").values())))


if __name__ == "__main__":
    main()
