"""Labelled examples of a task as samples and batches."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmbert.data.images import BadImageError
from mmbert.data.processor import MMBertProcessor, pad
from mmbert.data.readers.labelled import LabelledExample
from mmbert.data.samples import Augmentation, Samples, Skipped, collate_skipped, stack_images
from mmbert.runtime.randomness import permutation


class LabelledSample(NamedTuple):
    """One labelled text with its images, ready to be collated."""

    index: int
    input_ids: list[int]
    pixel_values: tuple[Tensor, ...]  # (3, S, S) uint8 each, or (P, W) hidden states of the encoder cache
    wrong_pixel_values: tuple[Tensor, ...]  # of another example, in evaluation; empty if there is none
    scores: Mapping[int, float]  # label -> score from 0 to 1
    requested_index: int = -1  # differs from `index` where this sample replaces an unreadable one
    skipped: Skipped = ()


class LabelledSamples(Samples):
    """Data set of labelled texts with their images.

    In evaluation (without augmentation) each sample also has the images of another one, see `shuffled_images`.

    Args:
        examples: Labelled examples.
        scores: One mapping for each example: label -> score from 0 to 1.
        processor: Tokenizer and image settings.
        seed: The run's seed.
        augmentation: See `Samples`.
        skip_unreadable: See `Samples`.
    """

    examples: Sequence[LabelledExample]

    def __init__(
        self,
        examples: Sequence[LabelledExample],
        scores: Sequence[Mapping[int, float]],
        processor: MMBertProcessor,
        *,
        seed: int,
        augmentation: Augmentation | None,
        skip_unreadable: bool = False,
    ):
        super().__init__(examples, processor, seed=seed, augmentation=augmentation, skip_unreadable=skip_unreadable)
        self.scores = scores
        self.wrong_positions = None if augmentation is not None else shuffled_images(examples, seed)

    def text_lengths(self, epoch: int) -> np.ndarray:
        """Return the (N,) lengths of the texts in characters; the same in every epoch."""
        return np.array([len(e.text) for e in self.examples])

    def _sample(self, epoch: int, i: int) -> LabelledSample:
        example = self.examples[i]
        (texts,) = self._texts(example)
        images = tuple(self._image(epoch, i, image, texts) for image in example.images)
        wrong = () if self.wrong_positions is None else self._wrong_pixel_values(i)
        return LabelledSample(i, self.processor.encode(example.text), images, wrong, self.scores[i])

    def _image_files(self, example: LabelledExample) -> tuple[Path, ...]:
        return example.images

    def _texts(self, example: LabelledExample) -> tuple[str, ...]:
        return (" ".join((example.text, *example.answers)),)  # "Which side? left" must not be mirrored either

    def _wrong_pixel_values(self, i: int) -> tuple[Tensor, ...]:
        assert self.wrong_positions is not None
        if self.wrong_positions[i] == i:
            return ()
        try:
            return tuple(self._plain_image(image) for image in self.examples[self.wrong_positions[i]].images)
        except BadImageError:
            if not self.skip_unreadable:
                raise
            return ()

    def _empty_sample(self, i: int) -> LabelledSample:
        return LabelledSample(i, [], (), (), {})


def shuffled_images(examples: Sequence[LabelledExample], seed: int) -> np.ndarray:
    """Choose for every example one with other images; all examples of an image get the same one.

    Returns:
        (N,) int64 positions; an example's own where all examples have the same images, or none.
    """
    first: dict[Any, int] = {}
    for i, example in enumerate(examples):
        first.setdefault(example.images, i)
    keys = list(first)
    cycle = permutation(seed, "wrong image", 0, len(keys))
    follows = {keys[a]: first[keys[b]] for a, b in zip(cycle, np.roll(cycle, -1), strict=True)}
    return np.array([follows[e.images] if len(keys) > 1 else i for i, e in enumerate(examples)], dtype=np.int64)


class CollateLabelled:
    """Collate labelled samples to a batch for `MMBertForTask` and its evaluation.

    Keys: `index`, `requested_index` (B,) int64; `input_ids`, `attention_mask` (B, T) int64; `label_scores` (B, labels);
    where texts have N images each `pixel_values` (B * N, 3, S, S) uint8, those of a text in a row, and in evaluation
    `wrong_pixel_values` of the same shape with `has_wrong` (B,) bool; with an encoder cache `image_hidden_states` and
    `wrong_image_hidden_states` (B * N, P, W) instead; with wrong images also the digests of both, see `stack_images`.
    Samples without images that should have some are left out;
    `skipped` and `skip_reasons` as in `Collate`.
    """

    def __init__(self, pad_token_id: int, labels: int):
        self.pad_token_id, self.labels = pad_token_id, labels

    def __call__(self, samples: list[LabelledSample]) -> dict[str, Any]:
        """Pad and stack."""
        skipped = [entry for sample in samples for entry in sample.skipped]
        samples = [sample for sample in samples if sample.input_ids]
        if not samples:
            return {"index": torch.zeros(0, dtype=torch.int64), **collate_skipped(skipped)}
        input_ids, attention_mask = pad([s.input_ids for s in samples], self.pad_token_id)
        scores = torch.zeros(len(samples), self.labels)
        for row, sample in enumerate(samples):
            for label, score in sample.scores.items():
                scores[row, label] = score
        batch = {
            "index": torch.tensor([s.index for s in samples]),
            "requested_index": torch.tensor([s.requested_index for s in samples]),
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "label_scores": scores,
        }
        if samples[0].pixel_values:
            batch["has_wrong"] = torch.tensor([bool(s.wrong_pixel_values) for s in samples])
            has_wrong = bool(batch["has_wrong"].any())
            batch |= stack_images([p for s in samples for p in s.pixel_values], with_digest=has_wrong)
            if has_wrong:
                wrong = [p for s in samples for p in s.wrong_pixel_values or s.pixel_values]
                batch |= stack_images(wrong, "wrong_", with_digest=True)
        return batch | collate_skipped(skipped)
