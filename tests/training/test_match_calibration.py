"""Calibration of ITM: the regression, its pairs, the logits."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_config, tiny_examples, tiny_processor

from mmbert.data.masking import Masking
from mmbert.data.pairs import Pairs
from mmbert.errors import UsageError
from mmbert.model.modeling import MMBertForPreTraining
from mmbert.training.match_calibration import (
    WRONG_IMAGES,
    calibrate_matching,
    choose_pairs,
    fit_calibration,
    fit_logistic,
)


def test_logistic_regression_finds_the_log_odds() -> None:
    # 3 of 4 matched rows have the feature 1, 3 of 4 mismatched ones -1: the odds at 1 are 3.
    features = torch.tensor([1.0, 1, 1, -1, -1, -1, -1, 1], dtype=torch.float64)[:, None]
    is_match = torch.arange(8) < 4
    factor, bias = fit_logistic(features, is_match, ridge=1e-12).tolist()
    assert factor == pytest.approx(math.log(3)) and bias == pytest.approx(0, abs=1e-9)
    # Mismatched rows that are repeated weigh as much as before.
    again = torch.cat([features, features[4:].repeat(4, 1)]), torch.cat([is_match, torch.zeros(16, dtype=torch.bool)])
    assert fit_logistic(*again, ridge=1e-12).tolist() == pytest.approx([factor, bias], abs=1e-9)


def test_separable_rows_have_a_finite_solution() -> None:
    features = torch.tensor([[1e3], [2e3], [-1e3], [-5e3]], dtype=torch.float64)
    found = fit_logistic(features, torch.tensor([True, True, False, False]))
    assert found.isfinite().all() and found[0] > 0


@pytest.mark.parametrize("signs", [(-1,), (1,), (-1, 1), (1, -1), (-1, -1), (1, 1)])
def test_no_factor_turns_the_ranking_around(signs: tuple[int, ...]) -> None:
    is_match = torch.arange(40) < 10
    noise = torch.randn(40, len(signs), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    features = noise + is_match[:, None] * torch.tensor(signs)
    *factors, bias = fit_calibration(features, is_match)
    kept = [k for k, sign in enumerate(signs) if sign > 0]
    assert [k for k, factor in enumerate(factors) if factor] == kept and min(factors) >= 0
    # The others are those of a fit without the column; without any, right and wrong pairs are as likely.
    assert [factors[k] for k in kept] + [bias] == fit_logistic(features[:, kept], is_match).tolist()
    assert kept or bias == pytest.approx(0, abs=1e-9)


def test_validation_without_a_readable_image_is_told(tmp_path: Path) -> None:
    examples = tiny_examples(tmp_path, [("a red cat",), ("a blue bird",)])
    for file in tmp_path.rglob("*.png"):
        file.write_bytes(b"no image")
    masking, processor = Masking(4, np.arange(5, 8), frozenset(range(5))), tiny_processor()
    data: Any = SimpleNamespace(
        val_samples=Pairs(examples, processor, masking, augmentation=None, seed=0), processor=processor,
        skip_unreadable=True,
    )  # fmt: skip
    model = MMBertForPreTraining(tiny_config(objectives={"itm": {"calibrate": True}})).eval()
    with pytest.raises(UsageError, match=r"objectives\.itm\.calibrate needs .* only 0 can be read: leave"):
        calibrate_matching(model, data, seed=0)


def test_wrong_images_share_no_caption_with_the_text(tmp_path: Path) -> None:
    captions = [("a red cat", "the cat runs"), ("a red cat",), ("a blue bird", "a dog"), ("a dog",), ("two birds",)]
    val = Pairs(
        tiny_examples(tmp_path, captions),
        tiny_processor(),
        Masking(4, np.arange(5, 8), frozenset(range(5))),
        augmentation=None,
        seed=0,
    )
    pairs = choose_pairs(val, seed=0)
    assert pairs == choose_pairs(val, seed=0) and any(choose_pairs(val, seed=s) != pairs for s in range(1, 9))
    assert {text for text, _, _ in pairs} == {(i, j) for i, texts in enumerate(captions) for j in range(len(texts))}
    for (i, j), image, is_match in pairs:
        assert is_match == (image == i)
        assert is_match or val.examples[i].captions[j] not in val.examples[image].captions
    wrong = sum(not is_match for *_, is_match in pairs)
    assert 0 < wrong <= WRONG_IMAGES * (len(pairs) - wrong)


def test_logits_are_calibrated_in_evaluation_only() -> None:
    itm = MMBertForPreTraining(
        tiny_config(objectives={"itm": {"calibrate": True, "residual": True}, "itc": {}})
    ).objectives["itm"]
    pooled, similarity = torch.randn(3, itm.head.in_features), torch.randn(3)  # pyright: ignore
    trained = itm.train().score(pooled, similarity)  # pyright: ignore
    fused = trained - similarity
    itm.calibration.copy_(torch.tensor([2.0, 0.5, -1.0]))  # pyright: ignore
    assert torch.equal(itm.score(pooled, similarity), trained)  # pyright: ignore
    torch.testing.assert_close(itm.eval().score(pooled, similarity), 2 * fused + 0.5 * similarity - 1)  # pyright: ignore


def test_calibrate_is_true_or_false() -> None:
    with pytest.raises(UsageError, match=r"objectives\.itm\.calibrate='val'; allowed are true, false"):
        MMBertForPreTraining(tiny_config(objectives={"itm": {"calibrate": "val"}}))
