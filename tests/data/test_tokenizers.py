"""Tokenizers: one without a vocabulary is an error, unknown words are counted, and every kind marks its words."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import SPECIAL, WORDS, tiny_examples, tiny_processor, tiny_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AddedToken, AutoConfig, BertConfig, DebertaV2Tokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import import_protobuf

from mmbert.data.datamodule import PairsDataModule
from mmbert.data.image_processor import ImageSettings
from mmbert.data.masking import Masking
from mmbert.data.options import DataOptions
from mmbert.data.pairs import Augmentation, Pairs
from mmbert.data.processor import MMBertProcessor
from mmbert.data.tokenizers import load_tokenizer
from mmbert.errors import UsageError
from mmbert.model.tokens import IGNORE_INDEX

IMAGES = ImageSettings(16, (0.5,) * 3, (0.5,) * 3)


def bert_folder(folder: Path, *files: str) -> str:
    """A BERT folder with a configuration, and files of the tokenizer."""
    BertConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    for file in folder.iterdir():
        if file.name not in ("config.json", *files):
            file.unlink()
    return str(folder)


@pytest.mark.parametrize("files", [(), ("tokenizer_config.json",)])
def test_folder_without_a_vocabulary_is_an_error_with_the_missing_files(files: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=rf"'{tmp_path}': the folder has no vocabulary; expected one of tokenizer.json"
    ):
        load_tokenizer(bert_folder(tmp_path, *files))


def test_tokenizer_that_knows_special_tokens_only_is_an_error(tmp_path: Path) -> None:
    folder = bert_folder(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(SPECIAL))
    with pytest.raises(UsageError, match="knows its 5 special tokens only"):
        load_tokenizer(folder)
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL, "cat"]))
    assert len(load_tokenizer(folder)) == 6


def bpe_folder(folder: Path) -> Path:
    """A RoBERTa tokenizer as vocab.json and merges.txt, which reads "cat" as one token."""
    letters = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "c", "a", "t", "ca", "cat"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(letters)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "RobertaTokenizer"}))
    return folder


def wordpiece_files(folder: Path) -> None:
    """DistilBERT's files on the hub."""
    (folder / "vocab.txt").write_text("\n".join((*SPECIAL, *WORDS, "un", "##believ", "##able")))
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True, "model_max_length": 512}))


def byte_level_files(folder: Path) -> None:
    """ModernBERT's: byte-level BPE in tokenizer.json alone, whose [MASK] takes the space before it."""
    tokenizer = byte_level(SPECIAL)
    mask = AddedToken("[MASK]", lstrip=True, special=True)
    tokenizer.add_special_tokens({"mask_token": mask})  # pyright: ignore[reportArgumentType]
    tokenizer.save_pretrained(folder)


def unigram_files(folder: Path) -> None:
    """DeBERTa-v3's, converted: Unigram in tokenizer.json, with [MASK] behind the vocabulary."""
    pieces = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "▁a", "▁red", "▁un", "believ", "able", "▁cat", "▁"]
    vocabulary: Any = [(piece, -i / 100) for i, piece in enumerate(pieces)]
    DebertaV2Tokenizer(vocab=vocabulary, unk_id=3).save_pretrained(folder)


def sentencepiece_files(folder: Path) -> None:
    """DeBERTa-v3's on the hub: a model of SentencePiece."""
    format: Any = import_protobuf()
    model = format.ModelProto()
    kinds = {"[PAD]": 3, "[CLS]": 3, "[SEP]": 3, "[UNK]": 2}  # control, unknown
    for i, name in enumerate([*kinds, "▁a", "▁red", "▁un", "believ", "able", "▁cat", "▁"]):
        piece = model.pieces.add()
        piece.piece, piece.score, piece.type = name, -i / 100, kinds.get(name, 1)
    model.trainer_spec.model_type, model.trainer_spec.unk_id = 1, 3
    (folder / "spm.model").write_bytes(model.SerializeToString())
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False, "vocab_type": "spm"}))


FAMILY_FILES = {
    "DistilBERT": ("distilbert", wordpiece_files),
    "ModernBERT": ("modernbert", byte_level_files),
    "DeBERTa-v3": ("deberta-v2", unigram_files),
    "DeBERTa-v3, SentencePiece": ("deberta-v2", sentencepiece_files),
}


@pytest.mark.parametrize("name", FAMILY_FILES)
def test_folder_of_a_family_gives_its_tokenizer_and_whole_words(name: str, tmp_path: Path) -> None:
    tower, write = FAMILY_FILES[name]
    if write is sentencepiece_files:
        pytest.importorskip("sentencepiece", reason="reads the file; pip install 'mmbert[sentencepiece]'")
    AutoConfig.for_model(tower).save_pretrained(tmp_path)
    write(tmp_path)
    processor = MMBertProcessor(load_tokenizer(str(tmp_path)), IMAGES, max_text_length=32)
    tokenizer = processor.tokenizer
    assert (tokenizer.cls_token, tokenizer.sep_token, tokenizer.mask_token, tokenizer.pad_token) == (
        "[CLS]", "[SEP]", "[MASK]", "[PAD]",
    )  # fmt: skip
    ids, continues = processor.encode_words("a unbelievable cat")
    assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    assert continues == [False, False, False, True, True, False, False]
    special = frozenset(tokenizer.all_special_ids)
    masking = Masking(processor.mask_token_id, np.array([ids[1]]), special, probability=0.4, whole_word=True)
    for seed in range(20):
        labels = masking(ids, continues, np.random.default_rng(seed))[1]
        assert len({label != IGNORE_INDEX for label in labels[2:5]}) == 1, "all pieces of the word or none"
    asked = processor.encode_masked("a [MASK] cat")
    assert asked == [ids[0], ids[1], tokenizer.mask_token_id, ids[5], ids[-1]], "as [MASK] stands in training"
    processor.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(str(tmp_path / "saved"))("a unbelievable cat")["input_ids"] == ids


def test_sentencepiece_model_without_the_package_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sentencepiece_files(tmp_path)
    AutoConfig.for_model("deberta-v2").save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)  # as if it were not installed
    with pytest.raises(UsageError, match=r"needs sentencepiece, .* pip install 'mmbert\[sentencepiece\]'\.$"):
        load_tokenizer(str(tmp_path))


BROKEN_FILES = {
    "no merges.txt": ("merges.txt", None, "is neither on the hub nor a folder with one"),
    "an empty merges.txt": ("merges.txt", "", "the file merges.txt is empty"),
    "no vocab.json": ("vocab.json", None, "the folder has no vocabulary"),
    "an empty vocab.json": ("vocab.json", "", "the file vocab.json is empty"),
    "a pointer of Git LFS": ("vocab.json", "version https://git-lfs.github.com/spec/v1\n", "is neither on the hub nor"),
    "special tokens only": (
        "vocab.json",
        '{"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4}',
        "out of vocabulary",
    ),
    "a broken tokenizer.json": ("tokenizer.json", "{}", "is neither on the hub nor a folder with one"),
    "an empty SentencePiece model": ("sentencepiece.bpe.model", "", "the file sentencepiece.bpe.model is empty"),
}


@pytest.mark.parametrize("change", BROKEN_FILES)
def test_tokenizer_folder_with_a_missing_or_broken_file_is_an_error(change: str, tmp_path: Path) -> None:
    folder = bpe_folder(tmp_path)
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.convert_ids_to_tokens(tokenizer("cat")["input_ids"]) == ["<s>", "cat", "</s>"]
    file, content, message = BROKEN_FILES[change]
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises(UsageError, match=message):
        load_tokenizer(str(folder))


def test_tokens_added_to_a_missing_vocabulary_are_no_vocabulary(tmp_path: Path) -> None:
    folder = bert_folder(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(SPECIAL))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<a>": 5, "<b>": 6}))
    with pytest.raises(UsageError, match="special tokens only"):
        load_tokenizer(folder)


def test_vocabulary_that_its_tokenizer_can_not_read_is_an_error(tmp_path: Path) -> None:
    folder = bert_folder(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(["version https://git-lfs.github.com/spec/v1", "oid sha256:0"]))
    with pytest.raises(UsageError, match="recognises none of the 2 words in its own vocabulary"):
        load_tokenizer(folder)


def captions_file(folder: Path, captions: list[str]) -> DataOptions:
    tiny_examples(folder, [("x",)] * len(captions))
    rows = "".join(f"{i}.png,{caption}\n" for i, caption in enumerate(captions))
    (folder / "a.csv").write_text("image,caption\n" + rows)
    return DataOptions(format="csv", annotations=str(folder / "a.csv"), images=str(folder), batch_size=1, num_workers=0)


@pytest.mark.parametrize(
    ("unknown", "outcome"), [(0, "quiet"), (1, "quiet"), (2, "warning"), (5, "warning"), (6, "error")]
)
def test_unknown_words_of_training_captions_are_a_warning_then_an_error(
    unknown: int, outcome: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of 10 words in all, 1 is accepted, 2 to 5 give a warning, 6 an error."""
    words = ["zzz"] * unknown + ["cat"] * (10 - unknown)
    options = captions_file(tmp_path, [" ".join(words[:5]), " ".join(words[5:])])
    if outcome == "error":
        with pytest.raises(UsageError, match=r"turns 60% of the tokens of 2 training texts into \[UNK\]"):
            PairsDataModule(options, tiny_processor(), seed=0)
        return
    with caplog.at_level(logging.WARNING, logger="mmbert"):
        PairsDataModule(options, tiny_processor(), seed=0)
    assert [f"{unknown * 10}%" in r.getMessage() for r in caplog.records] == [True] * (outcome == "warning")


def fast(tokenizer: Tokenizer, names: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """A fast tokenizer with a classifier, separator, mask, padding and unknown token of these names."""
    roles = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **dict(zip(roles, names, strict=True)))


def sentence_piece(pre_tokenizer: Any) -> PreTrainedTokenizerFast:
    """Unigram with "▁" before words, which a pre-tokenizer or only a normalizer sets."""
    pieces = ["<pad>", "<unk>", "<s>", "</s>", "<mask>", "▁a", "▁red", "▁un", "believ", "able", "▁cat", "▁"]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0 - i / 100) for i, piece in enumerate(pieces)], unk_id=1))
    if pre_tokenizer is None:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizer
    special = [("<s>", 2), ("</s>", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    return fast(tokenizer, ("<pad>", "<unk>", "<s>", "</s>", "<mask>"))


def byte_level(
    special: tuple[str, ...] = ("<pad>", "<unk>", "<s>", "</s>", "<mask>"),
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with "Ġ" before words: "un" + "believ" + "able"."""
    merges = [("u", "n"), ("b", "e"), ("l", "i"), ("be", "li"), ("e", "v"), ("beli", "ev"), ("a", "b"), ("l", "e"),
              ("ab", "le"), ("Ġ", "un"), ("Ġ", "c"), ("Ġc", "a"), ("Ġca", "t")]  # fmt: skip
    _, unknown, first, last, _ = special
    entries = [*special, *"unbelivacdrtĠ", *("".join(pair) for pair in merges)]
    vocabulary = {entry: i for i, entry in enumerate(dict.fromkeys(entries))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.RobertaProcessing((last, 3), (first, 2), add_prefix_space=False)
    return fast(tokenizer, special)


KINDS = {
    "Metaspace": lambda: sentence_piece(pre_tokenizers.Metaspace()),
    "Metaspace without splitting": lambda: sentence_piece(pre_tokenizers.Metaspace(split=False)),
    "normalizer only": lambda: sentence_piece(None),
    "byte-level BPE": byte_level,
}


@pytest.mark.parametrize("kind", KINDS)
def test_whole_word_masking_masks_all_tokens_of_a_word(kind: str, tmp_path: Path) -> None:
    processor = MMBertProcessor(KINDS[kind](), IMAGES, max_text_length=32)
    caption = "a unbelievable cat unbelievable red cat"
    ids, continues = processor.encode_words(caption)
    tokens = processor.tokenizer.convert_ids_to_tokens(ids)
    assert ids == processor.encode(caption) and continues[0] is continues[-1] is False
    words = "".join((" " if not more else "") + t.strip("▁Ġ") for t, more in zip(tokens, continues, strict=True))
    assert words.split()[1:-1] == caption.split()

    ordinary = np.arange(5, len(processor.tokenizer))
    masking = Masking(4, ordinary, frozenset(range(5)), probability=0.3, whole_word=True)
    data = Pairs(tiny_examples(tmp_path, [(caption,)]), processor, masking, seed=0, augmentation=Augmentation())
    starts = [i for i, more in enumerate(continues) if not more]
    for epoch in range(40):
        labels = data[epoch, 0].mlm_labels
        for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
            assert len({label != IGNORE_INDEX for label in labels[start:stop]}) == 1


def test_words_of_wordpiece_are_those_of_its_prefix() -> None:
    processor = tiny_processor()
    for text in (
        "playing cats, two dogs.",
        "Cát's [MASK] re\u0301d##ing",
        "qqq playinged \u4e00\u4e8c",
        " a\x0bcats ",
        "",
    ):
        ids, continues = processor.encode_words(text)
        tokens = processor.tokenizer.convert_ids_to_tokens(ids)
        assert ids == processor.encode(text) and continues == [t.startswith("##") for t in tokens]
    assert WORDS[18] == "##ing" and any(processor.encode_words("playing")[1])
