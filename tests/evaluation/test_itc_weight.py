"""Choice of two_stage's weight of the contrastive logit on validation."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmbert.evaluation import itc_weight
from mmbert.evaluation.itc_weight import KEEPS_SHORTLIST, choose_itc_weight, fitted_losses
from mmbert.evaluation.retrieval import Candidates

N = 200


def test_losses_are_those_of_the_best_temperature_by_hand() -> None:
    """Margins 2 and -1: the factor f that minimizes softplus(-2f) + softplus(f) has y^3 = y + 2 with y = e^f."""
    scores = torch.tensor([[2.0, 0.0], [0.0, -1.0]], dtype=torch.float64)
    every = torch.ones(2, 2, dtype=torch.bool)
    losses = fitted_losses(scores, every, torch.eye(2, dtype=torch.bool), torch.arange(2))
    y = 1.5213797
    expected = [2 * math.log(1 + y**-2), 2 * math.log(1 + y)]  # as an image and as a text
    assert losses.tolist() == pytest.approx(expected, abs=1e-5)
    # The second image has no correct text on the shortlist, and the second text no correct image.
    listed = torch.tensor([[True, True], [True, False]])
    losses = fitted_losses(scores, listed, torch.eye(2, dtype=torch.bool), torch.arange(2))
    assert losses[1] == 0 and losses[0] < 1e-5


def choose(monkeypatch: pytest.MonkeyPatch, contrast: Tensor, fused: Tensor, texts: list[str] | None = None) -> Any:
    """Choose for given scores of N images with N texts."""
    monkeypatch.setattr(itc_weight, "contrastive", lambda *_: SimpleNamespace(scores=contrast))
    monkeypatch.setattr(itc_weight, "fuse_selected", lambda model, encoded, listed, name: fused[listed])
    model: Any = SimpleNamespace(objectives={"itc": SimpleNamespace(scale=torch.tensor([1.0]))})
    encoded: Any = SimpleNamespace(text_index=torch.arange(N))
    candidates = Candidates([], texts or [f"text {i}" for i in range(N)], range(N))
    return choose_itc_weight(model, encoded, candidates, k=8, equal_texts=texts is not None)


def noise(seed: int) -> Tensor:
    return torch.randn(N, N, generator=torch.Generator().manual_seed(seed))


def test_a_fusion_without_information_leaves_the_shortlist_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    contrast = noise(0) + 3 * torch.eye(N)
    found = choose(monkeypatch, contrast, noise(1))
    assert found.itc_weight == KEEPS_SHORTLIST and "keeps the order of the shortlist" in found.describe("val")


def test_a_better_fusion_gets_more_of_the_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two scores with equal noise are best added with equal weights; one without noise needs no other."""
    contrast = noise(0) + 3 * torch.eye(N)
    equal = choose(monkeypatch, contrast, noise(1) + 3 * torch.eye(N))
    assert 0.5 <= equal.itc_weight <= 2 and equal.lower_bound > 0.1 and equal.num_images == N
    exact = choose(monkeypatch, contrast, 10 * torch.eye(N))
    assert exact.itc_weight == 0 and exact.gain > equal.gain


def test_equal_texts_of_other_images_are_correct(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every two neighbors share a text, which the fusion knows; counted as wrong it would be a mistake."""
    texts = [f"text {i // 2}" for i in range(N)]
    same = torch.eye(N // 2).repeat_interleave(2, 0).repeat_interleave(2, 1)
    found = choose(monkeypatch, noise(0) + 3 * same, 10 * same, texts)
    assert found.itc_weight == 0
