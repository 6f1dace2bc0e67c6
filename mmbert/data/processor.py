"""Processor: texts to `input_ids` and images to `pixel_values`; saved in a model folder beside the weights."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms
from transformers import AutoProcessor, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from mmbert.data.image_processor import ImageSettings, MMBertImageProcessor, check_tensors
from mmbert.data.images import ImageSource, is_iterable, load_image
from mmbert.data.tokenizers import load_tokenizer
from mmbert.errors import DataError, UsageError, quote
from mmbert.model.configuration import MMBertConfig
from mmbert.model.hub import model_folder

SETTINGS_FILE = "image_settings.json"


class MMBertProcessor(ProcessorMixin):
    """Tokenizer and image settings of one model.

    `processor(text=..., images=...)` returns the model's inputs: `input_ids`, `attention_mask`, `pixel_values`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_settings: ImageSettings, *, max_text_length: int = 64):
        """Combine a tokenizer with image settings.

        Args:
            tokenizer: A tokenizer with [CLS], [SEP] and [PAD], as BERT's, and [MASK] for whatever masks tokens. One
                with tokens for begin and end of a text instead, as CLIP's, gets these as [CLS] and [SEP].
            image_settings: How images are resized and normalised.
            max_text_length: Longer texts are cut, in tokens incl. [CLS] and [SEP].

        Raises:
            UsageError: The tokenizer lacks one of the special tokens.
        """
        for name, other in (("cls_token", "bos_token"), ("sep_token", "eos_token")):
            if getattr(tokenizer, name) is None and getattr(tokenizer, other) is not None:
                setattr(tokenizer, name, getattr(tokenizer, other))
        lacking = [n for n in ("cls_token", "sep_token", "pad_token") if getattr(tokenizer, n) is None]
        if lacking:
            raise UsageError(f"tokenizer '{tokenizer.name_or_path}' has no {', '.join(lacking)}; mmbert needs BERT's.")
        self.tokenizer, self.image_settings, self.max_text_length = tokenizer, image_settings, max_text_length
        self.image_processor = MMBertImageProcessor(image_settings)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.tokenizer!r}, {self.image_settings}, {self.max_text_length} tokens)"

    @property
    def model_input_names(self) -> list[str]:
        """Keys that a call with text and images returns."""
        return ["input_ids", "attention_mask", "pixel_values"]

    def __call__(
        self,
        images: ImageSource | Sequence[ImageSource] | None = None,
        text: str | Sequence[str] | None = None,
        *,
        return_tensors: str = "pt",
        padding: bool | str = True,
        truncation: bool = True,
        max_length: int | None = None,
    ) -> BatchFeature:
        """Prepare texts, images or both.

        Args:
            images: One image (path, bytes, PIL image or array) or an iterable of images.
            text: One text or an iterable of texts.
            return_tensors: Only "pt".
            padding: True or "longest": to the longest text; "max_length": to `max_length` tokens; False: texts of
                different length raise.
            truncation: Truncate texts to `max_length`; False: longer texts raise.
            max_length: Tokens incl. [CLS] and [SEP], at most `max_text_length`; None: that.

        Returns:
            `input_ids` and `attention_mask` (B, T) int64 for texts; `pixel_values` (B, 3, S, S) float for images.

        Raises:
            UsageError: Another kind of tensors than "pt", something else than texts, or an option that is not allowed.
            BadImageError: An image that can't be read.
        """
        check_tensors(return_tensors)
        out: dict[str, Tensor] = {}
        if text is not None:
            length = self.max_text_length if max_length is None else max_length
            if not 2 <= length <= self.max_text_length:
                raise UsageError(f"max_length={max_length}; allowed are 2 to {self.max_text_length} tokens.")
            rows = [
                self._tokenize(t, truncation=truncation, max_length=length)["input_ids"] for t in as_text_list(text)
            ]
            lengths = {len(row) for row in rows}
            if max(lengths, default=0) > length:
                raise UsageError(f"a text has {max(lengths)} tokens, more than {length}; leave truncation=False out.")
            if padding not in (True, False, "longest", "max_length", "do_not_pad"):
                raise UsageError(f"padding={padding!r}; allowed are True, 'longest', 'max_length', False.")
            if padding in (False, "do_not_pad") and len(lengths) > 1:
                raise UsageError(f"texts of {min(lengths)} to {max(lengths)} tokens make no tensor; set padding=True.")
            ids, mask = pad(rows, self.pad_token_id)
            extra = length - ids.shape[1] if padding == "max_length" else 0
            out["input_ids"] = functional.pad(ids, (0, extra), value=self.pad_token_id)
            out["attention_mask"] = functional.pad(mask, (0, extra))
        if images is not None:
            out |= self.image_processor(images)
        return BatchFeature(out)

    @property
    def pad_token_id(self) -> int:
        """Token id of [PAD]."""
        return int(self.tokenizer.pad_token_id)  # pyright: ignore[reportArgumentType]

    @property
    def mask_token_id(self) -> int:
        """Token id of [MASK].

        Raises:
            UsageError: The tokenizer has none.
        """
        if self.tokenizer.mask_token_id is None:
            raise UsageError(f"tokenizer '{self.tokenizer.name_or_path}' has no mask_token, so no word can be masked.")
        return int(self.tokenizer.mask_token_id)  # pyright: ignore[reportArgumentType]

    def has_mask(self, text: str) -> bool:
        """Whether a text has a [MASK]; a tokenizer without it finds none."""
        mask_token = self.tokenizer.mask_token
        return mask_token is not None and str(mask_token) in text

    def encode(self, text: str) -> list[int]:
        """Tokenize a text with [CLS] and [SEP], truncated to `max_text_length`; "[MASK]" in it is ordinary text.

        Raises:
            UsageError: A text with half a surrogate pair, which no tokenizer accepts; readers report its record.
        """
        return self._tokenize(text, truncation=True, max_length=self.max_text_length)["input_ids"]

    def encode_words(self, text: str) -> tuple[list[int], list[bool]]:
        """Tokenize as `encode` does, and find the tokens that continue a word.

        WordPiece, byte-level BPE and SentencePiece mark words differently ("##ing", "Ġred", "▁red"), so a fast
        tokenizer's own word numbers and character offsets are used.

        Returns:
            Token ids, and for each whether it belongs to the word of the token before it.
        """
        if not self.tokenizer.is_fast:
            ids = self.encode(text)
            return ids, [str(token).startswith("##") for token in self.tokenizer.convert_ids_to_tokens(ids)]
        encoding = self._tokenize(text, truncation=True, max_length=self.max_text_length, return_offsets_mapping=True)
        words = encoding.word_ids()
        starts = [start for start, _ in encoding["offset_mapping"]]
        # Where nothing splits a text before SentencePiece, all of it is one "word", and a new one starts with a space.
        continues = [
            i > 0 and word is not None and word == words[i - 1] and not text[starts[i] : starts[i] + 1].isspace()
            for i, word in enumerate(words)
        ]
        return encoding["input_ids"], continues

    def encode_masked(self, text: str) -> list[int]:
        """Tokenize as `encode` does, but turn every "[MASK]" (the tokenizer's mask token) into a mask.

        Raises:
            UsageError: No [MASK] in the text, one behind the tokens that `max_text_length` keeps, or a tokenizer
                without it.
        """
        tokenizer: Any = self.tokenizer
        mask_token_id = self.mask_token_id
        mask_token = tokenizer.mask_token
        texts = text.split(mask_token)
        if getattr(tokenizer.added_tokens_decoder.get(mask_token_id), "lstrip", False):
            texts = [
                *(part.rstrip() for part in texts[:-1]),
                texts[-1],
            ]  # byte-level BPE: the space belongs to the mask
        parts = [self._tokenize(part, add_special_tokens=False, verbose=False)["input_ids"] for part in texts]
        if len(parts) == 1:
            raise UsageError(f"the text {quote(text)} has no {mask_token}; write one for each word to predict.")
        ids = [tokenizer.cls_token_id, *parts[0]]
        for part in parts[1:]:
            ids += [mask_token_id, *part]
        kept = ids[: self.max_text_length - 1]
        if mask_token_id in ids[len(kept) :]:
            raise UsageError(
                f"the text {quote(text)} has {len(ids) + 1} tokens, of which {self.max_text_length} are read: "
                f"a {mask_token} would be cut off. Make it shorter."
            )
        return [*kept, tokenizer.sep_token_id]

    def _tokenize(self, text: str, **options: Any) -> Any:
        """Call the tokenizer; special tokens written in the text are ordinary text."""
        try:
            return self.tokenizer(text, split_special_tokens=True, **options)
        except TypeError as error:
            raise UsageError(f"the text {quote(text)} is no valid Unicode: {error}") from error

    def unknown_fraction(self, texts: Sequence[str]) -> float:
        """Compute the fraction of the texts' tokens that are [UNK]; 0 for a tokenizer without it."""
        unknown = self.tokenizer.unk_token_id
        if unknown is None or not texts:
            return 0.0
        options: Any = {"split_special_tokens": True, "add_special_tokens": False, "verbose": False}
        ids = [token for row in self.tokenizer([*texts], **options)["input_ids"] for token in row]
        return ids.count(unknown) / max(1, len(ids))

    def truncated_fraction(self, texts: Sequence[str]) -> float:
        """Compute the fraction of texts that `encode` truncates."""
        if not texts:
            return 0.0
        rows = self.tokenizer([*texts], split_special_tokens=True, verbose=False)["input_ids"]
        return sum(len(row) > self.max_text_length for row in rows) / len(rows)  # pyright: ignore

    def pixel_values(self, source: ImageSource) -> Tensor:
        """Load an image as (3, S, S) uint8, resized but not normalized."""
        return self.image_settings.resize(self.load(source))

    @staticmethod
    def load(source: ImageSource) -> Tensor:
        """Load an image as (3, H, W) uint8 in its own size."""
        return transforms.pil_to_tensor(load_image(source))

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **options: Any) -> None:
        """Write the tokenizer's files and `image_settings.json`.

        Args:
            save_directory: Created if it is missing.
            push_to_hub: Also upload the folder, as `push_to_hub` does.
            options: Of `push_to_hub`, such as `repo_id`.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        settings = {**asdict(self.image_settings), "max_text_length": self.max_text_length}
        (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        if push_to_hub:
            self.push_to_hub(options.pop("repo_id", folder.name), **options)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoProcessor") -> None:
        """Do nothing: transformers would copy the source of the class into saved folders."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> "MMBertProcessor":
        """Load the files that `save_pretrained` wrote, from a folder or the hub.

        Args:
            pretrained_model_name_or_path: Folder, or a name on the hub.
            options: `revision`, `token` and `cache_dir` of the hub; others that AutoProcessor passes have no effect.

        Raises:
            UsageError: The folder lacks one of them.
            DataError: `image_settings.json` is not what `save_pretrained` wrote.
        """
        folder = model_folder(pretrained_model_name_or_path, **options)
        file = Path(folder) / SETTINGS_FILE
        if not file.is_file():
            raise UsageError(f"'{folder}' is no mmbert model folder: {SETTINGS_FILE} is missing.")
        keys = {"max_text_length", *(field.name for field in fields(ImageSettings))}
        try:
            content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            if content.keys() != keys:
                raise ValueError(f"the keys {', '.join(content)}")
            length = int(content.pop("max_text_length"))
            content["mean"], content["std"] = tuple(content["mean"]), tuple(content["std"])
            settings = ImageSettings(**content)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise DataError(str(file), str(error), f"the keys {', '.join(sorted(keys))} with valid values") from error
        return cls(load_tokenizer(str(folder)), settings, max_text_length=length)


def as_text_list(texts: str | Iterable[str]) -> list[str]:
    """Convert one text or any iterable of texts to a list.

    Raises:
        UsageError: Something else than texts.
    """
    is_single = isinstance(texts, str | bytes | Mapping) or not is_iterable(texts)
    found: list[Any] = [texts] if is_single else [*texts]
    for text in found:
        if not isinstance(text, str):
            raise UsageError(f"{quote(text)} is a {type(text).__name__}; expected a text, or a list of texts.")
    return found


def pad(rows: Sequence[Sequence[int]], value: int) -> tuple[Tensor, Tensor]:
    """Pad lists of ids to the longest one.

    Returns:
        (B, T) int64 ids and (B, T) int64 attention mask.
    """
    longest = max((len(row) for row in rows), default=0)
    ids = torch.full((len(rows), longest), value, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[i, : len(row)] = 1
    return ids, mask


AutoProcessor.register(MMBertConfig, MMBertProcessor)
