"""Fusion passes are counted as they are computed, and their cost is logged before."""

import logging
from pathlib import Path

import pytest
import torch
from ranking import CAPTIONS, encoded_with, tiny_model
from tiny import tiny_examples

from mmbert.evaluation import cost
from mmbert.evaluation.cost import estimate_fusion_seconds, format_duration, fusion_passes
from mmbert.evaluation.retrieval import SCORERS, Candidates, rank_candidates


@pytest.fixture
def candidates(tmp_path: Path) -> Candidates:
    return Candidates.from_examples(tiny_examples(tmp_path, CAPTIONS))


@pytest.mark.parametrize("k", [1, 2, 7])
def test_fusion_passes_bounds_what_each_scorer_computes(k: int, candidates: Candidates) -> None:
    model = tiny_model()
    encoded = encoded_with(model, candidates)
    for scorer in SCORERS:
        computed = rank_candidates(model, encoded, candidates, scorer, k=k).metrics["fusion_passes"]
        bound = fusion_passes(scorer, 7, 11, k=k)
        assert computed <= bound if scorer == "two_stage" else computed == bound
    assert fusion_passes("itm", 1000, 1000) == 1_000_000


def test_cost_is_logged_before_the_passes(
    candidates: Candidates, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, logger="mmbert")
    model = tiny_model()
    encoded = encoded_with(model, candidates)
    rank_candidates(model, encoded, candidates, "itc")
    assert not caplog.messages
    rank_candidates(model, encoded, candidates, "itm")
    assert caplog.messages == ["itm: 77 fusion passes"], "too few to be timed"

    caplog.clear()
    monkeypatch.setattr(cost, "MIN_ESTIMATED_PASSES", 1)
    monkeypatch.setattr(cost, "estimate_fusion_seconds", lambda *arguments: 200.0 if arguments[-1] == 77 else 0.0)
    rank_candidates(model, encoded, candidates, "two_stage", k=7)
    assert caplog.messages == ["two_stage, k=7: 77 fusion passes, about 3 min 20 s"]


def test_estimate_times_a_batch_of_median_length_and_scales_with_the_number_of_pairs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, calls = [0.0], []

    def timed(model: object, images: object, texts: object, pairs: torch.Tensor) -> None:
        calls.append(pairs[:, 1].tolist())
        clock[0] += len(pairs) * 0.5  # seconds

    monkeypatch.setattr(cost, "PAIRS_PER_BATCH", 3)
    monkeypatch.setattr(cost, "pair_scores", timed)
    monkeypatch.setattr(cost.time, "perf_counter", lambda: clock[0])
    texts = [torch.empty(length, 4) for length in (9, 1, 5, 4, 2, 6, 8)]
    pairs = torch.tensor([[0, text] for text in range(7)])
    seconds = estimate_fusion_seconds(tiny_model(), torch.empty(1, 2, 4), texts, pairs, 1000)
    assert calls == [[3, 2], [3, 2, 5]], "lengths 4, 5 and 6, after a warm-up that is not timed"
    assert seconds == 500.0


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.02, "1 s"), (45.4, "45 s"), (200, "3 min 20 s"), (7500, "2 h 5 min"), (59.7, "60 s")]
)
def test_durations_are_formatted_in_two_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
