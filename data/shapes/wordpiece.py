"""The tokenizer of the embedded data set, in the files that `transformers.AutoTokenizer` reads."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

MAX_VOCABULARY = 400
SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def write_tokenizer(folder: Path, texts: Iterable[str]) -> int:
    """Writes a lower-casing BERT WordPiece tokenizer whose vocabulary is the words of `texts`.

    The vocabulary is the special tokens, the characters, and the words by falling frequency. (With so few
    words there is nothing to learn, and the library's trainer may number pieces differently in every run.)

    Returns:
        The size of the vocabulary.
    """
    characters = "abcdefghijklmnopqrstuvwxyz0123456789"
    counts = Counter(word for text in texts for word in re.findall(r"[a-z]{2,}", text.lower()))
    words = sorted(counts, key=lambda word: (-counts[word], word))
    pieces = [*SPECIAL_TOKENS.values(), *".,:;?!'\"-()", *characters, *("##" + c for c in characters), *words]
    vocabulary = {piece: number for number, piece in enumerate(pieces[:MAX_VOCABULARY])}

    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS.values()))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    tokenizer.decoder = decoders.WordPiece()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": True,
        "model_max_length": 512,
        **SPECIAL_TOKENS,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return len(vocabulary)
