"""Examples to samples to batches: caption choice, masks and augmentation follow from (seed, epoch, sample)."""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmbert.data.examples import Example
from mmbert.data.images import BadImageError
from mmbert.data.masking import Masking
from mmbert.data.processor import MMBertProcessor, pad
from mmbert.data.samples import Augmentation, Samples, Skipped, collate_skipped
from mmbert.model.tokens import IGNORE_INDEX, NO_TEXT
from mmbert.runtime.randomness import mix, numpy_generator, permutation

NO_IMAGE = torch.zeros(0, dtype=torch.uint8)


class Sample(NamedTuple):
    """One pair, ready to be collated."""

    index: int
    input_ids: list[int]
    mlm_input_ids: list[int]
    mlm_labels: list[int]
    pixel_values: Tensor  # (3, S, S) uint8
    wrong_pixel_values: Tensor | None  # (3, S, S) uint8, evaluation only
    image_key: int
    text_key: int
    image_text_keys: tuple[int, ...]
    requested_index: int = -1  # differs from `index` where this sample replaces an unreadable one
    skipped: Skipped = ()  # what it stands in for, and what was tried before: position and why


def text_key(text: str) -> int:
    """63-bit hash of a caption; captions that differ in case or spaces only are equal."""
    normal = " ".join(text.lower().split())
    return int.from_bytes(hashlib.blake2b(normal.encode("utf-8", "surrogatepass"), digest_size=8).digest()) >> 1


class Pairs(Samples):
    """Image-caption pairs of one split.

    For evaluation (without augmentation) each image shows its first caption, the same masks in every epoch, and a wrong
    image (see `wrong_images`).

    Args:
        examples: What a reader found.
        processor: Tokenizer and image settings.
        masking: The MLM rule.
        seed: The run's seed.
        augmentation: See `Samples`.
        skip_unreadable: See `Samples`.
    """

    examples: Sequence[Example]

    def __init__(
        self,
        examples: Sequence[Example],
        processor: MMBertProcessor,
        masking: Masking,
        *,
        seed: int,
        augmentation: Augmentation | None,
        skip_unreadable: bool = False,
    ):
        super().__init__(examples, processor, seed=seed, augmentation=augmentation, skip_unreadable=skip_unreadable)
        self.masking = masking
        self.num_captions = np.array([len(e.captions) for e in examples], dtype=np.int64)
        self.image_keys = [text_key(e.image_id) for e in examples]
        self.text_keys = [tuple(text_key(c) for c in e.captions) for e in examples]
        self.wrong_positions = None if augmentation is not None else wrong_images(self.text_keys, self.image_keys, seed)

    def image_sample(self, size: int) -> frozenset[int]:
        """At most `size` positions, of different images, each with its first caption: a fixed random sample."""
        first = np.unique(np.array(self.image_keys), return_index=True)[1]
        first.sort()
        return frozenset(first[permutation(self.seed, "retrieval sample", 0, len(first))[:size]].tolist())

    def caption_numbers(self, epoch: int) -> np.ndarray:
        """(N,) which caption each image shows in an epoch: every image goes through all of its captions in turn."""
        if self.augmentation is None:
            return np.zeros(len(self), dtype=np.int64)
        start = mix(self.seed, "caption", np.arange(len(self)))
        return ((start + np.uint64(epoch)) % self.num_captions.astype(np.uint64)).astype(np.int64)

    def text_lengths(self, epoch: int) -> np.ndarray:
        """(N,) characters of the captions shown in an epoch; close enough to tokens for grouping."""
        shown = self.caption_numbers(epoch)
        return np.array([len(e.captions[i]) for e, i in zip(self.examples, shown, strict=True)])

    def _empty_sample(self, i: int) -> Sample:
        return Sample(i, [], [], [], NO_IMAGE, None, 0, 0, ())

    def _sample(self, epoch: int, i: int) -> Sample:
        example = self.examples[i]
        number = self._caption_number(epoch, i)
        caption = example.captions[number]
        purpose = "evaluate" if self.augmentation is None else "train"
        ids = self.processor.encode(caption)
        pieces = self.processor.tokenizer.convert_ids_to_tokens(ids)
        continues = [str(piece).startswith("##") for piece in pieces]
        masked, labels = self.masking(ids, continues, numpy_generator(self.seed, f"mask {purpose}", epoch, i))
        image = self._pixel_values(epoch, i, example.image, caption)
        wrong = None if self.wrong_positions is None else self._wrong_pixel_values(i, image)
        return Sample(
            i,
            ids,
            masked,
            labels,
            image,
            wrong,
            self.image_keys[i],
            self.text_keys[i][number],
            self.text_keys[i],
        )

    def _wrong_pixel_values(self, i: int, own: Tensor) -> Tensor:
        assert self.wrong_positions is not None
        try:
            return self.processor.pixel_values(self.examples[self.wrong_positions[i]].image)
        except BadImageError:
            if not self.skip_unreadable:
                raise
            return own  # what the evaluation takes for "there is no wrong image"

    def _caption_number(self, epoch: int, i: int) -> int:
        if self.augmentation is None:
            return 0
        return (int(mix(self.seed, "caption", i)) + epoch) % (1 << 64) % int(self.num_captions[i])


def wrong_images(text_keys: Sequence[tuple[int, ...]], image_keys: Sequence[int], seed: int) -> np.ndarray:
    """Gives every example the image of another one that does not carry its first caption.

    Each image serves as the wrong one for exactly one text, unless equal captions are so many that one describes
    half of the images; then some serve twice. An example without any valid image keeps its own number and is left
    out of ITM by the evaluation.

    Returns:
        (N,) int64 positions.
    """
    count = len(text_keys)
    carried = [set(keys) for keys in text_keys]

    def valid(text: int, image: int) -> bool:
        return image_keys[text] != image_keys[image] and text_keys[text][0] not in carried[image]

    cycle = permutation(seed, "wrong image", 0, count)
    wrong = np.empty(count, dtype=np.int64)
    wrong[cycle] = np.roll(cycle, -1)
    rng = numpy_generator(seed, "repair")
    for text in [t for t in range(count) if not valid(t, int(wrong[t]))]:
        for other in rng.permutation(count)[:1000]:
            if valid(text, int(wrong[other])) and valid(int(other), int(wrong[text])):
                wrong[text], wrong[other] = wrong[other], wrong[text]
                break
        else:
            wrong[text] = next((i for i in rng.permutation(count) if valid(text, int(i))), text)
    return wrong


class Collate:
    """Samples to the batch that `MMBertForPreTraining` and the evaluation take.

    Keys: `index` and `requested_index` (B,); `input_ids`, `attention_mask`, `mlm_input_ids`, `mlm_labels` (B, T) int64;
    `pixel_values` and, in evaluation, `wrong_pixel_values` (B, 3, S, S) uint8, normalised on the device; `image_key`,
    `text_key` (B,) and `image_text_keys` (B, C) int64 hashes. Samples without images are left out. Where some were
    skipped there are also `skipped` (S,) int64 positions and `skip_reasons`, a list of S texts.
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, samples: list[Sample]) -> dict[str, Any]:
        """Pads and stacks."""
        skipped = [entry for sample in samples for entry in sample.skipped]
        samples = [sample for sample in samples if sample.input_ids]
        if not samples:
            return {"index": torch.zeros(0, dtype=torch.int64), **collate_skipped(skipped)}
        input_ids, attention_mask = pad([s.input_ids for s in samples], self.pad_token_id)
        batch = {
            "index": torch.tensor([s.index for s in samples]),
            "requested_index": torch.tensor([s.requested_index for s in samples]),
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "mlm_input_ids": pad([s.mlm_input_ids for s in samples], self.pad_token_id)[0],
            "mlm_labels": pad([s.mlm_labels for s in samples], IGNORE_INDEX)[0],
            "pixel_values": torch.stack([s.pixel_values for s in samples]),
            "image_key": torch.tensor([s.image_key for s in samples]),
            "text_key": torch.tensor([s.text_key for s in samples]),
            "image_text_keys": pad([s.image_text_keys for s in samples], NO_TEXT)[0],
        }
        wrong = [s.wrong_pixel_values for s in samples if s.wrong_pixel_values is not None]
        if wrong:
            batch["wrong_pixel_values"] = torch.stack(wrong)
        return batch | collate_skipped(skipped)
