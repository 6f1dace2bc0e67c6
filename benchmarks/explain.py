"""Measure explanations on data/shapes: perturbation curves, the pointing game, and shares of text and image.

    python benchmarks/explain.py runs/quickstart/model --out docs/explain

Models that were pretrained are measured on captions (matching), models fine-tuned for VQA on questions (their answer).
Several models are also drawn side by side on one caption. Prints Markdown; --out also gets the numbers and the figures.
"""

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import mmbert
from mmbert.inference.explanation.drawing import draw
from mmbert.inference.explanation.explain import METHODS
from mmbert.inference.explanation.quality import (
    ORDERS,
    Box,
    Case,
    bootstrap_mean,
    perturbation_curves,
    pointing_game,
)

WORDS = {
    "size": ("small", "large"),
    "color": ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink"),
    "shape": ("circle", "square", "triangle", "diamond", "cross"),
}
"""Names of an object in data/shapes."""
SHARES, SHARE_SAMPLES = 50, 16
"""Pairs whose shares of text and image are computed, and permutations for each."""


def main() -> None:
    """Measure all models and print a table of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="Folders RUN/model.")
    parser.add_argument("--data", type=Path, default=Path("data/shapes"), help="Folder of data/shapes.")
    parser.add_argument("--pairs", type=int, default=200, help="Pairs for each number (default 200).")
    parser.add_argument("--methods", nargs="+", default=["default"], choices=["default", *METHODS],
                        help="Default: attention where it connects the modalities, else gradient.")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="Seed of the choice of pairs and of random orders.")
    parser.add_argument("--image", default="000002.png", help="Image of the test split that is drawn.")
    parser.add_argument("--text", default="a small orange square and two blue circles", help="Its caption or question.")
    parser.add_argument("--out", type=Path, help="Folder for explain.json, curves.png and examples.png.")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for folder in options.models:
        model = mmbert.load(folder, device="cpu")
        task = model.model.config.task
        cases = list(read_questions(options.data) if task else read_captions(options.data))
        random.Random(options.seed).shuffle(cases)
        chosen = []
        for case, expected in cases:
            if len(chosen) < options.pairs and is_correct(model, case, expected):
                chosen.append(case)
        results[folder] = measure(model, chosen, options.methods, options.seed)
        print(table(folder, results[folder]), flush=True)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "explain.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        draw_curves(results).savefig(options.out / "curves.png", dpi=110)
        image, text = options.data / "images" / "test" / options.image, options.text
        explained = [mmbert.load(folder, device="cpu").explain(image, text, links=False) for folder in options.models]
        draw(explained).savefig(options.out / "examples.png", dpi=110)


def measure(model: Any, cases: list[Case], methods: list[str], seed: int) -> dict[str, Any]:
    """Compute all numbers of one model."""
    found: dict[str, Any] = {"fusion": model.model.config.fusion, "pairs": len(cases), "methods": {}}
    for method in methods:
        chosen: Any = None if method == "default" else method
        explained = [model.explain(c.image, c.text, method=chosen, links=False) for c in cases]
        name, relevance = explained[0].method, [e.patch_relevance for e in explained]
        if name in found["methods"]:
            continue
        curves, game = perturbation_curves(model, cases, relevance, seed=seed), pointing_game(cases, relevance)
        found["methods"][name] = {
            "areas": curves.areas(),
            "differences": curves.differences(),
            "curves": {order: values.mean(axis=0).tolist() for order, values in curves.curves.items()},
            "pointing": game.accuracy(),
            "chance": game.chance,
        }
    shares = [model.modality_shares(c.image, c.text, samples=SHARE_SAMPLES, seed=seed).text for c in cases[:SHARES]]
    found["text_share"] = bootstrap_mean(shares)
    return found


def is_correct(model: Any, case: Case, expected: str) -> bool:
    """Whether the model matches a true caption, or answers a question correctly."""
    if model.model.config.task:
        return model.answer(case.image, case.text)[0].answer == expected
    return model.match(case.image, case.text).scores[0] > 0.5


def read_captions(data: Path) -> Iterator[tuple[Case, str]]:
    """Read captions of the test split that are about one object."""
    content = json.loads((data / "annotations" / "captions_test.json").read_text())
    images = {image["id"]: image for image in content["images"]}
    for annotation in content["annotations"]:
        image, text = images[annotation["image_id"]], annotation["caption"]
        box = box_of(text, image["objects"])
        if box is not None:
            yield Case(data / "images" / image["file_name"], text, box=box), ""


def read_questions(data: Path) -> Iterator[tuple[Case, str]]:
    """Read questions of the test split that are about one object, with their answers."""
    folder = data / "annotations"
    images = {image["id"]: image for image in json.loads((folder / "captions_test.json").read_text())["images"]}
    answers = {
        row["question_id"]: row["multiple_choice_answer"]
        for row in json.loads((folder / "answers_test.json").read_text())["annotations"]
    }
    for question in json.loads((folder / "questions_test.json").read_text())["questions"]:
        image, text = images[question["image_id"]], question["question"]
        box = None if text.startswith("How many") else box_of(text, image["objects"])
        if box is not None:
            yield Case(data / "images" / image["file_name"], text, box=box), answers[question["question_id"]]


def box_of(text: str, objects: list[dict[str, Any]]) -> Box | None:
    """Find the object that a text is about; None unless its words describe exactly one object."""
    words = re.findall(r"[a-z]+", text.lower())
    named = {kind: [word for word in words if word in names] for kind, names in WORDS.items()}
    is_plural = any(word in (f"{shape}s", f"{shape}es") for word in words for shape in WORDS["shape"])
    if is_plural or any(len(found) > 1 for found in named.values()) or not (named["color"] or named["shape"]):
        return None
    found = [o for o in objects if all(o[kind] == word for kind, values in named.items() for word in values)]
    if len(found) != 1:
        return None
    x, y, half = (found[0][key] for key in ("x", "y", "half"))
    return Box(x - half, y - half, x + half, y + half)


def table(name: str, found: dict[str, Any]) -> str:
    """Format the numbers of one model as Markdown."""
    lines = [
        f"{name} ({found['fusion']}), {found['pairs']} pairs; share of the text {found['text_share']}",
        "",
        "| method | area, most relevant first | random minus it | least relevant first minus it | pointing game |",
        "|---|---|---|---|---|",
    ]
    for method, row in found["methods"].items():
        cells = [row["areas"][ORDERS[0]], *row["differences"].values(), row["pointing"]]
        lines.append(f"| {method} | {' | '.join(map(str, cells))} |")
    chance = next(iter(found["methods"].values()))["chance"]
    return "\n".join([*lines, "", f"Pointing game by a random patch: {chance:.3f}.", ""])


def draw_curves(results: dict[str, Any]) -> Any:
    """Draw the perturbation curves of each model's first method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(results), 2.8), layout="constrained")
    for (name, found), axes in zip(results.items(), figure.subplots(1, len(results), squeeze=False)[0], strict=True):
        method, row = next(iter(found["methods"].items()))
        for (order, values), style in zip(row["curves"].items(), ("-", ":", "--"), strict=True):
            axes.plot(np.linspace(0, 1, len(values)), values, style, label=order.replace("_", " "), color="#1b2129")
        axes.set_title(f"{Path(name).parent.name}\n{found['fusion']}, {method}", fontsize=8.5, parse_math=False)
        axes.set_xlabel("fraction of patches removed", fontsize=8)
        axes.set_ylim(0, 1)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("mean probability", fontsize=8)
    figure.axes[0].legend(fontsize=7, frameon=False)
    return figure


if __name__ == "__main__":
    main()
