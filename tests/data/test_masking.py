"""Masking against BERT's numbers: 15 %, of these 80/10/10."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmbert.data.masking import Masking
from mmbert.model.tokens import IGNORE_INDEX
from mmbert.runtime.randomness import numpy_generator

CLS, SEP, MASK, FIRST = 2, 3, 4, 5
VOCAB = 1000
SPECIAL = frozenset(range(FIRST))


def rule(**overrides: object) -> Masking:
    return Masking(MASK, np.arange(FIRST, VOCAB), SPECIAL, **overrides)  # type: ignore[arg-type]


def apply(
    masking: Masking, ids: list[int], seed: int, continues: list[bool] | None = None
) -> tuple[list[int], list[int]]:
    return masking(ids, continues or [False] * len(ids), numpy_generator(seed, "mask"))


@pytest.mark.parametrize("words", [11, 20, 34])
def test_masking_hits_15_percent_in_the_mean(words: int) -> None:
    texts = 100_000 // words
    predicted = sum(
        sum(label != IGNORE_INDEX for label in apply(rule(), [CLS, *range(FIRST, FIRST + words), SEP], seed)[1])
        for seed in range(texts)
    )
    assert abs(predicted / (texts * words) - 0.15) < 0.005


def test_masking_splits_80_10_10() -> None:
    kinds: Counter[str] = Counter()
    replacements: Counter[int] = Counter()
    for seed in range(2000):
        ids = [CLS, *range(FIRST + seed % 900, FIRST + seed % 900 + 60), SEP]
        masked, labels = apply(rule(), ids, seed)
        for original, shown, label in zip(ids, masked, labels, strict=True):
            if label == IGNORE_INDEX:
                assert shown == original
                continue
            assert label == original
            kind = "mask" if shown == MASK else "same" if shown == original else "random"
            kinds[kind] += 1
            if kind == "random":
                replacements[shown] += 1
    total = sum(kinds.values())
    assert total > 15_000
    for kind, share in (("mask", 0.8), ("random", 0.1), ("same", 0.1)):
        assert abs(kinds[kind] / total - share) < 0.01, kind
    assert min(replacements) >= FIRST and max(replacements) < VOCAB and len(replacements) > 700


@given(st.lists(st.integers(0, 30), max_size=20), st.integers(0, 10**6), st.booleans(), st.floats(0.01, 1.0))
def test_masking_predicts_at_least_one_and_never_a_special_token(
    ids: list[int], seed: int, whole_word: bool, probability: float
) -> None:
    continues = [i % 3 == 2 for i in range(len(ids))]
    masked, labels = apply(rule(whole_word=whole_word, probability=probability), ids, seed, continues)
    assert len(masked) == len(labels) == len(ids)
    ordinary = [i for i, token in enumerate(ids) if token not in SPECIAL]
    predicted = [i for i, label in enumerate(labels) if label != IGNORE_INDEX]
    assert set(predicted) <= set(ordinary) and bool(predicted) == bool(ordinary)
    assert all(masked[i] == ids[i] for i in range(len(ids)) if i not in predicted)
    if probability == 1.0:
        assert predicted == ordinary


def test_content_masking_takes_content_words_where_there_are_any() -> None:
    content = rule(content_ids=frozenset({10, 12}), probability=0.5, whole_word=True)
    counts: Counter[int] = Counter()
    for seed in range(400):  # the words 9, 10 11, 12: the second of two tokens, of which one is content
        _, labels = apply(content, [CLS, 9, 10, 11, 12, SEP], seed, [False, False, False, True, False, False])
        predicted = tuple(label for label in labels if label != IGNORE_INDEX)
        assert predicted in {(10, 11), (12,)}  # half of the two content words
        counts[len(predicted)] += 1
    assert abs(counts[1] / 400 - 0.5) < 0.1
    _, labels = apply(content, [CLS, 20, 21, SEP], 0)
    assert sum(label != IGNORE_INDEX for label in labels) == 1  # none is content: any word


@pytest.mark.parametrize("ids", [[], [CLS, SEP], [CLS, 1, SEP]])
def test_texts_of_special_tokens_are_not_masked(ids: list[int]) -> None:
    assert apply(rule(), ids, 0) == (ids, [IGNORE_INDEX] * len(ids))


def test_tokens_of_a_word_are_predicted_together() -> None:
    words = [[10], [11, 12], [13, 14, 15], [16], [17, 18]]
    ids = [CLS, *(piece for word in words for piece in word), SEP]
    continues = [False, *(i > 0 for word in words for i in range(len(word))), False]
    seen: Counter[int] = Counter()
    for seed in range(500):
        labels = apply(rule(whole_word=True, probability=0.4), ids, seed, continues)[1]
        predicted = {label for label in labels if label != IGNORE_INDEX}
        whole = [word for word in words if predicted & set(word)]
        assert predicted == {piece for word in whole for piece in word}
        assert len(whole) == 2  # 0.4 of 5 words
        seen.update(word[0] for word in whole)
    assert set(seen) == {10, 11, 13, 16, 17}
    single = {frozenset(x for x in apply(rule(probability=0.2), ids, s, continues)[1] if x > 0) for s in range(50)}
    assert any(len(s & {13, 14, 15}) == 1 for s in single)  # without the option pieces go alone


def test_a_piece_behind_a_special_token_starts_a_word() -> None:
    """[UNK] stands between: nothing may be joined across it."""
    ids, continues = [CLS, 10, 1, 11, SEP], [False, False, False, True, False]
    found = {
        tuple(i for i, x in enumerate(apply(rule(whole_word=True), ids, s, continues)[1]) if x > 0) for s in range(50)
    }
    assert found == {(1,), (3,)}


def test_masking_follows_from_its_generator_and_changes_no_input() -> None:
    ids = list(range(FIRST, FIRST + 40))
    first = apply(rule(), ids, 1)
    assert ids == list(range(FIRST, FIRST + 40))
    assert apply(rule(), ids, 1) == first != apply(rule(), ids, 2)
