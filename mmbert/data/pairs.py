"""Image-caption pairs as samples and batches; captions, masks and augmentation depend on (seed, epoch, sample)."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmbert.data.boxes import ImageBoxes, place_boxes
from mmbert.data.edits import CaptionEdits
from mmbert.data.examples import Example
from mmbert.data.images import BadImageError
from mmbert.data.masking import Masking
from mmbert.data.ngrams import image_ngrams
from mmbert.data.processor import MMBertProcessor, pad
from mmbert.data.samples import Augmentation, Samples, Skipped, collate_skipped, stack_images
from mmbert.model.tokens import IGNORE_INDEX, NO_BOX, NO_NGRAM, NO_TEXT
from mmbert.runtime.randomness import mix, numpy_generator, permutation

NO_IMAGE = torch.zeros(0, dtype=torch.uint8)
MAX_ENCODED = 200_000
"""Captions, at most, whose token ids are kept for further epochs (about 50 MB)."""
MAX_COUNTED = 10_000
"""Images, at most, in whose captions tokens are counted."""


class Sample(NamedTuple):
    """One image-caption pair, ready to be collated."""

    index: int
    input_ids: list[int]
    mlm_input_ids: list[int]
    mlm_labels: list[int]
    pixel_values: Tensor  # (3, S, S) uint8, or (P, W) hidden states of the encoder cache
    wrong_pixel_values: Tensor | None  # the same, evaluation only
    image_key: int
    text_key: int
    image_text_keys: tuple[int, ...]
    ngram_ids: tuple[int, ...] | None = None  # only with the objective ngrams
    edited_input_ids: list[int] | None = None  # only with edited captions; `input_ids` where there is no edit
    teacher_vectors: tuple[Tensor, Tensor] | None = None  # (E,) of image and text, only with the objective distill
    boxes: ImageBoxes | None = None  # as the image is augmented, only with the objective boxes
    requested_index: int = -1  # differs from `index` where this sample replaces an unreadable one
    skipped: Skipped = ()  # the unreadable samples that it replaces


def text_key(text: str) -> int:
    """Hash a caption to 63 bits; captions that differ in case or spaces only are equal."""
    return image_key(" ".join(text.lower().split()))


def image_key(image_id: str) -> int:
    """Hash an image id to 63 bits; ids that differ in case only ("a0.png", "A0.png") are different images."""
    return int.from_bytes(hashlib.blake2b(image_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()) >> 1


class Pairs(Samples):
    """Data set of the image-caption pairs of one split.

    In evaluation (without augmentation) a sample has the image's first caption, the same masks in every epoch, and a
    wrong image (see `wrong_images`).

    Args:
        examples: Images with their captions.
        processor: Tokenizer and image settings.
        masking: The masking rule of MLM.
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
        self.ngram_ids: list[tuple[int, ...]] | None = None
        """Numbers of the n-grams in the captions of each image, with the objective ngrams."""
        self.boxes: Sequence[ImageBoxes] | None = None
        """Boxes of each image, with the objective boxes."""
        self.edits: CaptionEdits | None = None
        self.teacher: Callable[[Path, str], tuple[Tensor, Tensor]] | None = None
        """Gives the vectors of the teacher, with the objective distill; see `TeacherVectors`."""
        self.edited_fraction = 0.0
        self._encoded: dict[str, tuple[int, ...]] = {}
        self.num_captions = np.array([len(e.captions) for e in examples], dtype=np.int64)
        self.image_keys = [image_key(e.image_id) for e in examples]
        self.text_keys = [tuple(text_key(c) for c in e.captions) for e in examples]
        self.wrong_positions = None if augmentation is not None else wrong_images(self.text_keys, self.image_keys, seed)

    def use_ngrams(self, names: Sequence[str]) -> None:
        """Put the n-grams of each image's captions into its samples, for the objective ngrams."""
        self.ngram_ids = image_ngrams(self.examples, names)

    def use_edits(self, edits: CaptionEdits, fraction: float) -> None:
        """Put edited captions into a fraction of the samples, for the objective itm."""
        self.edits, self.edited_fraction = edits, fraction

    def token_counts(self, vocab_size: int) -> Tensor:
        """Count the tokens that may be masked in the captions of at most `MAX_COUNTED` images, (V,) int64."""
        ids = [
            token
            for i in permutation(self.seed, "token counts", 0, len(self))[:MAX_COUNTED]
            for caption in self.examples[i].captions
            for token in self._encode(caption)
        ]
        counts = torch.bincount(torch.tensor(ids), minlength=vocab_size)
        allowed = self.masking.content_ids
        unused = set(range(vocab_size)) - allowed if allowed is not None else self.masking.special_ids
        counts[[*unused]] = 0
        return counts

    def image_sample(self, size: int) -> frozenset[int]:
        """Draw a fixed random sample of at most `size` positions of different images."""
        first = np.unique(np.array(self.image_keys), return_index=True)[1]
        first.sort()
        return frozenset(first[permutation(self.seed, "retrieval sample", 0, len(first))[:size]].tolist())

    def caption_numbers(self, epoch: int) -> np.ndarray:
        """Choose the caption of each image in an epoch; over the epochs an image cycles through all its captions.

        Returns:
            (N,) int64 indices of captions.
        """
        if self.augmentation is None:
            return np.zeros(len(self), dtype=np.int64)
        start = mix(self.seed, "caption", np.arange(len(self)))
        return ((start + np.uint64(epoch)) % self.num_captions.astype(np.uint64)).astype(np.int64)

    def text_lengths(self, epoch: int) -> np.ndarray:
        """Return the (N,) lengths of an epoch's captions in characters, close enough to tokens for grouping."""
        numbers = self.caption_numbers(epoch)
        return np.array([len(e.captions[i]) for e, i in zip(self.examples, numbers, strict=True)])

    def _empty_sample(self, i: int) -> Sample:
        return Sample(i, [], [], [], NO_IMAGE, None, 0, 0, ())

    def _sample(self, epoch: int, i: int) -> Sample:
        example = self.examples[i]
        number = self._caption_number(epoch, i)
        caption = example.captions[number]
        purpose = "evaluate" if self.augmentation is None else "train"
        if self.masking.whole_word:
            ids, continues = self.processor.encode_words(caption)
        else:
            ids, continues = self._encode(caption), ()
        masked, labels = self.masking(ids, continues, numpy_generator(self.seed, f"mask {purpose}", epoch, i))
        # The labels of ngrams are of all captions of the image, so each of them may forbid mirroring it.
        texts = caption if self.ngram_ids is None else "\n".join(example.captions)
        pixel_values, placement = self._placed_image(epoch, i, example.image, texts)
        wrong = None if self.wrong_positions is None else self._wrong_pixel_values(i, pixel_values)
        return Sample(
            i,
            ids,
            masked,
            labels,
            pixel_values,
            wrong,
            self.image_keys[i],
            self.text_keys[i][number],
            self.text_keys[i],
            None if self.ngram_ids is None else self.ngram_ids[i],
            None if self.edits is None else self._edited(self.edits, epoch, i, ids),
            None if self.teacher is None else self.teacher(example.image, caption),
            None if self.boxes is None else place_boxes(self.boxes[i], placement),
        )

    def _encode(self, caption: str) -> list[int]:
        """Tokenize a caption once for all epochs."""
        ids = self._encoded.get(caption)
        if ids is None:
            ids = tuple(self.processor.encode(caption))
            if len(self._encoded) < MAX_ENCODED:
                self._encoded[caption] = ids
        return [*ids]

    def _edited(self, edits: CaptionEdits, epoch: int, i: int, ids: list[int]) -> list[int]:
        rng = numpy_generator(self.seed, "edited caption", epoch, i)
        if rng.random() >= self.edited_fraction:
            return ids
        own = {tuple(self._encode(caption)) for caption in self.examples[i].captions}
        edited = edits(ids, own, rng)
        if edited is None or self._decoded_key(edited) in map(self._decoded_key, own):
            return ids  # a cased tokenizer has other tokens for "Red" and "red", which are equal texts
        return edited

    def _decoded_key(self, ids: Sequence[int]) -> int:
        """Hash the text of token ids; not a caption's `text_key` where the tokenizer changes spaces or accents."""
        return text_key(str(self.processor.tokenizer.decode([*ids], clean_up_tokenization_spaces=False)))

    def _wrong_pixel_values(self, i: int, own: Tensor) -> Tensor:
        assert self.wrong_positions is not None
        try:
            return self._plain_image(self.examples[self.wrong_positions[i]].image)
        except BadImageError:
            if not self.skip_unreadable:
                raise
            return own  # evaluation then treats the sample as one without a wrong image

    def _image_files(self, example: Example) -> tuple[Path, ...]:
        return (example.image,)

    def _texts(self, example: Example) -> tuple[str, ...]:
        return example.captions

    def _caption_number(self, epoch: int, i: int) -> int:
        if self.augmentation is None:
            return 0
        return (int(mix(self.seed, "caption", i)) + epoch) % (1 << 64) % int(self.num_captions[i])


def wrong_images(text_keys: Sequence[tuple[int, ...]], image_keys: Sequence[int], seed: int) -> np.ndarray:
    """Choose a wrong image for every example: one of another example that does not have its first caption.

    Each image is the wrong one of exactly one text, unless one caption describes half of the images or more; then
    some are used twice. An example without any valid image keeps its own position, and evaluation leaves it out of ITM.

    Args:
        text_keys: Hashes of each example's captions.
        image_keys: Hash of each example's image id.
        seed: The run's seed.

    Returns:
        (N,) int64 positions.
    """
    count = len(text_keys)
    captions_of = [set(keys) for keys in text_keys]

    def valid(text: int, image: int) -> bool:
        return image_keys[text] != image_keys[image] and text_keys[text][0] not in captions_of[image]

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
    """Collate samples to a batch for `MMBertForPreTraining` and its evaluation.

    Keys: `index` and `requested_index` (B,); `input_ids`, `attention_mask`, `mlm_input_ids`, `mlm_labels` (B, T) int64;
    `pixel_values` (B, 3, S, S) uint8, normalised on the device, or with an encoder cache `image_hidden_states`
    (B, P, W); in evaluation also wrong images (prefix `wrong_`) and digests of both (`stack_images`); `image_key`,
    `text_key` (B,) and `image_text_keys` (B, C) int64 hashes; with the objective ngrams `ngram_ids` (B, G), padded with
    `NO_NGRAM`; with edited captions `edited_input_ids` (B, T) and `is_edited` (B,) bool; with the objective distill
    `teacher_image` and `teacher_text` (B, E); with the objective boxes `boxes` (B, N, 4), see `ImageBoxes`, and
    `box_classes` (B, N) int64, padded with `NO_BOX`. Samples without images are
    left out. If some were skipped, there are also `skipped` (S,) int64 positions and `skip_reasons`, a list of S texts.
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, samples: list[Sample]) -> dict[str, Any]:
        """Pad and stack."""
        skipped = [entry for sample in samples for entry in sample.skipped]
        samples = [sample for sample in samples if sample.input_ids]
        if not samples:
            return {"index": torch.zeros(0, dtype=torch.int64), **collate_skipped(skipped)}
        input_ids, attention_mask = pad([s.input_ids for s in samples], self.pad_token_id)
        wrong = [s.wrong_pixel_values for s in samples if s.wrong_pixel_values is not None]
        batch = {
            "index": torch.tensor([s.index for s in samples]),
            "requested_index": torch.tensor([s.requested_index for s in samples]),
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "mlm_input_ids": pad([s.mlm_input_ids for s in samples], self.pad_token_id)[0],
            "mlm_labels": pad([s.mlm_labels for s in samples], IGNORE_INDEX)[0],
            **stack_images([s.pixel_values for s in samples], with_digest=bool(wrong)),
            "image_key": torch.tensor([s.image_key for s in samples]),
            "text_key": torch.tensor([s.text_key for s in samples]),
            "image_text_keys": pad([s.image_text_keys for s in samples], NO_TEXT)[0],
        }
        ngram_ids = [s.ngram_ids for s in samples if s.ngram_ids is not None]
        if ngram_ids:
            batch["ngram_ids"] = pad(ngram_ids, NO_NGRAM)[0]
        edited = [s.edited_input_ids for s in samples if s.edited_input_ids is not None]
        if edited:
            batch["edited_input_ids"] = pad(edited, self.pad_token_id)[0]
            batch["is_edited"] = (batch["edited_input_ids"] != input_ids).any(dim=1)
        teacher = [s.teacher_vectors for s in samples if s.teacher_vectors is not None]
        if teacher:
            batch["teacher_image"], batch["teacher_text"] = map(torch.stack, zip(*teacher, strict=True))
        boxes = [s.boxes for s in samples if s.boxes is not None]
        if boxes:
            batch["boxes"] = pad_sequence([torch.from_numpy(b.corners) for b in boxes], batch_first=True)
            classes = [torch.from_numpy(b.classes) for b in boxes]
            batch["box_classes"] = pad_sequence(classes, batch_first=True, padding_value=NO_BOX)
        if wrong:
            batch |= stack_images(wrong, "wrong_", with_digest=True)
        return batch | collate_skipped(skipped)
