"""Results of an evaluation do not depend on how its pairs are spread over processes and batches."""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processes import in_processes
from tiers import FULL, tier
from tiny import WORDS, randomize, tiny_config, tiny_processor

from mmbert.data.datamodule import PairsDataModule
from mmbert.data.options import DataOptions
from mmbert.evaluation.pairs import EncodedPair, PairEvaluation, PairResult
from mmbert.model.modeling import MMBertForPreTraining
from mmbert.runtime.distributed import world_size

SIZES = (1, 2, 3, 7, 64, 65, 101) if FULL else (1, 2, 3, 7, 65)
BATCHES = (1, 4, 32)
SPLITS = tier(30, 500)
RANKED = 9  # images and captions that the matching head ranks: every one with every one
Results = dict[str, float]


@pytest.fixture(scope="module")
def model() -> MMBertForPreTraining:
    """In float64, so that another order of additions shows in the 16th digit only."""
    torch.manual_seed(0)
    objectives = {"mlm": 1.0, "itm": 1.0, "itc": {"embedding_size": 8}}
    model = MMBertForPreTraining(tiny_config(objectives=objectives))
    randomize(model)
    return model.double().eval()


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> dict[int, PairsDataModule]:
    """Size -> data with so many validation pairs; some captions come twice, so that not every image is wrong."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    records = []
    for i in range(max(SIZES)):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        caption = " ".join(rng.choice(WORDS, rng.integers(1, 10))) if i % 5 else "a red cat"
        records.append(json.dumps({"image": f"{i}.png", "caption": caption}))
    modules = {}
    for size in SIZES:
        files = {"train": str(folder / f"train-{size}.jsonl"), "val": str(folder / f"val-{size}.jsonl")}
        Path(files["train"]).write_text(records[0])
        Path(files["val"]).write_text("\n".join(records[:size]))
        options = DataOptions(format="jsonl", annotations=files, images=str(folder), batch_size=1, num_workers=0)
        modules[size] = PairsDataModule(options, tiny_processor(), seed=0)
    return modules


def evaluated(model: MMBertForPreTraining, module: PairsDataModule, scorer: str) -> tuple[Results, int]:
    """Metrics of the validation pairs, of which this process evaluates its share; and how many those were."""
    assert module.val_samples is not None
    images = RANKED if scorer == "itm" else 200
    evaluation = PairEvaluation(model, module.val_samples.image_sample(images), scorer=scorer)
    for batch in module.val_dataloader():
        batch = module.on_after_batch_transfer(batch, 0)
        evaluation.step({k: v.double() if v.is_floating_point() else v for k, v in batch.items()})
    return evaluation.metrics(), len(evaluation.results)


def counted(name: str) -> bool:
    """A metric made of whole numbers: ranks, hits, comparisons."""
    return "loss" not in name


def grid(model: MMBertForPreTraining, modules: dict[int, PairsDataModule]) -> dict[tuple[int, int, str], Any]:
    """What `evaluated` gives for every size and batch size in this group of processes."""
    found = {}
    for size, module in modules.items():
        for batch in BATCHES:
            module.options.eval_batch_size = batch
            for scorer in ("itc", "itm") if FULL or size < 10 else ("itc",):
                found[size, batch, scorer] = evaluated(model, module, scorer)
    return found


def test_results_do_not_depend_on_processes_or_batches(
    model: MMBertForPreTraining, modules: dict[int, PairsDataModule], tmp_path: Path
) -> None:
    """Fewer pairs than processes included: one that has none repeats another's, which counts once."""
    found = {}
    for count in (1, 2, 3):
        folder = tmp_path / str(count)
        folder.mkdir()
        parts = in_processes(count, lambda rank: grid(model, modules), folder, seconds=240)
        for size, batch, scorer in parts[0]:
            shares = [part[size, batch, scorer][1] for part in parts]
            assert sum(shares) == max(size, count) and min(shares) > 0, "spread over all processes"
            for rank, part in enumerate(parts):
                found[size, scorer, count, batch, rank] = part[size, batch, scorer][0]
    for (size, scorer, *how), metrics in found.items():
        expected = found[size, scorer, 1, 32, 0]
        assert metrics.keys() == expected.keys(), (size, scorer, *how)
        for name, value in metrics.items():
            assert value == (expected[name] if counted(name) else pytest.approx(expected[name], rel=1e-12)), (
                name, size, scorer, *how,
            )  # fmt: skip
    whole = found[max(SIZES), "itc", 3, 4, 2]
    assert {"rsum", "itm_auroc", "mlm_loss_shuffled", "text_to_image/median_rank"} <= whole.keys()
    assert whole["retrieval_images"] == max(SIZES) and found[7, "itm", 3, 4, 2]["retrieval_images"] == 7


def test_items_are_what_the_results_are_means_of(
    model: MMBertForPreTraining, modules: dict[int, PairsDataModule]
) -> None:
    module = modules[7]
    module.options.eval_batch_size = 4
    assert module.val_samples is not None
    evaluation = PairEvaluation(model, module.val_samples.image_sample(200), scorer="itc")
    for batch in module.val_dataloader():
        batch = module.on_after_batch_transfer(batch, 0)
        evaluation.step({k: v.double() if v.is_floating_point() else v for k, v in batch.items()})
    metrics, items = evaluation.metrics(), evaluation.outcomes()
    assert set(items) == {"itm_accuracy", "mlm_accuracy", "mlm_accuracy_shuffled"}
    for name, found in items.items():
        assert sum(found.values) / len(found.values) == pytest.approx(metrics[name], abs=1e-12), name
    assert items["itm_accuracy"].images == list(range(7))
    masked = [r.masked for r in sorted(evaluation.results)]
    assert items["mlm_accuracy"].images == [i for i, count in enumerate(masked) for _ in range(count)]


def test_captions_of_one_image_are_one_image_to_the_tests(model: MMBertForPreTraining) -> None:
    """Or two captions each would halve what images vary by."""
    evaluation = PairEvaluation(model, frozenset())
    of_pair = [7, 7, 3, 3, 9]
    evaluation.results = [PairResult(i, 2, 1, 1, 1.0, 1.0, 0.5, -0.5, key) for i, key in enumerate(of_pair)]
    items = evaluation.outcomes()
    assert items["itm_accuracy"].images == [0, 0, 1, 1, 2]
    assert items["mlm_accuracy"].images == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]


def invented(count: int, rng: random.Random) -> tuple[list[PairResult], list[EncodedPair]]:
    """Results of `count` pairs, with ties, pairs without a wrong image, and captions that come twice."""
    results, encoded = [], []
    for index in range(count):
        masked, lone = rng.randrange(4), rng.random() < 0.1
        hits, wrong_hits = rng.randint(0, masked), rng.randint(0, masked)
        losses = [masked * rng.expovariate(1), masked * rng.expovariate(0.5)]
        right, wrong = rng.choice([rng.gauss(1, 1), 0.0, 1.0]), rng.choice([rng.gauss(-1, 1), 0.0, 1.0])
        results.append(
            PairResult(
                index, masked, hits, None if lone else wrong_hits, *losses, right, None if lone else wrong, index
            )
        )
        vectors = torch.tensor([[rng.randrange(3) for _ in range(4)] for _ in range(2)], dtype=torch.float64)
        key = rng.randrange(2 * count)
        encoded.append(
            EncodedPair(index, vectors[0], vectors[1], key, frozenset([key, rng.randrange(2 * count)]), index)
        )
    return results, encoded


def share(rows: list[Any], rng: random.Random, rank: int) -> list[Any]:
    """What one process has of them, in any order: each row is with at least one process, some with several."""
    own = []
    for row in rows:
        holders = {rng.randrange(world_size()) for _ in range(rng.choice([1, 1, 1, 3]))}
        own += [row] * (rank in holders)
    random.Random(rank).shuffle(own)
    return own


def by_definition(results: list[PairResult], encoded: list[EncodedPair]) -> Results:
    """The same with loops and exact sums."""
    out: Results = {}
    masked = sum(r.masked for r in results)
    both = [r for r in results if r.wrong_hits is not None]
    shuffled = sum(r.masked for r in both)
    if masked:
        out["mlm_loss"] = math.fsum(r.mlm_loss for r in results) / masked
        out["mlm_accuracy"] = sum(r.right_hits for r in results) / masked
    if shuffled:
        out["mlm_loss_shuffled"] = math.fsum(r.mlm_loss_wrong for r in both) / shuffled
        out["mlm_accuracy_shuffled"] = sum(r.wrong_hits or 0 for r in both) / shuffled
        out["mlm_image_gain"] = sum(r.right_hits for r in both) / shuffled - out["mlm_accuracy_shuffled"]
    if both:
        right, wrong = [r.right_score for r in both], [r.wrong_score for r in both if r.wrong_score is not None]
        losses = [math.log1p(math.exp(-x)) for x in right] + [math.log1p(math.exp(x)) for x in wrong]
        out["itm_loss"] = math.fsum(losses) / len(losses)
        out["itm_accuracy"] = (sum(x > 0 for x in right) + sum(x <= 0 for x in wrong)) / len(losses)
        out["itm_auroc"] = sum((x > y) + (x == y) / 2 for x in right for y in wrong) / len(both) ** 2
        out["itm_left_out"] = len(results) - len(both)
    if len(encoded) > 1:
        fits = [[t.text_key in i.image_text_keys or t.index == i.index for t in encoded] for i in encoded]
        scores = [[float(i.image @ t.text) for t in encoded] for i in encoded]
        transposed = [list(zip(*rows, strict=True)) for rows in (scores, fits)]
        for way, (table, right_ones) in (("image_to_text", (scores, fits)), ("text_to_image", transposed)):
            ranks = []
            for row, fit in zip(table, right_ones, strict=True):
                best = max(s for s, f in zip(row, fit, strict=True) if f)
                ranks.append(1 + sum(s >= best and not f for s, f in zip(row, fit, strict=True)))
            out |= {f"{way}/R@{k}": sum(rank <= k for rank in ranks) / len(ranks) for k in (1, 5, 10)}
            out[f"{way}/median_rank"] = float(np.median(ranks))
        out["rsum"] = 100 * sum(value for name, value in out.items() if "/R@" in name)
        out["images_without_text"] = 0
        out["retrieval_images"] = len(encoded)
        out["retrieval_chance_R@1"] = sum(map(sum, fits)) / len(encoded) ** 2
    return out


@pytest.mark.parametrize("count", [1, 2, 3])
def test_results_spread_in_any_way_give_the_sums_of_the_whole(
    count: int, model: MMBertForPreTraining, tmp_path: Path
) -> None:
    def work(rank: int) -> list[Results]:
        found = []
        for split in range(SPLITS):
            rng = random.Random(split)
            results, encoded = invented(rng.choice([1, 2, 3, 7, 64, 65, 101]), rng)
            evaluation = PairEvaluation(model, frozenset(), scorer="itc")
            evaluation.results, evaluation.encoded = share(results, rng, rank), share(encoded, rng, rank)
            found.append(evaluation.metrics())
        return found

    parts = in_processes(count, work, tmp_path)
    assert all(part == parts[0] for part in parts), "all processes say the same"
    for split, metrics in enumerate(parts[0]):
        rng = random.Random(split)
        expected = by_definition(*invented(rng.choice([1, 2, 3, 7, 64, 65, 101]), rng))
        assert metrics.keys() == expected.keys()
        for name, value in metrics.items():
            assert value == (expected[name] if counted(name) else pytest.approx(expected[name], rel=1e-12)), (
                name, split,
            )  # fmt: skip
