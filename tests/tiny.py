"""Models, batches and data small enough to try every claim on: width 32, one or two layers, 16 px images."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mmbert.data.examples import Example
from mmbert.data.image_processor import ImageSettings
from mmbert.data.processor import MMBertProcessor
from mmbert.model.configuration import MMBertConfig
from mmbert.model.tokens import IGNORE_INDEX, NO_BOX, NO_NGRAM, NO_TEXT, Tokens

CLS, SEP, MASK = 2, 3, 4
VOCAB = 40
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = (
    *("a", "the", "on", "in", "of", "and", "two", "red", "blue", "green", "cat", "dog", "bird", "car"),
    *(
        "left",
        "right",
        "bright",
        "play",
        "##ing",
        "##ed",
        "##s",
        "tree",
        "street",
        "sits",
        "runs",
        "small",
        "big",
    ),
)

# Parts of `SelfAttentionLayer` and their names in transformers' `BertLayer`.
BERT_NAMES = {
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.output": "attention.output.dense",
    "attention.norm": "attention.output.LayerNorm",
    "feed_forward.up": "intermediate.dense",
    "feed_forward.down": "output.dense",
    "feed_forward.norm": "output.LayerNorm",
}


def tiny_config(**overrides: Any) -> MMBertConfig:
    """One layer each, 32 wide, an image of 2 x 2 patches; the ViT is narrower, so there is a projection."""
    settings: dict[str, Any] = {
        "fusion": "hybrid",
        "text_layers": 1,
        "image_layers": 1,
        "fusion_layers": 1,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "text_intermediate_size": 48,
        "vocab_size": VOCAB,
        "max_position_embeddings": 16,
        "image_model": "vit_tiny_patch16_224",
        "image_size": 16,
        "patch_size": 8,
        "image_hidden_size": 24,
        "image_num_attention_heads": 2,
        "ngrams": ["red", "red circle", "blue", "two", "small", "left"],
        "box_classes": ["blue square", "red circle", "tree"],
        "objectives": {"mlm": 1.0, "itm": 1.0, "itc": {"weight": 1.0, "embedding_size": 16}},
    }
    return MMBertConfig(**{**settings, **overrides})


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Draws all weights anew, biases, norms and zero-initialised position tables included.

    Fresh models have zero biases and unit norms, behind which many a mistake hides.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
            if parameter.ndim > 1:
                parameter.copy_(noise * 0.1)
            else:
                parameter.add_(noise * 0.1)


def tiny_batch(
    size: int = 4, *, seed: int = 0, length: int = 8, image_size: int = 16, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """A batch with all keys of `mmbert.data.pairs.Collate`, images normalised, texts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [length - i % (length - 3) for i in range(size)]
    input_ids = torch.randint(5, VOCAB, (size, length), generator=generator)
    attention_mask = torch.zeros(size, length, dtype=torch.int64)
    labels = torch.full((size, length), IGNORE_INDEX)
    for i, n in enumerate(lengths):
        input_ids[i, 0], input_ids[i, n - 1], input_ids[i, n:] = CLS, SEP, 0
        attention_mask[i, :n] = 1
        labels[i, 1] = input_ids[i, 1]
    masked = torch.where(labels == IGNORE_INDEX, input_ids, MASK)
    images = torch.randn(size, 3, image_size, image_size, generator=generator, dtype=torch.float64)
    keys = torch.arange(size)
    return {
        "index": keys,
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "mlm_input_ids": masked,
        "mlm_labels": labels,
        "pixel_values": images.to(dtype),
        "image_key": keys + 100,
        "text_key": keys + 200,
        "image_text_keys": torch.stack([keys + 200, torch.full_like(keys, NO_TEXT)], dim=1),
        # A teacher for which each pair is the most similar one, but not by far.
        "teacher_image": 2 * torch.eye(size, 8, dtype=dtype) + 0.1,
        "teacher_text": 2 * torch.eye(size, 8, dtype=dtype) - 0.1,
        "ngram_ids": torch.stack([keys % 6, torch.where(keys % 2 == 0, (keys + 1) % 6, NO_NGRAM)], dim=1),
        # The upper half of each image, and the lower left quarter of every other one.
        "boxes": torch.tensor([[0.0, 0.0, 1.0, 0.5], [0.0, 0.5, 0.5, 1.0]], dtype=dtype).repeat(size, 1, 1),
        "box_classes": torch.stack([keys % 3, torch.where(keys % 2 == 0, (keys + 1) % 3, NO_BOX)], dim=1),
    }


def inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `MMBertModel.forward` takes."""
    return {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}


def random_tokens(mask: list[list[int]], width: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tokens:
    """Random states with the given mask, 1 = real token."""
    real = torch.tensor(mask, dtype=torch.bool)
    states = torch.randn(*real.shape, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Tokens(states.to(dtype), real)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer as BERT's, made on the spot."""
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", SEP), ("[CLS]", CLS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{f"{name.strip('[]').lower()}_token": name for name in SPECIAL},
    )


def tiny_processor(image_size: int = 16, max_text_length: int = 16) -> MMBertProcessor:
    """Tokenizer and image settings for `tiny_config`."""
    settings = ImageSettings(image_size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return MMBertProcessor(tiny_tokenizer(), settings, max_text_length=max_text_length)


def tiny_examples(folder: Path, captions: list[tuple[str, ...]], *, side: int = 16) -> list[Example]:
    """One PNG of noise, of its own, for each tuple of captions."""
    rng = np.random.default_rng(0)
    examples = []
    for i, texts in enumerate(captions):
        file = folder / f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file)
        examples.append(Example(file, texts, f"image {i}", "train", f"test:{i}"))
    return examples


def difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; shapes must be equal."""
    assert a.shape == b.shape
    return (a - b).abs().max().item() if a.numel() else 0.0
