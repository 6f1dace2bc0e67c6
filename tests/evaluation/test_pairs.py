"""Metrics do not depend on batches and processes, equal their definition, and state what part of a split they cover."""

import itertools
import json
import logging
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
from mmbert.evaluation import pairs as module_of_pairs
from mmbert.evaluation.coverage import Coverage
from mmbert.evaluation.pairs import EncodedPair, PairEvaluation, PairOutcome
from mmbert.model.modeling import MMBertForPreTraining
from mmbert.runtime.distributed import world_size

SIZES = (1, 2, 3, 7, 64, 65, 101) if FULL else (1, 2, 3, 7, 65)
BATCHES = (1, 4, 32)
SPLITS = tier(30, 500)
RANKED = 9  # images and captions that the matching head ranks: every one with every one
Results = dict[str, float]


@pytest.fixture(scope="module")
def model() -> MMBertForPreTraining:
    """In float64, so that the order of additions changes the 16th digit only."""
    torch.manual_seed(0)
    objectives = {"mlm": 1.0, "itm": 1.0, "itc": {"embedding_size": 8}}
    model = MMBertForPreTraining(tiny_config(objectives=objectives))
    randomize(model)
    return model.double().eval()


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> dict[int, PairsDataModule]:
    """Size -> data with so many validation pairs; one caption occurs several times, so some images are not wrong."""
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
    """Metrics of the validation pairs, and the number of pairs that this process evaluated."""
    assert module.val_samples is not None
    images = RANKED if scorer == "itm" else 200
    evaluation = PairEvaluation(model, module.val_samples.image_sample(images), scorer=scorer)
    run(evaluation, module)
    return evaluation.metrics(), len(evaluation.pairs)


def run(evaluation: PairEvaluation, module: PairsDataModule, *, max_batches: int | None = None) -> None:
    for batch in itertools.islice(module.val_dataloader(), max_batches):
        batch = module.on_after_batch_transfer(batch, 0)
        evaluation.step({k: v.double() if v.is_floating_point() else v for k, v in batch.items()})


def is_exact(name: str) -> bool:
    """Whether a metric is made of whole numbers: ranks, hits, comparisons."""
    return "loss" not in name


def grid(model: MMBertForPreTraining, modules: dict[int, PairsDataModule]) -> dict[tuple[int, int, str], Any]:
    """Results of `evaluated` for every size and batch size in this process group."""
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
    """Includes fewer pairs than processes: a process without a pair repeats another's, which counts once."""
    found = {}
    for count in (1, 2, 3):
        folder = tmp_path / str(count)
        folder.mkdir()
        parts = in_processes(count, lambda rank: grid(model, modules), folder, seconds=240)
        for size, batch, scorer in parts[0]:
            sizes = [part[size, batch, scorer][1] for part in parts]
            assert sum(sizes) == max(size, count) and min(sizes) > 0, "distributed over all processes"
            for rank, part in enumerate(parts):
                found[size, scorer, count, batch, rank] = part[size, batch, scorer][0]
    for (size, scorer, *how), metrics in found.items():
        expected = found[size, scorer, 1, 32, 0]
        assert metrics.keys() == expected.keys(), (size, scorer, *how)
        for name, value in metrics.items():
            assert value == (expected[name] if is_exact(name) else pytest.approx(expected[name], rel=1e-12)), (
                name, size, scorer, *how,
            )  # fmt: skip
    largest = found[max(SIZES), "itc", 3, 4, 2]
    assert {"rsum", "itm_auroc", "mlm_loss_shuffled", "text_to_image/median_rank"} <= largest.keys()
    assert largest["retrieval_images"] == max(SIZES) and found[7, "itm", 3, 4, 2]["retrieval_images"] == 7


def test_outcomes_have_the_metrics_as_their_means(
    model: MMBertForPreTraining, modules: dict[int, PairsDataModule]
) -> None:
    module = modules[7]
    module.options.eval_batch_size = 4
    assert module.val_samples is not None
    evaluation = PairEvaluation(model, module.val_samples.image_sample(200), scorer="itc")
    run(evaluation, module)
    metrics, items = evaluation.metrics(), evaluation.outcomes()
    assert set(items) == {"itm_accuracy", "mlm_accuracy", "mlm_accuracy_shuffled"}
    for name, found in items.items():
        assert sum(found.values) / len(found.values) == pytest.approx(metrics[name], abs=1e-12), name
    assert items["itm_accuracy"].images == list(range(7))
    masked = [r.num_masked for r in sorted(evaluation.pairs)]
    assert items["mlm_accuracy"].images == [i for i, count in enumerate(masked) for _ in range(count)]


def test_captions_of_one_image_have_one_image_number(model: MMBertForPreTraining) -> None:
    """Statistics resample images: two numbers for one image would halve its variance."""
    evaluation = PairEvaluation(model, frozenset())
    image_keys = [7, 7, 3, 3, 9]
    evaluation.pairs = [PairOutcome(i, 2, 1, 1, 1.0, 1.0, 0.5, -0.5, key) for i, key in enumerate(image_keys)]
    items = evaluation.outcomes()
    assert items["itm_accuracy"].images == [0, 0, 1, 1, 2]
    assert items["mlm_accuracy"].images == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]


def test_evaluation_of_a_part_of_the_split_logs_a_warning(
    model: MMBertForPreTraining, modules: dict[int, PairsDataModule], caplog: pytest.LogCaptureFixture
) -> None:
    module = modules[7]
    module.options.eval_batch_size = 4
    assert module.val_samples is not None
    for max_batches, seen in ((1, 4), (None, 7)):
        caplog.clear()
        evaluation = PairEvaluation(model, frozenset(), num_samples=len(module.val_samples))
        run(evaluation, module, max_batches=max_batches)
        assert evaluation.coverage() == Coverage(seen, 7) and evaluation.coverage().fraction == seen / 7
        evaluation.log_warnings("val")
        expected = (
            "val: metrics are over 4 of 7 items (57.1 %), as trainer.limit_val_batches stops the evaluation early"
        )
        assert caplog.messages == ([expected] if seen == 4 else [])


def test_skipped_images_count_as_seen(model: MMBertForPreTraining) -> None:
    evaluation = PairEvaluation(model, frozenset(), num_samples=3)
    evaluation.step({"index": torch.zeros(0, dtype=torch.int64), "skipped": torch.tensor([0, 2])})
    assert evaluation.coverage() == Coverage(2, 3)


def test_expensive_ranking_logs_a_warning(
    model: MMBertForPreTraining,
    modules: dict[int, PairsDataModule],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    samples = modules[7].val_samples
    assert samples is not None
    evaluation = PairEvaluation(model, samples.image_sample(200), scorer="itm")
    run(evaluation, modules[7])
    evaluation.metrics()
    assert not caplog.messages
    monkeypatch.setattr(module_of_pairs, "EXPENSIVE_PASSES", 49)
    evaluation.metrics()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "ranking 7 images with as many captions by itm: 49 fusion passes" in record.getMessage()


def random_outcomes(count: int, rng: random.Random) -> tuple[list[PairOutcome], list[EncodedPair]]:
    """Outcomes of `count` pairs, with ties, pairs without a shuffled image, and captions of several images."""
    results, encoded = [], []
    for index in range(count):
        masked, lone = rng.randrange(4), rng.random() < 0.1
        hits, mlm_hits_shuffled = rng.randint(0, masked), rng.randint(0, masked)
        losses = [masked * rng.expovariate(1), masked * rng.expovariate(0.5)]
        right, wrong = rng.choice([rng.gauss(1, 1), 0.0, 1.0]), rng.choice([rng.gauss(-1, 1), 0.0, 1.0])
        results.append(
            PairOutcome(
                index, masked, hits, None if lone else mlm_hits_shuffled, *losses, right, None if lone else wrong, index
            )
        )
        vectors = torch.tensor([[rng.randrange(3) for _ in range(4)] for _ in range(2)], dtype=torch.float64)
        key = rng.randrange(2 * count)
        encoded.append(
            EncodedPair(index, vectors[0], vectors[1], key, frozenset([key, rng.randrange(2 * count)]), index)
        )
    return results, encoded


def assign(rows: list[Any], rng: random.Random, rank: int) -> list[Any]:
    """Rows of one process in random order; each row belongs to at least one process, some to several."""
    own = []
    for row in rows:
        holders = {rng.randrange(world_size()) for _ in range(rng.choice([1, 1, 1, 3]))}
        own += [row] * (rank in holders)
    random.Random(rank).shuffle(own)
    return own


def by_definition(results: list[PairOutcome], encoded: list[EncodedPair]) -> Results:
    """Metrics by their definition, with loops and exact sums."""
    out: Results = {}
    masked = sum(r.num_masked for r in results)
    both = [r for r in results if r.mlm_hits_shuffled is not None]
    shuffled = sum(r.num_masked for r in both)
    if masked:
        out["mlm_loss"] = math.fsum(r.mlm_loss for r in results) / masked
        out["mlm_accuracy"] = sum(r.mlm_hits for r in results) / masked
    if shuffled:
        out["mlm_loss_shuffled"] = math.fsum(r.mlm_loss_shuffled for r in both) / shuffled
        out["mlm_accuracy_shuffled"] = sum(r.mlm_hits_shuffled or 0 for r in both) / shuffled
        out["mlm_image_gain"] = sum(r.mlm_hits for r in both) / shuffled - out["mlm_accuracy_shuffled"]
    if both:
        right, wrong = (
            [r.itm_logit for r in both],
            [r.itm_logit_shuffled for r in both if r.itm_logit_shuffled is not None],
        )
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
def test_metrics_of_random_outcomes_equal_their_definition_over_any_processes(
    count: int, model: MMBertForPreTraining, tmp_path: Path
) -> None:
    def work(rank: int) -> list[Results]:
        found = []
        for split in range(SPLITS):
            rng = random.Random(split)
            results, encoded = random_outcomes(rng.choice([1, 2, 3, 7, 64, 65, 101]), rng)
            evaluation = PairEvaluation(model, frozenset(), scorer="itc")
            evaluation.pairs, evaluation.encoded = assign(results, rng, rank), assign(encoded, rng, rank)
            found.append(evaluation.metrics())
        return found

    parts = in_processes(count, work, tmp_path)
    assert all(part == parts[0] for part in parts), "all processes have the same metrics"
    for split, metrics in enumerate(parts[0]):
        rng = random.Random(split)
        expected = by_definition(*random_outcomes(rng.choice([1, 2, 3, 7, 64, 65, 101]), rng))
        assert metrics.keys() == expected.keys()
        for name, value in metrics.items():
            assert value == (expected[name] if is_exact(name) else pytest.approx(expected[name], rel=1e-12)), (
                name, split,
            )  # fmt: skip


def test_near_cosines_do_not_tie_under_autocast() -> None:
    """Vectors at angles of 0.02: in bf16 all cosines are 1, in fp32 each pair is nearest to itself."""
    angles = [0.02 * i for i in range(4)]
    vectors = [torch.tensor([math.cos(a), math.sin(a)]) for a in angles]
    pairs = [EncodedPair(i, v, v, i, frozenset({i}), i) for i, v in enumerate(vectors)]
    evaluation = PairEvaluation(MMBertForPreTraining(tiny_config(objectives={"itc": 1.0})), frozenset())
    with torch.autocast("cpu", torch.bfloat16):
        assert evaluation._retrieval(pairs)["text_to_image/R@1"] == 1
