"""Rank the images and captions of a split with a saved model: `mmbert evaluate retrieval`."""

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmbert.data.processor import MMBertProcessor
from mmbert.errors import UsageError
from mmbert.evaluation.closed_form import closed_form_candidates
from mmbert.evaluation.encoding import encode
from mmbert.evaluation.itc_weight import choose_itc_weight
from mmbert.evaluation.retrieval import (
    REQUIRED_OBJECTIVES,
    Candidates,
    check_ranking_options,
    choose_scorer,
    default_scorers,
    rank_candidates,
)
from mmbert.inference.cached_images import cached_images, image_loader
from mmbert.inference.evaluate.retrieval_files import (
    RetrievalFiles,
    check_unused,
    names_of,
    ranked_candidates,
    training_examples,
    validation_candidates,
)
from mmbert.inference.evaluate.source import ModelSource, align_columns, check_sizes, ready_model
from mmbert.model.modeling import MMBertForPreTraining
from mmbert.runtime.distributed import rank

log = logging.getLogger("mmbert")

DIRECTIONS = {"image_to_text": "image to text", "text_to_image": "text to image"}


class RetrievalMetrics(dict[str, Any]):
    """Metrics of one scorer by name, such as "text_to_image/R@1"; printed as a table.

    Keys: those of `mmbert.evaluation.retrieval.rank_candidates`, and split, equal_texts, encoding_seconds.
    """

    def __repr__(self) -> str:
        """Format a table: R@1, R@5, R@10 and median rank of each direction, then the cost."""
        rows = [
            [title, *[f"{self[f'{way}/R@{n}']:.4f}" for n in (1, 5, 10)], f"{self[f'{way}/median_rank']:g}"]
            for way, title in DIRECTIONS.items()
        ]
        name = self["scorer"] + (f", k={self['k']}" if self["k"] else "")
        name += f", itc_weight={self['itc_weight']:g}" if self["itc_weight"] else ""
        name += f", mean over {self['folds']} folds" if self["folds"] > 1 else ""
        return "\n".join(
            [
                *align_columns([[name, "R@1", "R@5", "R@10", "median rank"], *rows]),
                f"rsum {self['rsum']:.2f}; {self['image_passes']:,} image, {self['text_passes']:,} text and "
                f"{self['fusion_passes']:,} fusion passes; {self['encoding_seconds']:.2f} s encoding, "
                f"{self['scoring_seconds']:.2f} s scoring; peak memory {self['peak_memory'] / 1e9:.2f} GB",
            ]
        )

    def describe_data(self) -> str:
        """Name what was ranked: number of images and texts, protocol, ties."""
        equal = "correct" if self["equal_texts"] else "wrong"
        return (
            f"{self['num_images']:,} images, {self['num_texts']:,} texts of split {self['split']}, "
            f"{self['captions_per_image']}; ties rank last; equal texts of other images are {equal}"
        )


class RetrievalReport(dict[str, RetrievalMetrics]):
    """Retrieval metrics by scorer ("itc", "two_stage", or "itc, 5 folds"); printed as tables."""

    def __repr__(self) -> str:
        """Format the data and one table for each scorer."""
        found = list(self.values())
        return "\n\n".join([found[0].describe_data(), *map(repr, found)]) if found else "{}"


def evaluate_retrieval(
    model: ModelSource,
    data: Candidates | str | Path,
    images: str | Path | None = None,
    *,
    format: str = "karpathy",
    split: str | None = None,
    image_key: str | None = None,
    caption_key: str | Sequence[str] | None = None,
    split_key: str | None = None,
    delimiter: str | None = None,
    drop_uncaptioned: bool = False,
    captions: int | None = None,
    first_images: int | None = None,
    scorer: str | Sequence[str] = "auto",
    k: int = 32,
    folds: int | Sequence[int] = 1,
    equal_texts: bool = False,
    batch_size: int = 64,
    num_workers: int = 0,
    device: str | torch.device | None = None,
    processor: MMBertProcessor | None = None,
    on_result: Callable[[RetrievalMetrics], None] | None = None,
    baseline: str | None = None,
    train_annotations: str | Path | None = None,
    train_split: str | Sequence[str] = "train",
    itc_weight: float | str = 0.0,
    val_annotations: str | Path | None = None,
    val_split: str | Sequence[str] = "val",
    cache: str | Path | None = None,
    precision: str | None = None,
    half_tokens: bool = False,
) -> RetrievalReport:
    """Rank the images and captions of a split against each other, and compute recall at 1, 5 and 10.

    Every image and every distinct text is encoded once. All captions of an image count ("5 captions per image" for
    COCO); the number is in the result.

    Args:
        model: Folder of a saved model, result of `mmbert.load`, or an `MMBertForPreTraining` with its `processor`.
        data: Annotation file, or `mmbert.evaluation.retrieval.Candidates`, which need none of the options up to
            `first_images`.
        images: Folder of the images.
        format: Format of the file: karpathy, coco, jsonl or csv.
        split: Split to rank (default "test") of a file that holds several, karpathy or with `split_key`.
        image_key: Field with the path of the image (jsonl, csv).
        caption_key: Field or fields with captions (jsonl, csv).
        split_key: Field with the split (jsonl, csv).
        delimiter: Character between columns (csv).
        drop_uncaptioned: Drop images without a caption instead of raising an error (coco, karpathy).
        captions: Rank only the first captions of each image, so many. None: all.
        first_images: Rank only the first images of the split, so many. None: all.
        scorer: One or several of itc (contrastive vectors, no fusion), itm (fuses every pair) and two_stage (fuses the
            k nearest by itc); "auto": itc, then two_stage, as far as the model has the objectives.
        k: Shortlist of two_stage, in texts per image and images per text.
        folds: One or several numbers of consecutive parts of the images that are ranked separately; 5 is the 1k
            protocol of COCO's 5,000.
        equal_texts: Count a caption as correct for every image with an equal caption.
        batch_size: Images or texts per encoder call.
        num_workers: Processes that decode images.
        device: "cpu", "cuda" ... for a folder; None: the GPU if there is one.
        processor: For an `MMBertForPreTraining`; other models have their own.
        on_result: Called with the metrics of each scorer as soon as they are computed.
        baseline: "closed_form" ranks first by linear projections of the encoders' outputs, solved from training pairs
            (`mmbert.model.objectives.closed_form`): what the trained heads and the fusion have to beat.
        train_annotations: File with the training pairs of the baseline, in the same format. None: `data`, if it holds
            several splits.
        train_split: Its split or splits, of a file that holds several.
        itc_weight: Factor of the contrastive logit that two_stage adds to the matching score; "auto": chosen on the
            validation split, see `mmbert.evaluation.itc_weight.choose_itc_weight`.
        val_annotations: File with the validation images and captions for "auto", in the same format. None: `data`,
            if it holds several splits.
        val_split: Their split or splits, of a file that holds several.
        cache: Folder of the encoder cache (`data.cache` of a run), from which images are read; missing ones are added.
        precision: 32-true, bf16-mixed or 16-mixed. None: that of the run whose folder holds the model, else 32-true.
        half_tokens: Keep the encoders' outputs for fusion in fp16, in half the memory.

    Raises:
        UsageError: An option that is not allowed, training or validation pairs that are the ranked ones, or the model
            has not the objectives that the scorer needs.
        DataError: Something is wrong with the file, an image or the saved weights.
    """
    check_sizes(batch_size, num_workers)
    if captions is not None and captions < 1:
        raise UsageError(f"captions={captions}: must be 1 or more.")
    keys = {
        "image_key": image_key,
        "caption_key": caption_key,
        "split_key": split_key,
        "delimiter": delimiter,
        "drop_uncaptioned": drop_uncaptioned or None,
    }
    files = RetrievalFiles(
        None if isinstance(data, Candidates) else data,
        images,
        format,
        {name: value for name, value in keys.items() if value is not None},
    )
    with ready_model(model, processor, device, precision) as (ready, own_processor, computation):
        scorers = _scorers(ready, scorer)
        if isinstance(data, Candidates):
            candidates, split = data, split or "candidates"
        else:
            candidates, split = ranked_candidates(files, split, captions, first_images)
        training = training_examples(files, baseline, train_annotations, train_split, split)
        weight = _checked_itc_weight(itc_weight, scorers)
        validation = None
        if weight is not None:
            check_unused("val", val_annotations, val_split, "itc_weight='auto'")
        else:
            validation = validation_candidates(files, val_annotations, val_split, split)
        fold_counts = dict.fromkeys([folds] if isinstance(folds, int) else folds)
        for number in fold_counts:
            check_ranking_options(len(candidates.images), k=k, folds=number, itc_weight=weight or 0.0)
        started = time.perf_counter()
        every_image = [*candidates.images, *(e.image for e in training), *(validation.images if validation else [])]
        with cached_images(
            ready.mmbert, own_processor, cache, every_image, computation, batch_size=batch_size, num_workers=num_workers
        ) as opened:
            load_image = image_loader(opened, own_processor)
            encode_candidates = partial(
                encode,
                ready,
                own_processor,
                batch_size=batch_size,
                num_workers=num_workers,
                half_tokens=half_tokens,
                load=load_image,
            )
            encoded = encode_candidates(
                candidates.images,
                candidates.texts,
                keep_tokens=any("itm" in REQUIRED_OBJECTIVES[name] for name in scorers),
            )
            seconds = time.perf_counter() - started
            ranked = {name: (name, encoded) for name in scorers}
            if baseline is not None:
                solved = closed_form_candidates(
                    ready, own_processor, training, candidates, encoded, num_workers, load_image
                )
                ranked = {baseline: ("itc", solved), **ranked}
            if validation is not None:
                encoded_val = encode_candidates(validation.images, validation.texts)
                found = choose_itc_weight(ready, encoded_val, validation, k=k, equal_texts=equal_texts)
                weight = found.itc_weight
                if rank() == 0:
                    log.info("%s", found.describe(", ".join(names_of(val_split))))
        common = {
            "split": split,
            "equal_texts": equal_texts,
            "precision": computation.precision,
            "encoding_seconds": seconds,
        }
        report = RetrievalReport()
        for number in fold_counts:
            for name, (scorer_name, used) in ranked.items():
                ranking = rank_candidates(
                    ready,
                    used,
                    candidates,
                    scorer_name,
                    k=k,
                    folds=number,
                    equal_texts=equal_texts,
                    itc_weight=weight or 0.0,
                )
                metrics = RetrievalMetrics(common | ranking.metrics | {"scorer": name})
                report[name if number == 1 else f"{name}, {number} folds"] = metrics
                if on_result is not None:
                    on_result(metrics)
        return report


def _scorers(model: MMBertForPreTraining, scorer: str | Sequence[str]) -> list[str]:
    """The names of the scorers, each once, "auto" replaced by what the model has objectives for."""
    found = [
        name
        for given in names_of(scorer)
        for name in (default_scorers(model) if given == "auto" else [choose_scorer(model, given)])
    ]
    return [*dict.fromkeys(found)]


def _checked_itc_weight(itc_weight: float | str, scorers: Sequence[str]) -> float | None:
    """The weight as a number; None where it is to be chosen."""
    if isinstance(itc_weight, str) and itc_weight != "auto":
        raise UsageError(f"itc_weight='{itc_weight}': a number of 0 or more, or auto.")
    if itc_weight and "two_stage" not in scorers:
        raise UsageError(
            f"itc_weight={itc_weight}: only the scorer two_stage uses it, and {', '.join(scorers)} ranks; leave it out."
        )
    return None if isinstance(itc_weight, str) else itc_weight
