"""Retrieval recall: hand-made matrices and a brute-force oracle."""

import random
from typing import Any

import numpy as np
import pytest
import torch

from mmbert.metrics import retrieval
from mmbert.metrics.retrieval import equal_text_relevance, recall_at_k

# Two images, four texts; texts 0 and 1 belong to image 0.
SCORES = [[0.1, 0.7, 0.9, 0.2], [0.3, 0.6, 0.5, 0.4]]
OWNER = [0, 0, 1, 1]


def test_hand_made_matrix() -> None:
    # Image 0 ranks texts 2, 1, 3, 0: its best, text 1, is second. Image 1: 1, 2, 3, 0: text 2 is second.
    # Texts 0 and 2 prefer the wrong image, texts 1 and 3 the right one.
    result = recall_at_k(torch.tensor(SCORES), OWNER, ks=(1, 2))
    assert result == {
        "image_to_text/R@1": 0.0,
        "image_to_text/R@2": 1.0,
        "image_to_text/median_rank": 2.0,
        "text_to_image/R@1": 0.5,
        "text_to_image/R@2": 1.0,
        "text_to_image/median_rank": 1.5,
        "images_without_text": 0,
    }


def test_perfect_scores_give_600_and_ties_nothing() -> None:
    owner = np.arange(20).repeat(5)
    perfect = (owner == np.arange(20)[:, None]).astype(np.float32)
    assert recall_at_k(perfect, owner)["rsum"] == pytest.approx(600)
    tied = recall_at_k(np.zeros((20, 100)), owner)
    # 95 wrong texts rank before the right five, 19 wrong images before the right one.
    assert tied["rsum"] == 0
    assert (tied["image_to_text/median_rank"], tied["text_to_image/median_rank"]) == (96, 20)


def test_random_scores_are_at_chance() -> None:
    scores = np.random.default_rng(0).random((2000, 2000), np.float32)
    result = recall_at_k(scores, np.arange(2000), ks=(20,))
    spread = 3 * (0.01 * 0.99 / 2000) ** 0.5
    assert abs(result["image_to_text/R@20"] - 0.01) < spread
    assert abs(result["text_to_image/R@20"] - 0.01) < spread


def test_image_without_text_is_left_out_and_counted() -> None:
    result = recall_at_k(torch.tensor([*SCORES, [9.0, -9, -9, -9]]), OWNER, ks=(1, 2))
    assert result["images_without_text"] == 1
    assert result["image_to_text/R@2"] == 1.0  # of two images
    assert result["text_to_image/R@2"] == 0.75  # but it still competes: text 0 now comes third


def test_equal_texts_count_as_right() -> None:
    relevant = equal_text_relevance(["a b", "x", "a b", "y"], OWNER, 2)
    assert relevant.tolist() == [[True, True, True, False], [True, False, True, True]]
    result = recall_at_k(SCORES_TENSOR, OWNER, ks=(1,), relevant=relevant)
    assert result["image_to_text/R@1"] == 0.5  # image 0's first text is 2, equal to its own text 0
    assert result["text_to_image/R@1"] == 1.0
    same = torch.tensor(OWNER) == torch.arange(2)[:, None]
    assert recall_at_k(SCORES_TENSOR, OWNER, relevant=same) == recall_at_k(SCORES_TENSOR, OWNER)
    with pytest.raises(ValueError, match="4 texts but image_of_text has 2"):
        equal_text_relevance(["a"] * 4, [0, 1], 2)


SCORES_TENSOR = torch.tensor(SCORES)


def brute_force(scores: Any, relevant: Any, ks: tuple[int, ...]) -> dict[str, float]:
    """The definition with loops: sort with wrong before right at equal score, look for the first right."""
    result: dict[str, float] = {}
    directions = (("image_to_text", scores, relevant), ("text_to_image", scores.T, relevant.T))
    for name, matrix, right in directions:
        ranks = []
        for row, is_right in zip(matrix.tolist(), right.tolist(), strict=True):
            order = sorted(range(len(row)), key=lambda j: (-row[j], is_right[j]))
            ranks += [next(n for n, j in enumerate(order, 1) if is_right[j])] if any(is_right) else []
        for k in ks:
            result[f"{name}/R@{k}"] = sum(rank <= k for rank in ranks) / len(ranks)
        ranks.sort()
        result[f"{name}/median_rank"] = (ranks[(len(ranks) - 1) // 2] + ranks[len(ranks) // 2]) / 2
    return result


@pytest.mark.parametrize("chunk", [1, 17, 1 << 22])
def test_equals_brute_force_on_random_instances(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "CHUNK_ELEMENTS", chunk)
    rng = np.random.default_rng(chunk)
    for trial in range(100):
        images, texts = rng.integers(1, 9), rng.integers(1, 25)
        levels = random.Random(trial).choice([2, 5, 1000])  # few levels = many ties
        scores = rng.integers(-levels, 1, (images, texts)).astype(rng.choice(["float32", "float64", "int64"]))
        if trial % 7 == 0 and scores.dtype.kind == "f":
            scores[scores == 0] = -np.inf
        owner = rng.integers(0, images, texts)
        relevant = owner == np.arange(images)[:, None]
        if trial % 2:
            relevant |= rng.random((images, texts)) < 0.2
        result = recall_at_k(scores, owner, (1, 2, 10), relevant=relevant if trial % 2 else None)
        expected = brute_force(scores, relevant, (1, 2, 10))
        assert {name: result[name] for name in expected} == expected
        assert result["images_without_text"] == (~relevant.any(1)).sum()


def test_half_precision_equals_float() -> None:
    scores = torch.tensor(np.random.default_rng(0).random((30, 60))).bfloat16()
    owner = torch.arange(30).repeat_interleave(2)
    assert recall_at_k(scores, owner) == recall_at_k(scores.float(), owner)


def test_wrong_input_is_rejected() -> None:
    for position in ((0, 0), (1, 3)):
        bad = torch.tensor(SCORES)
        bad[position] = torch.nan
        with pytest.raises(ValueError, match=rf"scores\[{position[0]}, {position[1]}\] is NaN"):
            recall_at_k(bad, OWNER)
    no_pair = torch.zeros(2, 4, dtype=torch.bool)
    text_2_alone = torch.tensor([[True, True, False, False], [True, False, False, True]])
    cases: list[tuple[Any, Any, dict[str, Any], str]] = [
        (SCORES_TENSOR[0], OWNER, {}, "expected \\(images, texts\\)"),
        (SCORES_TENSOR[:, :0], [], {}, "both at least 1"),
        (SCORES_TENSOR, OWNER[:3], {}, "expected 4 whole numbers"),
        (SCORES_TENSOR, [0.0, 0, 1, 1], {}, "whole numbers"),
        (SCORES_TENSOR, [0, 0, 1, 2], {}, "0 to 2; expected rows of scores, 0 to 1"),
        (SCORES_TENSOR, [0, 0, 1, -1], {}, "-1 to 1"),
        (SCORES_TENSOR, OWNER, {"ks": ()}, "ks is"),
        (SCORES_TENSOR, OWNER, {"ks": (0, 1)}, "ks is"),
        (SCORES_TENSOR, OWNER, {"relevant": no_pair}, "no image for text 0"),
        (SCORES_TENSOR, OWNER, {"relevant": text_2_alone}, "no image for text 2"),
        (SCORES_TENSOR, OWNER, {"relevant": no_pair.T}, "relevant has shape"),
        (SCORES_TENSOR, OWNER, {"relevant": SCORES_TENSOR}, "expected bool"),
    ]
    for scores, owner, keys, reason in cases:
        with pytest.raises(ValueError, match=reason):
            recall_at_k(scores, owner, **keys)
