"""Simulated comparisons of strategies with known accuracies."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

IMAGES, EACH = 200, 3  # items of one image stand together
CATEGORIES = ("swap_attribute", "replace_object", "count")


def made(
    chances: Mapping[str, float],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    fractions: Sequence[float] = (1.0,),
    exploratory: bool = False,
) -> tuple[list[dict[str, Any]], dict[str, dict[str, np.ndarray]]]:
    """Rows and items of strategies that are right with the given probabilities; hard items are hard for all."""
    common = np.random.default_rng(0)
    clusters = np.repeat(np.arange(IMAGES), EACH)
    hardness = common.random(IMAGES * EACH)
    category = common.integers(0, len(CATEGORIES), IMAGES * EACH)
    rows, items = [], {}
    for s, (strategy, chance) in enumerate(chances.items()):
        for seed in seeds:
            for fraction in fractions:
                own = np.random.default_rng([s, seed, int(1000 * fraction)])
                level = 0.5 + (chance - 0.5) * (0.4 + 0.6 * fraction)
                hits = (0.7 * hardness + 0.3 * own.random(IMAGES * EACH) < level).astype(float)
                arm = f"{strategy}-seed{seed}" + ("" if fraction == 1 else f"-{100 * fraction:g}%")
                blank = (own.random(IMAGES * EACH) < 0.5).astype(float)
                shuffled = (own.random(IMAGES * EACH) < 0.5).astype(float)
                items[arm] = {
                    "foils/overall": hits,
                    "foils/overall:image": clusters,
                    "foils/overall/blank": blank,
                    "foils/overall/shuffled": shuffled,
                }
                results = {
                    "foils/overall": hits.mean(),
                    "foils/overall/blank": blank.mean(),
                    "foils/overall/shuffled": shuffled.mean(),
                    "retrieval/image_to_text/R@1": chance / 4 + 0.01 * own.standard_normal(),
                    "retrieval/text_to_image/R@1": chance / 5 + 0.01 * own.standard_normal(),
                    "retrieval/chance_R@1": 0.005,
                    "pretrain/itm_accuracy": 0.3 + chance / 2 + 0.01 * own.standard_normal(),
                }
                for part, more in (("seen", 0.0), ("unseen", -0.1)):  # of other images than the rest
                    matched = np.random.default_rng([s, seed, int(1000 * fraction), len(part)])
                    items[arm][f"pretrain/{part}/itm_accuracy"] = (matched.random(300) < level + more).astype(float)
                    items[arm][f"pretrain/{part}/itm_accuracy:image"] = np.arange(300) // 2
                    results[f"pretrain/{part}/itm_accuracy"] = items[arm][f"pretrain/{part}/itm_accuracy"].mean()
                    results[f"pretrain/{part}/itm_auroc"] = chance + more + 0.01 * matched.standard_normal()
                    results[f"pretrain/{part}/itm_loss"] = 0.4 - more
                for number, name in enumerate(CATEGORIES):
                    items[arm][f"foils/{name}"] = hits[category == number]
                    items[arm][f"foils/{name}:image"] = clusters[category == number]
                    results[f"foils/{name}"] = hits[category == number].mean()
                flops, pairs = 1.1e13, 900 + 40 * s
                steps = [100 * i for i in range(1, 10)]
                rising = [0.5 + (chance - 0.5) * (1 - 0.7**i) + 0.008 * own.standard_normal() for i in range(1, 10)]
                rows.append(
                    {
                        "arm": arm,
                        "strategy": strategy,
                        "seed": seed,
                        "fraction": fraction,
                        "status": "done",
                        "exploratory": exploratory,
                        "budget": {"match": "flops", "steps": pairs, "flops_per_step": flops / pairs,
                                   "training_flops": flops, "parameters": 1_500_000 + 210_000 * s, "fusion_layers": 2,
                                   "missed_by": 0.004},
                        "results": {name: float(value) for name, value in results.items()},
                        "cost": {"wall_seconds": 300.0 + 20 * s + 9 * seed**2, "train_seconds": 250.0 + 15 * s + seed,
                                 "peak_memory_bytes": 1.9e9 + 1e8 * s, "samples_per_second": 150.0 - 5 * s,
                                 "ms_per_pair": 1.2 + 0.4 * s, "search_seconds": 12.3 + s, "search_images": 200,
                                 "search_texts": 200},
                        "curves": {"val/itm_accuracy": [list(point) for point in zip(steps, rising, strict=True)]},
                        "config": {"model.fusion": strategy,
                                   "retrieval": {"images": 200, "captions": 1, "scorer": "two_stage",
                                                                          "k": 16, "equal_texts": False}},
                        "versions": {"torch": "2.14.1", "mmbert": "0.3"},
                    }
                )  # fmt: skip
    return rows, items


def failed(strategy: str, seed: int) -> dict[str, Any]:
    """Row of a failed arm."""
    return {
        "arm": f"{strategy}-seed{seed}",
        "strategy": strategy,
        "seed": seed,
        "fraction": 1.0,
        "status": "failed",
        "exploratory": False,
        "budget": {"match": "flops", "steps": 900, "missed_by": 0.0},
        "failure": {
            "stage": "pretrain",
            "step": 120,
            "message": "the loss is nan",
            "last_losses": [2.5, 7.25, float("nan")],
        },
    }


def comparison(strategies: Sequence[str], seeds: Sequence[int] = (0, 1, 2), **more: Any) -> dict[str, Any]:
    """Content of comparison.json."""
    return {
        "name": "quick",
        "strategies": list(strategies),
        "seeds": list(seeds),
        "budget_rule": "equal training FLOPs: 1.1e13 each, matched by steps",
        "primary": ["foils/overall", "retrieval/text_to_image/R@1"],
        "dataset": "data/shapes: 20,000 drawn scenes, 1,000 test scenes",
        "command": "mmbert compare -c configs/compare/quick.yaml",
        **more,
    }
