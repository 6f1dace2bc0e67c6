"""Prints the numbers of README.md about the set that `prepare.py` made beside this file.

python data/shapes/measure.py
"""

from __future__ import annotations

import json
import statistics
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from captions import write_captions
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


def main() -> None:
    """Prints all numbers."""
    print_caption_lengths()
    print_question_prior()
    print_recall_ceiling(load("captions_val")["info"]["arguments"]["seed"])
    print("foils:", dict(Counter(foil["category"] for foil in load("foils_test").values())))


if __name__ == "__main__":
    main()
