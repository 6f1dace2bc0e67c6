"""`MMBertProcessor`: texts to token ids and images to pixel values, with everything a shared model folder needs."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data.config import resolve_data_config
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mmbert.data.images import ImageSource, load_image
from mmbert.errors import UsageError, quote

SETTINGS_FILE = "image_settings.json"


@dataclass(frozen=True)
class ImageSettings:
    """How an image becomes numbers: what timm states for the encoder."""

    image_size: int
    """Side of the square that the whole image is resized to, in pixels."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"

    @classmethod
    def of_timm(cls, pretrained_cfg: dict[str, Any], image_size: int) -> "ImageSettings":
        """Reads timm's statement about a model; see `timm.data.resolve_data_config`."""
        facts = resolve_data_config(pretrained_cfg=pretrained_cfg)
        return cls(image_size, tuple(facts["mean"]), tuple(facts["std"]), facts["interpolation"])

    def resize(self, image: Tensor) -> Tensor:
        """(3, H, W) uint8 to (3, S, S) uint8. The aspect ratio is not kept: captions speak of the edges too."""
        side = self.image_size
        if image.shape[-2:] == (side, side):
            return image
        return transforms.resize(
            image, [side, side], interpolation=InterpolationMode(self.interpolation), antialias=True
        )

    def normalize(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 to float, with the encoder's mean and standard deviation."""
        return transforms.normalize(transforms.to_dtype(images, torch.float32, scale=True), [*self.mean], [*self.std])


class MMBertProcessor:
    """Tokenizer and image settings of one model.

    `processor(text=..., images=...)` gives what the models take: `input_ids`, `attention_mask`, `pixel_values`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_settings: ImageSettings, *, max_text_length: int = 64):
        """Bundles the parts.

        Args:
            tokenizer: A BERT-like tokenizer with [CLS], [SEP], [MASK] and [PAD].
            image_settings: How images are resized and normalised.
            max_text_length: Longer texts are cut, in tokens incl. [CLS] and [SEP].

        Raises:
            UsageError: The tokenizer lacks one of the special tokens.
        """
        lacking = [n for n in ("cls_token", "sep_token", "mask_token", "pad_token") if getattr(tokenizer, n) is None]
        if lacking:
            raise UsageError(f"tokenizer '{tokenizer.name_or_path}' has no {', '.join(lacking)}; mmbert needs BERT's.")
        self.tokenizer, self.image_settings, self.max_text_length = tokenizer, image_settings, max_text_length

    def __call__(
        self,
        *,
        text: str | Sequence[str] | None = None,
        images: ImageSource | Sequence[ImageSource] | None = None,
        return_tensors: str = "pt",
    ) -> dict[str, Tensor]:
        """Prepares texts, images or both.

        Args:
            text: One text or several.
            images: One image or several: path, bytes, PIL image or array.
            return_tensors: Only "pt".

        Returns:
            `input_ids` and `attention_mask` (B, T) int64 for texts; `pixel_values` (B, 3, S, S) float for images.

        Raises:
            UsageError: Another kind of tensors than "pt".
            BadImageError: An image that can't be read.
        """
        if return_tensors != "pt":
            raise UsageError(f"return_tensors='{return_tensors}'; only 'pt' is there.")
        out: dict[str, Tensor] = {}
        if text is not None:
            rows = [self.encode(t) for t in ([text] if isinstance(text, str) else text)]
            out["input_ids"], out["attention_mask"] = pad(rows, self.pad_token_id)
        if images is not None:
            several: Any = images if isinstance(images, list | tuple) else [images]
            out["pixel_values"] = self.image_settings.normalize(torch.stack([self.pixel_values(p) for p in several]))
        return out

    @property
    def pad_token_id(self) -> int:
        """Id of [PAD]."""
        return int(self.tokenizer.pad_token_id)  # pyright: ignore[reportArgumentType]

    @property
    def mask_token_id(self) -> int:
        """Id of [MASK]."""
        return int(self.tokenizer.mask_token_id)  # pyright: ignore[reportArgumentType]

    def encode(self, text: str) -> list[int]:
        """Token ids with [CLS] and [SEP], cut to `max_text_length`. "[MASK]" in a text is text, no special token.

        Raises:
            UsageError: A text with half a surrogate pair, which no tokenizer takes; readers refuse it with its record.
        """
        return self._ids(text, truncation=True, max_length=self.max_text_length)

    def encode_masked(self, text: str) -> list[int]:
        """As `encode`, but every "[MASK]" (the tokenizer's mask token, as it is written) is a mask.

        Raises:
            UsageError: No [MASK] in the text, or one behind the tokens that `max_text_length` keeps.
        """
        tokenizer: Any = self.tokenizer
        written = tokenizer.mask_token
        parts = [self._ids(part, add_special_tokens=False, verbose=False) for part in text.split(written)]
        if len(parts) == 1:
            raise UsageError(f"the text {quote(text)} has no {written}; write it in place of each word to be guessed.")
        ids = [tokenizer.cls_token_id, *parts[0]]
        for part in parts[1:]:
            ids += [self.mask_token_id, *part]
        kept = ids[: self.max_text_length - 1]
        if self.mask_token_id in ids[len(kept) :]:
            raise UsageError(
                f"the text {quote(text)} has {len(ids) + 1} tokens, of which {self.max_text_length} are read: "
                f"a {written} would be cut off. Make it shorter."
            )
        return [*kept, tokenizer.sep_token_id]

    def _ids(self, text: str, **options: Any) -> list[int]:
        """Token ids; what looks like a special token is text."""
        try:
            return self.tokenizer(text, split_special_tokens=True, **options)["input_ids"]  # pyright: ignore
        except TypeError as error:
            raise UsageError(f"the text {quote(text)} is no valid Unicode: {error}") from error

    def truncated_fraction(self, texts: Sequence[str]) -> float:
        """Fraction of texts that `encode` cuts."""
        if not texts:
            return 0.0
        rows = self.tokenizer([*texts], split_special_tokens=True, verbose=False)["input_ids"]
        return sum(len(row) > self.max_text_length for row in rows) / len(rows)  # pyright: ignore

    def pixel_values(self, source: ImageSource) -> Tensor:
        """(3, S, S) uint8, resized but not normalised."""
        return self.image_settings.resize(self.load(source))

    @staticmethod
    def load(source: ImageSource) -> Tensor:
        """(3, H, W) uint8 in the image's own size."""
        return transforms.pil_to_tensor(load_image(source))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the tokenizer's files and `image_settings.json`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        settings = {**asdict(self.image_settings), "max_text_length": self.max_text_length}
        (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "MMBertProcessor":
        """Reads what `save_pretrained` wrote.

        Raises:
            UsageError: The folder holds no such files.
        """
        file = Path(folder) / SETTINGS_FILE
        if not file.is_file():
            raise UsageError(f"'{folder}' is no mmbert model folder: {SETTINGS_FILE} is missing.")
        settings = json.loads(file.read_text())
        length = settings.pop("max_text_length")
        settings["mean"], settings["std"] = tuple(settings["mean"]), tuple(settings["std"])
        return cls(load_tokenizer(str(folder)), ImageSettings(**settings), max_text_length=length)


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Loads a tokenizer from the hub or a folder; never runs code that comes with it.

    Raises:
        UsageError: Nothing there.
    """
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"tokenizer '{source}' is neither on the hub nor a folder with one: {reason}") from error


def pad(rows: Sequence[Sequence[int]], value: int) -> tuple[Tensor, Tensor]:
    """Pads lists of ids to the longest: (B, T) int64 ids and (B, T) int64 attention mask."""
    longest = max((len(row) for row in rows), default=0)
    ids = torch.full((len(rows), longest), value, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[i, : len(row)] = 1
    return ids, mask
