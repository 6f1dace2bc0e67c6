"""Loading a tokenizer that has its vocabulary, or none."""

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mmbert.errors import UsageError

VOCABULARY_FILES = (
    "tokenizer.json", "vocab.txt", "vocab.json", "spm.model", "spiece.model", "sentencepiece.bpe.model",
    "tokenizer.model",
)  # fmt: skip
"""Files that hold a tokenizer's vocabulary; a folder with a tokenizer has one of them."""
MERGES_FILE = "merges.txt"
"""Second file of a BPE tokenizer: without it every word is read letter by letter."""


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer from the hub or a folder; never runs code that comes with it.

    Raises:
        UsageError: There is no tokenizer, or one without a vocabulary: transformers gives such a folder a tokenizer
            that knows the special tokens only and turns every word into [UNK].
    """
    folder = Path(source)
    if folder.is_dir() and not any((folder / name).is_file() for name in VOCABULARY_FILES):
        raise UsageError(
            f"tokenizer '{source}': the folder has no vocabulary; expected one of {', '.join(VOCABULARY_FILES)}. "
            "Copy the tokenizer's files into it, or name another tokenizer by data.tokenizer."
        )
    for name in (*VOCABULARY_FILES, MERGES_FILE):
        if (folder / name).is_file() and (folder / name).stat().st_size == 0:
            raise UsageError(f"tokenizer '{source}': the file {name} is empty; copy the tokenizer's files again.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exception for a broken file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if "tiktoken" in reason and find_spec("sentencepiece") is None:  # what transformers tries next
            raise UsageError(
                f"tokenizer '{source}' is a SentencePiece model without tokenizer.json and needs sentencepiece, which "
                "is not installed: pip install 'mmbert[sentencepiece]'."
            ) from error
        raise UsageError(f"tokenizer '{source}' is neither on the hub nor a folder with one: {reason}") from error
    vocabulary = tokenizer.get_vocab()
    words = vocabulary.keys() - {*tokenizer.all_special_tokens} - tokenizer.get_added_vocab().keys()
    if not words:
        raise UsageError(
            f"tokenizer '{source}' knows its {len(vocabulary)} special tokens only, so every word would be "
            f"{tokenizer.unk_token}: its vocabulary file is missing or empty; name another by data.tokenizer."
        )
    if not _reads_its_words(tokenizer, words):
        raise UsageError(
            f"tokenizer '{source}' recognises none of the {len(words)} words in its own vocabulary: a file of it is "
            "missing or of another tokenizer; name another by data.tokenizer."
        )
    return tokenizer


def _reads_its_words(tokenizer: PreTrainedTokenizerBase, words: Iterable[str]) -> bool:
    """Whether any of the first 1,000 words in a tokenizer's vocabulary, written as text, gives a known token."""
    texts = [tokenizer.convert_tokens_to_string([word]).strip() for word in sorted(words)[:1000]]
    try:
        found: Any = tokenizer([text for text in texts if text] or [""], add_special_tokens=False, verbose=False)
    except Exception:  # as in `load_tokenizer`: a vocabulary without [UNK]
        return False
    return any(token != tokenizer.unk_token_id for row in found["input_ids"] for token in row)
