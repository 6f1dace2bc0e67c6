"""Contribution of text and image over a split (MM-SHAP, arXiv:2212.08158): `mmbert evaluate shares`."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track

from mmbert.errors import UsageError, printable
from mmbert.inference.cached_images import evaluation_computation
from mmbert.inference.evaluate.source import align_columns, read_split, split_name
from mmbert.inference.evaluate.task import read_labelled_split
from mmbert.inference.explanation.modality import ModalityShares
from mmbert.inference.explanation.quality import bootstrap_mean
from mmbert.inference.loaded import LoadedModel, load
from mmbert.model.modeling import MMBertForTask
from mmbert.runtime.randomness import permutation


class Pair(NamedTuple):
    """An image with one of its texts."""

    image: Path
    text: str


class ShareReport(dict[str, Any]):
    """Mean shares of text and image over pairs of a split; printed as a table.

    Keys: split, target, pairs, samples; `text` and `image`, the mean shares, and the ends of their 95 % bootstrap
    intervals over pairs, `text_low`, `text_high`, `image_low`, `image_high`; `sampling_error`, the root mean square of
    the standard errors of single pairs.
    """

    def __repr__(self) -> str:
        """Format one row for each modality."""
        rows = [
            [name, f"{self[name]:.4f}", f"{self[f'{name}_low']:.4f} to {self[f'{name}_high']:.4f}"]
            for name in ("text", "image")
        ]
        return "\n".join(
            [
                f"{self['pairs']:,} pairs of split {printable(self['split'])}, target {printable(self['target'])}; "
                f"standard error of a pair by sampling {self['sampling_error']:.4f}",
                "",
                *align_columns([["share", "mean", "95 % interval"], *rows]),
            ]
        )


def evaluate_shares(
    model: LoadedModel | str | Path,
    annotations: str | Path,
    images: str | Path | None = None,
    *,
    format: str = "karpathy",
    split: str | None = None,
    pairs: int = 100,
    samples: int = 16,
    target: str | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    precision: str | None = None,
    **keys: Any,
) -> ShareReport:
    """Compute the mean shares of text and image in a model's scores over pairs of a split.

    Args:
        model: Folder of a saved model, or result of `mmbert.load`; pretrained or fine-tuned.
        annotations: Annotation file, as in `evaluate_retrieval`; for a fine-tuned model as in `evaluate_task`.
        images: Folder of the images.
        format: Format of the file.
        split: Split (default "test") of a file that holds several; else the file is one split.
        pairs: Randomly chosen images, each with one of its texts; all of a smaller split.
        samples: Permutations of tokens and image regions for each pair.
        target: "itm" or "itc"; None: itm if the model has it. A fine-tuned model's is always its answer.
        seed: Seed of the choice and of the permutations.
        device: "cpu", "cuda" ... for a folder; None: the GPU if there is one.
        precision: 32-true, bf16-mixed or 16-mixed. None: that of the run whose folder holds the model, else 32-true.
        **keys: Options of the format's reader, such as `caption_key` or `questions`.

    Raises:
        UsageError: An option that is not allowed, or the model has not the target.
        DataError: Something is wrong with the file, an image or the saved weights.
    """
    if pairs < 1:
        raise UsageError(f"pairs={pairs}: must be 1 or more.")
    loaded = model if isinstance(model, LoadedModel) else load(model, device)
    if isinstance(loaded.model, MMBertForTask):
        if target is not None:
            raise UsageError(f"target='{target}': '{loaded.name}' is fine-tuned, and is explained by its answers.")
        examples = read_labelled_split(annotations, images, format=format, split=split, **keys)
        texts = [(found.images[:1], [found.text]) for found in examples]
        name = split or "test"
    else:
        if target not in (None, "itm", "itc"):
            raise UsageError(f"target='{target}'; allowed are itm, itc.")
        name = split_name(split, has_splits=format == "karpathy" or "split_key" in keys, format=format)
        texts = [([found.image], found.captions) for found in read_split(annotations, images, format, name, keys)]
    texts = [(files[0], of_image) for files, of_image in texts if files]
    chosen = choose_pairs(texts, pairs, seed)
    with evaluation_computation(precision, loaded.core, loaded.name).context():
        found = compute_pair_shares(loaded, chosen, target=target, samples=samples, seed=seed)
    text = bootstrap_mean([shares.text for shares in found], seed=seed)
    return ShareReport(
        split=name,
        target=target or (found[0].target if found[0].target in ("itm", "itc") else "answer"),
        pairs=len(found),
        samples=samples,
        text=text.mean,
        text_low=text.low,
        text_high=text.high,
        image=1 - text.mean,
        image_low=1 - text.high,
        image_high=1 - text.low,
        sampling_error=math.sqrt(sum(shares.standard_error**2 for shares in found) / len(found)),
    )


def choose_pairs(texts: Sequence[tuple[Path, Sequence[str]]], count: int, seed: int) -> list[Pair]:
    """Choose images at random, and one text of each, so that the pairs are independent.

    Args:
        texts: Images with their texts.
        count: Number of pairs, at most; an image that occurs several times is chosen once.
        seed: Seed of both choices.

    Returns:
        The pairs in the order of `texts`.
    """
    of_image: dict[Path, list[str]] = {}
    for image, own in texts:
        of_image.setdefault(image, []).extend(own)
    images = [*of_image]
    rows = sorted(permutation(seed, "images of shares", 0, len(images))[:count].tolist())
    return [Pair(images[row], _one_of(of_image[images[row]], seed, row)) for row in rows]


def _one_of(texts: Sequence[str], seed: int, row: int) -> str:
    return texts[int(permutation(seed, "texts of shares", row, len(texts))[0])]


def compute_pair_shares(
    model: LoadedModel, pairs: Sequence[Pair], *, target: str | None = None, samples: int = 16, seed: int = 0
) -> list[ModalityShares]:
    """Compute the shares of each pair, with a progress bar on a terminal; see `LoadedModel.modality_shares`."""
    console = Console(stderr=True)
    shown = track(pairs, "pairs", console=console, disable=not sys.stderr.isatty(), transient=True)
    return [model.modality_shares(image, text, target, samples=samples, seed=seed) for image, text in shown]
