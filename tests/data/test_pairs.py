"""Pairs: captions, images and masks follow from (seed, epoch, sample); wrong images are wrong."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny import SPECIAL, WORDS, tiny_examples, tiny_processor
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mmbert.data.masking import Masking
from mmbert.data.pairs import Augmentation, Collate, Pairs, Sample, image_key, text_key, wrong_images
from mmbert.data.processor import MMBertProcessor
from mmbert.data.samples import LEFT_OR_RIGHT
from mmbert.model.tokens import IGNORE_INDEX, NO_TEXT

CAPTIONS = [
    ("a red cat", "the cat sits on the street", "two cats playing"),
    ("a blue dog on the left",),
    ("a bright tree", "the big tree and a small bird"),
    ("two cars",),
]
FIRST = len(SPECIAL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def pairs(folder: Path, captions: list[tuple[str, ...]] = CAPTIONS, **overrides: object) -> Pairs:
    """Training pairs without augmentation, of 16 px images."""
    masking = Masking(4, np.arange(FIRST, FIRST + len(WORDS)), frozenset(range(FIRST)))
    settings = {"seed": 0, "augmentation": Augmentation(), **overrides}
    return Pairs(tiny_examples(folder, captions), tiny_processor(), masking, **settings)


def same(a: Sample, b: Sample) -> bool:
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b, strict=True))


# --- captions and samples ------------------------------------------------------------------------------------------


def test_every_caption_is_used_once_in_as_many_epochs(folder: Path) -> None:
    data = pairs(folder)
    for i, captions in enumerate(CAPTIONS):
        for start in (0, 5):
            shown = [data.caption_numbers(start + epoch)[i] for epoch in range(len(captions))]
            assert sorted(shown) == list(range(len(captions)))
    many = pairs(folder, [("a", "b", "c")] * 60)
    assert set(many.caption_numbers(0).tolist()) == {0, 1, 2}  # images do not move in step


def test_token_counts_are_those_of_all_captions_without_special_tokens(folder: Path) -> None:
    data = pairs(folder, [("a red cat", "a cat"), ("a dog",)])
    counts = data.token_counts(FIRST + len(WORDS))
    expected = {"a": 3, "cat": 2, "red": 1, "dog": 1}
    assert {WORDS[i - FIRST]: n for i, n in enumerate(counts.tolist()) if n} == expected
    data.masking = replace(data.masking, content_ids=frozenset({FIRST + WORDS.index("cat")}))
    assert data.token_counts(FIRST + len(WORDS)).sum() == 2  # the only ones that are ever masked


def test_with_ngrams_no_image_is_mirrored_of_which_any_caption_has_left_or_right(folder: Path) -> None:
    data = pairs(
        folder, [("a red cat", "a cat on the left"), ("a dog", "a blue dog")], augmentation=Augmentation(flip=True)
    )
    own = [{tuple(data[epoch, i].pixel_values.flatten().tolist()) for epoch in range(0, 40)} for i in (0, 1)]
    assert [len(seen) for seen in own] == [2, 2], "of the first image those of the caption without left"
    data.use_ngrams(["left", "dog"])
    own = [{tuple(data[epoch, i].pixel_values.flatten().tolist()) for epoch in range(0, 40)} for i in (0, 1)]
    assert [len(seen) for seen in own] == [1, 2] and data[0, 0].ngram_ids == (0,)


@pytest.mark.parametrize(
    ("text", "is_found"),
    [
        *(
            (text, True)
            for text in ("the leftmost man", "a Right-handed man", "turning rightwards", "on the right, a cat")
        ),
        *((text, True) for text in ("a lefthanded man", "the left-hand side")),
        *((text, False) for text in ("a bright cat", "leftovers", "a man is upright", "copyright")),
    ],
)
def test_words_with_left_or_right_forbid_mirroring(text: str, is_found: bool) -> None:
    assert bool(LEFT_OR_RIGHT.search(text)) == is_found


def test_edit_that_is_a_caption_of_the_image_but_for_its_case_is_dropped(folder: Path) -> None:
    words = ["Red", "red", "cat", "Cat", "dog", ",", "runs"]
    wordpiece = Tokenizer(models.WordPiece({w: i for i, w in enumerate((*SPECIAL, *words))}, unk_token="[UNK]"))
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    wordpiece.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    roles = {f"{name.strip('[]').lower()}_token": name for name in SPECIAL}
    cased = PreTrainedTokenizerFast(tokenizer_object=wordpiece, **roles)
    data = pairs(folder, [("Red cat, runs", "red Cat , runs")])
    data.processor = MMBertProcessor(cased, data.processor.image_settings)
    for edit, is_kept in (("red cat, runs", False), ("Red Cat, runs", False), ("red dog, runs", True)):
        ids = data.processor.encode(edit)
        data.use_edits(lambda *_, ids=ids: ids, 1.0)  # pyright: ignore[reportArgumentType]
        sample = data[0, 0]
        assert sample.edited_input_ids == (ids if is_kept else sample.input_ids), edit


def test_sample_has_the_caption_of_its_epoch(folder: Path) -> None:
    data = pairs(folder)
    for epoch in range(4):
        for i, number in enumerate(data.caption_numbers(epoch)):
            sample = data[epoch, i]
            assert sample.input_ids == data.processor.encode(CAPTIONS[i][number])
            assert sample.text_key == text_key(CAPTIONS[i][number]) == data.text_keys[i][number]
            assert sample.image_text_keys == tuple(text_key(c) for c in CAPTIONS[i])
            assert data.text_lengths(epoch)[i] == len(CAPTIONS[i][number])


def test_sample_follows_from_seed_epoch_and_index_only(folder: Path) -> None:
    augmentation = Augmentation(crop=0.5, flip=True)
    data = pairs(folder, augmentation=augmentation)
    expected = {(e, i): data[e, i] for e in range(2) for i in range(4)}
    np.random.seed(1)
    torch.manual_seed(1)
    other = pairs(folder, augmentation=augmentation)
    for index in reversed(expected):  # another order, another object, another global state
        assert same(other[index], expected[index])
    assert not same(other[0, 0], other[1, 0])
    reseeded = pairs(folder, augmentation=augmentation, seed=1)
    assert not any(same(reseeded[index], expected[index]) for index in expected)


def test_masks_change_with_the_epoch_in_training_only(folder: Path) -> None:
    captions = [("the red cat and the blue dog and two birds on the street",)]
    training, evaluation = pairs(folder, captions), pairs(folder, captions, augmentation=None)
    assert len({tuple(training[e, 0].mlm_labels) for e in range(8)}) > 3
    assert evaluation[0].mlm_labels == evaluation[(0, 0)].mlm_labels
    sample = training[0, 0]
    for original, shown, label in zip(sample.input_ids, sample.mlm_input_ids, sample.mlm_labels, strict=True):
        assert (label == IGNORE_INDEX and shown == original) or label == original


def test_evaluation_takes_first_captions_and_a_wrong_image(folder: Path) -> None:
    data = pairs(folder, augmentation=None)
    for epoch in (0, 3):
        assert data.caption_numbers(epoch).tolist() == [0, 0, 0, 0]
    for i in range(4):
        sample = data[i]
        other = data.wrong_positions[i]
        assert other != i and torch.equal(sample.wrong_pixel_values, data[int(other)].pixel_values)
    assert pairs(folder)[0, 0].wrong_pixel_values is None


def test_keys_are_equal_for_equal_texts_only() -> None:
    assert text_key("A red  cat ") == text_key("a red cat") != text_key("a red hat")
    assert text_key("\udc80") >= 0  # a lone surrogate from a broken file
    keys = [text_key(str(i)) for i in range(1000)]
    assert len(set(keys)) == 1000 and all(0 <= k < 2**63 for k in keys)


# --- augmentation --------------------------------------------------------------------------------------------------


def test_images_whose_caption_mentions_left_or_right_are_not_mirrored(folder: Path) -> None:
    captions = [("a dog on the left",), ("Right of the tree",), ("a bright street",), ("the cat left.",)]
    data = pairs(folder, captions, augmentation=Augmentation(flip=True))
    plain = [data.processor.pixel_values(e.image) for e in data.examples]
    flipped: Counter[int] = Counter()
    for epoch in range(60):
        for i in range(4):
            image = data[epoch, i].pixel_values
            is_flipped = torch.equal(image, plain[i].flip(-1))
            assert is_flipped or torch.equal(image, plain[i])
            flipped[i] += is_flipped
    assert flipped[0] == flipped[1] == flipped[3] == 0
    assert 15 <= flipped[2] <= 45  # "bright" is not "right"


def test_crop_keeps_at_least_its_share_of_the_area(folder: Path) -> None:
    """An image whose pixels hold their own coordinates tells what was cut."""
    data = pairs(folder, augmentation=Augmentation(crop=0.25))
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    coordinates = torch.stack([rows, columns, rows]).to(torch.uint8)
    data.processor.load = lambda source: coordinates  # type: ignore[method-assign]
    areas = []
    for epoch in range(100):
        image = data[epoch, 0].pixel_values.float()
        assert image.shape == (3, 16, 16)
        height, width = (image[c].max() - image[c].min() for c in (0, 1))
        areas.append(float(height * width) / 63**2)
    assert min(areas) > 0.15 and max(areas) > 0.8 and 0.2 < min(areas) + 0.1  # borders are averaged by the resize
    assert np.std(areas) > 0.1


def test_without_augmentation_the_image_is_only_resized(folder: Path) -> None:
    data = pairs(folder)
    assert torch.equal(data[3, 1].pixel_values, data.processor.pixel_values(data.examples[1].image))


# --- wrong images ------------------------------------------------------------------------------------------------


def is_wrong(text_keys: list[tuple[int, ...]], image_keys: list[int], text: int, image: int) -> bool:
    return image_keys[text] != image_keys[image] and text_keys[text][0] not in text_keys[image]


@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.lists(st.integers(0, 6), min_size=1, max_size=3)), min_size=1, max_size=12
    ),
    st.integers(0, 100),
)
def test_wrong_images_are_wrong_wherever_one_exists(rows: list[tuple[int, list[int]]], seed: int) -> None:
    image_keys, text_keys = [r[0] for r in rows], [tuple(r[1]) for r in rows]
    wrong = wrong_images(text_keys, image_keys, seed)
    for i in range(len(rows)):
        if any(is_wrong(text_keys, image_keys, i, j) for j in range(len(rows))):
            assert is_wrong(text_keys, image_keys, i, int(wrong[i]))
        else:
            assert wrong[i] == i  # the sign that evaluation leaves it out
    assert np.array_equal(wrong, wrong_images(text_keys, image_keys, seed))


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=2, max_size=30), st.integers(0, 100))
def test_wrong_images_serve_once_each_unless_most_captions_are_equal(rows: list[tuple[int, int]], seed: int) -> None:
    """A swap that repairs a text exists as long as no text and no image conflicts with half of the other side."""
    image_keys, text_keys = [r[0] for r in rows], [(r[1],) for r in rows]
    count = len(rows)
    conflict = np.array([[not is_wrong(text_keys, image_keys, i, j) for j in range(count)] for i in range(count)])
    assume(conflict.sum(axis=0).max() + conflict.sum(axis=1).max() <= count)
    assert sorted(wrong_images(text_keys, image_keys, seed).tolist()) == list(range(count))


def test_wrong_images_of_distinct_pairs_are_a_derangement() -> None:
    for count in (2, 3, 40):
        wrong = wrong_images([(i,) for i in range(count)], list(range(count)), 0)
        assert sorted(wrong.tolist()) == list(range(count)) and all(wrong != np.arange(count))


def test_wrong_images_differ_by_seed() -> None:
    keys = [(i,) for i in range(30)]
    assert not np.array_equal(wrong_images(keys, list(range(30)), 0), wrong_images(keys, list(range(30)), 1))


# --- collate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_collate_pads_and_stacks(folder: Path, training: bool) -> None:
    data = pairs(folder, augmentation=Augmentation() if training else None)
    samples = [data[0, i] for i in range(4)]
    batch = Collate(data.processor.pad_token_id)(samples)
    longest = max(len(s.input_ids) for s in samples)
    assert len({len(s.input_ids) for s in samples}) > 1
    shapes = {
        "index": (4,),
        "requested_index": (4,),
        "input_ids": (4, longest),
        "attention_mask": (4, longest),
        "mlm_input_ids": (4, longest),
        "mlm_labels": (4, longest),
        "pixel_values": (4, 3, 16, 16),
        "image_key": (4,),
        "text_key": (4,),
        "image_text_keys": (4, 3),
    }
    if not training:
        shapes |= {"wrong_pixel_values": (4, 3, 16, 16), "image_digest": (4,), "wrong_image_digest": (4,)}
    assert {name: tuple(value.shape) for name, value in batch.items()} == shapes
    assert {n for n, v in batch.items() if v.dtype != torch.int64} == {n for n in shapes if "pixel" in n}
    assert batch["pixel_values"].dtype == torch.uint8
    for i, sample in enumerate(samples):
        length = len(sample.input_ids)
        assert batch["attention_mask"][i].tolist() == [1] * length + [0] * (longest - length)
        padding = {"input_ids": 0, "mlm_input_ids": 0, "mlm_labels": IGNORE_INDEX}
        for name, value in padding.items():
            assert batch[name][i].tolist() == getattr(sample, name) + [value] * (longest - length)
        count = len(CAPTIONS[i])
        assert batch["image_text_keys"][i].tolist() == [*sample.image_text_keys] + [NO_TEXT] * (3 - count)
    assert batch["index"].tolist() == [0, 1, 2, 3]


def test_image_sample_takes_each_image_once_with_its_first_caption(folder: Path) -> None:
    rotated = [
        replace(e, captions=e.captions[i:] + e.captions[:i])
        for e in tiny_examples(folder, [("a", "b"), ("c",), ("d", "e")])
        for i in range(len(e.captions))
    ]
    masking = Masking(4, np.arange(5, 8), frozenset(range(5)))
    pairs = Pairs(rotated, tiny_processor(), masking, seed=0, augmentation=None)
    assert pairs.image_sample(10) == {0, 2, 3}
    assert len(pairs.image_sample(2)) == 2


def test_image_ids_that_differ_in_case_are_different_images(folder: Path) -> None:
    examples = [
        replace(e, image_id=image_id)
        for e, image_id in zip(
            tiny_examples(folder, [("a",), ("b",), ("c",)]), ("a0.png", "A0.png", "a0 .png"), strict=True
        )
    ]
    data = Pairs(
        examples, tiny_processor(), Masking(4, np.arange(5, 8), frozenset(range(5))), seed=0, augmentation=None
    )
    assert len(set(data.image_keys)) == 3 and data.image_sample(10) == {0, 1, 2}
    assert image_key("a0.png") == text_key("a0.png"), "captions are compared by the same hash of lower-case text"
