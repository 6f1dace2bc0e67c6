"""Edited captions against edits worked out by hand."""

import logging
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_examples, tiny_processor
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from mmbert.data import datamodule
from mmbert.data.datamodule import PairsDataModule
from mmbert.data.edits import CaptionEdits
from mmbert.data.image_processor import ImageSettings
from mmbert.data.options import DataOptions
from mmbert.data.processor import MMBertProcessor
from mmbert.errors import UsageError
from mmbert.runtime.randomness import numpy_generator

CLS, SEP = 2, 3
A, AND, RED, BLUE, GREEN, STAR, SQUARE = range(10, 17)
CONTENT = {RED, BLUE, GREEN, STAR, SQUARE}


def caption(*tokens: int) -> list[int]:
    return [CLS, *tokens, SEP]


TRAINING = [
    caption(A, color, shape, AND, A, other, second)
    for color in (RED, BLUE)
    for other in (RED, BLUE)
    for shape in (STAR, SQUARE)
    for second in (STAR, SQUARE)
]


def edited(text: list[int], own: tuple[list[int], ...] = (), training: list[list[int]] = TRAINING) -> Counter:
    edits = CaptionEdits(training, CONTENT)
    known = {tuple(x) for x in (text, *own)}
    found = [edits(text, known, numpy_generator(seed, "edited caption")) for seed in range(200)]
    return Counter(None if x is None else tuple(x) for x in found)


def test_one_word_is_replaced_or_two_are_swapped() -> None:
    text = caption(A, RED, STAR, AND, A, BLUE, SQUARE)
    found = edited(text)
    replaced = [
        caption(A, BLUE, STAR, AND, A, BLUE, SQUARE),
        caption(A, RED, SQUARE, AND, A, BLUE, SQUARE),
        caption(A, RED, STAR, AND, A, RED, SQUARE),
        caption(A, RED, STAR, AND, A, BLUE, STAR),
    ]
    swapped = [caption(A, BLUE, STAR, AND, A, RED, SQUARE), caption(A, RED, SQUARE, AND, A, BLUE, STAR)]
    assert {*found} == {None, *(tuple(x) for x in (*replaced, *swapped))}  # None: the same word was drawn again
    assert sum(found[tuple(x)] for x in swapped) == pytest.approx(0.4 * 200, abs=25)


def test_edits_keep_to_the_sequences_of_training_captions() -> None:
    """A color is never put where a shape stands, and green, which no training caption has there, never comes."""
    for text in edited(caption(A, RED, STAR, AND, A, BLUE, SQUARE)):
        if text is None:
            continue
        assert {text[2], text[6]} <= {RED, BLUE} and {text[3], text[7]} <= {STAR, SQUARE}
    with_green = [*TRAINING, caption(GREEN, STAR)]  # another neighbour on the left
    assert all(
        GREEN not in (text or ()) for text in edited(caption(A, RED, STAR, AND, A, BLUE, SQUARE), (), with_green)
    )


def test_captions_of_the_image_are_no_edits() -> None:
    text, other = caption(A, RED, STAR, AND, A, BLUE, SQUARE), caption(A, BLUE, STAR, AND, A, BLUE, SQUARE)
    found = edited(text, (other,))
    assert tuple(other) not in found and None in found


@pytest.mark.parametrize("tokens", [(), (A,), (A, RED), (A, AND, A)])
def test_captions_with_fewer_than_two_content_words_are_not_edited(tokens: tuple[int, ...]) -> None:
    assert edited(caption(*tokens)) == {None: 200}


def test_edit_depends_on_the_generator_only() -> None:
    edits = CaptionEdits(TRAINING, CONTENT)
    text = caption(A, RED, STAR, AND, A, BLUE, SQUARE)
    assert edits(text, (), np.random.default_rng(3)) == edits(text, (), np.random.default_rng(3))


def test_edits_have_each_word_as_often_as_the_captions_they_are_made_from() -> None:
    """Red is four times as frequent as blue; always another word would make blue four times as frequent in edits."""
    training = [caption(A, color, shape) for color in (RED, RED, RED, RED, BLUE) for shape in (STAR, SQUARE)]
    edits, before, after = CaptionEdits(training, CONTENT), Counter(), Counter()
    for seed in range(400):
        for i, text in enumerate(training):
            changed = edits(text, {tuple(text)}, numpy_generator(seed, "edited caption", i))
            if changed is not None and changed[2] != text[2]:
                before[text[2]] += 1
                after[changed[2]] += 1
    assert before[RED] == after[BLUE] == pytest.approx(after[RED], rel=0.15) and before[RED] > 200


def test_opposites_are_exchanged_in_a_fraction_of_the_edits() -> None:
    left, right = 20, 21
    training = [caption(A, shape, side, RED, STAR) for shape in (STAR, SQUARE) for side in (left, right)]
    edits = CaptionEdits(training, {*CONTENT, left, right}, {left: right, right: left})
    text = caption(A, SQUARE, left, RED, STAR)
    found = [edits(text, {tuple(text)}, numpy_generator(seed, "edited caption")) for seed in range(200)]
    exchanged = caption(A, SQUARE, right, RED, STAR)
    assert sum(x == exchanged for x in found) == pytest.approx(0.4 * 200, abs=25)
    assert all(x is None or x == exchanged or x[3] == left for x in found)
    assert all(edits(text, {tuple(text), tuple(exchanged)}, numpy_generator(s, "x")) != exchanged for s in range(50))


def module_of(
    opposites: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch, processor: MMBertProcessor | None = None
) -> PairsDataModule:
    both = ("a red cat left of a dog", "a red cat right of a dog")
    examples = tiny_examples(folder, [both] * 4 + [("a blue car", "a car")] * 8)
    monkeypatch.setattr(datamodule, "read_examples", lambda *_, **__: {"train": examples})
    options = DataOptions(annotations="a", images="b", batch_size=1, mask_content=True, opposites=opposites)
    return PairsDataModule(options, processor or tiny_processor(), seed=0)


def test_opposites_are_masked_and_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = module_of({"left": "right"}, tmp_path, monkeypatch)
    left, right = module.processor.tokenizer.convert_tokens_to_ids(["left", "right"])
    assert module.opposites == {left: right, right: left}
    assert module.train_samples.masking.content_ids is not None
    assert {left, right} <= module.train_samples.masking.content_ids and left not in module._content_tokens("x")
    module.use_edits(1.0)
    assert module.train_samples.edits is not None and module.train_samples.edits.opposites == module.opposites


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Other tests in the process may have let messages of lower levels through."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_opposites_of_byte_level_bpe_are_those_behind_a_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bpe = ByteLevelBPETokenizer()
    captions = ["a red cat left of a dog", "a red cat right of a dog", "left", "right", "a blue car", "up", "down"]
    bpe.train_from_iterator(captions * 50, vocab_size=400, min_frequency=1, show_progress=False)
    roles = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>", "mask_token": "<m>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **roles)
    processor = MMBertProcessor(tokenizer, ImageSettings(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))
    module = module_of({"left": "right"}, tmp_path, monkeypatch, processor)
    left, right, first, second = (tokenizer.get_vocab()[token] for token in ("left", "right", "Ġleft", "Ġright"))
    assert module.opposites == {left: right, right: left, first: second, second: first}
    assert not _warnings(caplog)
    module_of({"up": "down"}, tmp_path, monkeypatch, processor)
    assert _warnings(caplog) == ["data.opposites has no effect: no training caption has one of the words up, down."]


@pytest.mark.parametrize(
    ("opposites", "message"),
    [
        ({"left": "unknown"}, "'unknown' is not one token"),
        ({"playing": "left"}, "'playing' is not one token"),
        ({"left": "left"}, "'left' must have one opposite"),
        ({"left": "right", "red": "left"}, "'left' must have one opposite"),
    ],
)
def test_words_without_one_opposite_are_rejected(
    opposites: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=f"data.opposites: {message}"):
        module_of(opposites, tmp_path, monkeypatch)
