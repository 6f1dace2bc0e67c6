"""Strange captions: each becomes ids that the model takes, with a finite loss, or is an error of its reader."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import MASK, SPECIAL, VOCAB, WORDS, tiny_config, tiny_examples, tiny_processor

from mmbert.data.masking import Masking
from mmbert.data.pairs import Augmentation, Collate, Pairs
from mmbert.data.processor import MMBertProcessor
from mmbert.data.readers.base import clean_caption
from mmbert.errors import DataError, UsageError
from mmbert.model.modeling import MMBertForPreTraining
from mmbert.model.tokens import IGNORE_INDEX
from mmbert.runtime.randomness import numpy_generator

CLS, SEP, UNK = 2, 3, 1
ORDINARY = [*range(len(SPECIAL), len(SPECIAL) + len(WORDS))]
PROCESSOR = tiny_processor()
MASKING = Masking(MASK, torch.tensor(ORDINARY).numpy(), frozenset(range(len(SPECIAL))))
TEXTS = {
    "empty": "",
    "spaces": " \t \n ",
    "10,000 words": "a red cat " * 3334,
    "one token of 50,000 characters": "x" * 50_000,
    "emoji of a family": "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466" * 3,
    "flags": "\U0001f1e9\U0001f1ea\U0001f1ef\U0001f1f5",
    "Arabic with marks": "\u0642\u0650\u0637\u0651\u064e\u0629\u064c \u062d\u0645\u0631\u0627\u0621",
    "Hebrew with marks": "\u05d7\u05b8\u05ea\u05d5\u05bc\u05dc \u05d0\u05b8\u05d3\u05b9\u05dd",
    "mixed directions": "a \u202ered\u202c cat \u2067\u05d0\u2069 \u200f dog",
    "a storm of combining marks": "c" + "\u0300\u0301\u0302\u0489" * 400 + "at",
    "composed": "caf\u00e9",
    "decomposed": "cafe\u0301",
    "full width": "\uff41 \uff52\uff45\uff44 \uff43\uff41\uff54",
    "CJK": "\u4e00\u53ea\u7ea2\u8272\u7684\u732b",
    "Thai": "\u0e41\u0e21\u0e27\u0e2a\u0e35\u0e41\u0e14\u0e07",
    "line breaks and tabs": "a red\n\ncat\ton\r\nthe street",
    "NUL": "a red\0cat",
    "HTML entities": "a &lt;red&gt; cat &amp; dog &#128008;",
    "special tokens": "[CLS] a [MASK] cat [SEP] [PAD] [UNK]",
    "only special tokens": "[MASK][MASK]",
    "all unknown": "qqq zzz xxx",
    "one word": "cat",
    "as long as allowed": "a red cat sits on the big tree and the small dog runs",
    "unassigned and private": "\ue000 \U0010ffff \ufffe",
}


@pytest.fixture(scope="module")
def model() -> MMBertForPreTraining:
    torch.manual_seed(0)
    return MMBertForPreTraining(tiny_config(objectives={"mlm": 1.0, "itm": 1.0, "itc": {"embedding_size": 8}})).eval()


@pytest.mark.parametrize("name", TEXTS)
def test_strange_caption_gives_valid_ids_and_a_finite_loss(
    name: str, model: MMBertForPreTraining, tmp_path: Path
) -> None:
    examples = tiny_examples(tmp_path, [(TEXTS[name],), ("a red cat",), ("the big dog",)])
    pairs = Pairs(examples, PROCESSOR, MASKING, seed=0, augmentation=Augmentation())
    batch = Collate(PROCESSOR.pad_token_id)([pairs[0, i] for i in range(3)])
    ids, labels, real = batch["input_ids"], batch["mlm_labels"], batch["attention_mask"].bool()
    assert ids.shape[1] <= 16 and int(ids.min()) >= 0 and int(ids.max()) < VOCAB
    assert ids[0, 0] == CLS and ids[0, int(real[0].sum()) - 1] == SEP
    chosen = labels != IGNORE_INDEX
    assert not chosen[~real].any() and not (chosen & (ids < len(SPECIAL))).any(), "never a special token or padding"
    assert MASK not in ids, "a literal [MASK] is text"
    batch["pixel_values"] = PROCESSOR.image_settings.normalize(batch["pixel_values"])
    output = model(**batch, generator=torch.Generator().manual_seed(0))
    assert output.loss.isfinite()
    output.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("text", ["", "qqq zzz", "[MASK]", "\U0001f408"])
def test_caption_without_a_word_to_mask_gives_loss_zero(text: str, model: MMBertForPreTraining, tmp_path: Path) -> None:
    pairs = Pairs(tiny_examples(tmp_path, [(text,)]), PROCESSOR, MASKING, seed=0, augmentation=Augmentation())
    batch = Collate(PROCESSOR.pad_token_id)([pairs[0, 0]])
    assert (batch["mlm_labels"] == IGNORE_INDEX).all()
    batch["pixel_values"] = PROCESSOR.image_settings.normalize(batch["pixel_values"])
    mlm = model(**batch).objectives["mlm"]
    assert mlm.loss == 0 and mlm.left_out == 1


def test_literal_special_tokens_stay_text_after_saving_and_loading(tmp_path: Path) -> None:
    PROCESSOR.save_pretrained(tmp_path)
    for processor in (PROCESSOR, MMBertProcessor.from_pretrained(tmp_path)):
        for token in SPECIAL:
            ids = processor.encode(f"a {token} cat")
            assert ids[0] == CLS and ids[-1] == SEP
            assert not {0, CLS, SEP, MASK} & set(ids[1:-1]), token
        ids = processor(text=["a [SEP] cat"])["input_ids"][0].tolist()
        assert ids.count(SEP) == 1


def test_composed_and_decomposed_letters_are_the_same_token() -> None:
    assert PROCESSOR.encode("a r\u00e9d cat") == PROCESSOR.encode("a re\u0301d cat") == PROCESSOR.encode("a red cat")


@pytest.mark.parametrize(("words", "cut"), [(13, False), (14, False), (15, True)])
def test_text_is_cut_beyond_the_longest_only(words: int, cut: bool) -> None:
    """16 tokens with [CLS] and [SEP]: 14 words fit."""
    ids = PROCESSOR.encode("cat " * words)
    assert len(ids) == min(words, 14) + 2 and ids[0] == CLS and ids[-1] == SEP
    assert PROCESSOR.truncated_fraction(["cat " * words]) == float(cut)


def test_cut_share_counts_texts_that_are_cut() -> None:
    assert PROCESSOR.truncated_fraction(["cat " * n for n in (1, 14, 15, 400)]) == 0.5
    assert PROCESSOR.truncated_fraction([]) == 0.0


def test_half_a_surrogate_pair_is_an_error_of_reader_and_processor() -> None:
    with pytest.raises(DataError, match="half a surrogate pair at character 2"):
        clean_caption("a \ud83d cat", "file:1")
    with pytest.raises(UsageError, match=r"ud83d.*no valid Unicode"):
        PROCESSOR(text="a \ud83d cat")


def test_real_captions_are_masked_15_percent_and_80_10_10(tmp_path: Path) -> None:
    """Over 1e5 tokens that went the whole way: tokenizer, sample, masking."""
    texts = [" ".join(WORDS[(i * 7 + k) % 14] for k in range(6 + i % 9)) for i in range(100)]
    pairs = Pairs(tiny_examples(tmp_path, [(t,) for t in texts]), PROCESSOR, MASKING, seed=3, augmentation=None)
    total = predicted = hidden = kept = 0
    encoded = [pairs.processor.encode(t) for t in texts]
    epoch = 0
    while total < 100_000:
        for i, ids in enumerate(encoded):
            masked, labels = pairs.masking(ids, [False] * len(ids), numpy_generator(3, "mask train", epoch, i))
            chosen = [k for k, label in enumerate(labels) if label != IGNORE_INDEX]
            total += len(ids) - 2
            predicted += len(chosen)
            hidden += sum(masked[k] == MASK for k in chosen)
            kept += sum(masked[k] == ids[k] for k in chosen)
        epoch += 1
    assert abs(predicted / total - 0.15) < 0.005
    assert abs(hidden / predicted - 0.8) < 0.01
    # One random token in len(WORDS) is the one it replaces.
    assert abs(kept / predicted - 0.1 - 0.1 / len(WORDS)) < 0.01


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=5), st.integers(0, 10**6))
def test_any_caption_becomes_a_padded_batch_that_can_be_read_back(texts: list[str], seed: int) -> None:
    rows = [PROCESSOR.encode(text) for text in texts]
    batch = PROCESSOR(text=texts)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (len(texts), max(map(len, rows)))
    for row, ids, mask in zip(rows, batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True):
        assert ids == row + [0] * (len(ids) - len(row)) and mask == [1] * len(row) + [0] * (len(ids) - len(row))
        assert 2 <= len(row) <= 16 and row[0] == CLS and row[-1] == SEP and max(row) < VOCAB
        assert not {0, CLS, SEP, MASK} & set(row[1:-1])
        # Whole words come back: what the vocabulary spells is spelt the same way again.
        words = PROCESSOR.tokenizer.decode([i for i in row if i >= len(SPECIAL)])
        assert set(PROCESSOR.encode(words)[1:-1]) <= set(row[1:-1]) | {UNK}
        masked, labels = MASKING(row, [False] * len(row), numpy_generator(seed, "mask"))
        assert len(masked) == len(labels) == len(row) and all(0 <= i < VOCAB for i in masked)
        for shown, label, own in zip(masked, labels, row, strict=True):
            assert (label == IGNORE_INDEX and shown == own) or (label == own and own >= len(SPECIAL))
