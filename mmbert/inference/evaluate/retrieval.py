"""Evaluate a saved model on retrieval and foils: the functions behind `mmbert evaluate`."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mmbert.data.examples import Example, read_examples
from mmbert.data.processor import MMBertProcessor
from mmbert.data.readers.base import ImageFolder
from mmbert.data.readers.foils import Foil, read_foils
from mmbert.errors import DataError, UsageError, printable
from mmbert.evaluation.closed_form import closed_form_candidates
from mmbert.evaluation.encoding import encode
from mmbert.evaluation.foils import choose_foil_scorer, foil_metrics
from mmbert.evaluation.model_cache import Computation
from mmbert.evaluation.retrieval import (
    REQUIRED_OBJECTIVES,
    Candidates,
    check_ranking_options,
    choose_scorer,
    default_scorers,
    rank_candidates,
)
from mmbert.inference.cached_images import cached_images, evaluation_computation, image_loader
from mmbert.inference.loaded import LoadedModel, load
from mmbert.model.modeling import MMBertForPreTraining, MMBertPreTrainedModel

ModelSource = str | Path | LoadedModel | MMBertPreTrainedModel
"""A folder, a loaded model, or a model that is given with its processor."""
BASELINES = ("closed_form",)
"""Allowed values of `baseline` in `evaluate_retrieval`."""
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


class FoilReport(dict[str, dict[str, float | None]]):
    """Metrics by category and "overall": count, accuracy, blank, shuffled (see `foil_metrics`); printed as a table."""

    def __repr__(self) -> str:
        """Format one row for each category, "overall" first."""
        columns = ["count", "accuracy", "blank", "shuffled"]
        table = [["category", *columns]]
        for category, row in sorted(self.items(), key=lambda item: item[0] != "overall"):
            fractions = ["-" if row[name] is None else f"{row[name]:.4f}" for name in columns[1:]]
            table.append([printable(category), f"{row['count']:,}", *fractions])
        return "\n".join(align_columns(table))


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
    itc_weight: float = 0.0,
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
            `drop_uncaptioned`.
        images: Folder of the images.
        format: Format of the file: karpathy, coco, jsonl or csv.
        split: Split to rank (default "test") of a file that holds several, karpathy or with `split_key`.
        image_key: Field with the path of the image (jsonl, csv).
        caption_key: Field or fields with captions (jsonl, csv).
        split_key: Field with the split (jsonl, csv).
        delimiter: Character between columns (csv).
        drop_uncaptioned: Drop images without a caption instead of raising an error (coco, karpathy).
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
        train_annotations: File with the training pairs of the baseline, in the same format. None: `data`.
        train_split: Its split or splits, of a file that holds several.
        itc_weight: Factor of the contrastive logit that two_stage adds to the matching score; choose it on validation.
        cache: Folder of the encoder cache (`data.cache` of a run), from which images are read; missing ones are added.
        precision: 32-true, bf16-mixed or 16-mixed. None: that of the run whose folder holds the model, else 32-true.
        half_tokens: Keep the encoders' outputs for fusion in fp16, in half the memory.

    Raises:
        UsageError: An option that is not allowed, or the model has not the objectives that the scorer needs.
        DataError: Something is wrong with the file, an image or the saved weights.
    """
    _check_sizes(batch_size, num_workers)
    with _ready(model, processor, device, precision) as (ready, own_processor, computation):
        names = [scorer] if isinstance(scorer, str) else [*scorer]
        scorers: dict[str, None] = {}
        for name in names:
            scorers |= dict.fromkeys(default_scorers(ready) if name == "auto" else [choose_scorer(ready, name)])
        keys: dict[str, Any] = {
            "image_key": image_key,
            "caption_key": caption_key,
            "split_key": split_key,
            "delimiter": delimiter,
            "drop_uncaptioned": drop_uncaptioned or None,
        }
        keys = {name: value for name, value in keys.items() if value is not None}
        if isinstance(data, Candidates):
            candidates, split = data, split or "candidates"
        else:
            split = _split(split, has_splits=format == "karpathy" or split_key is not None, format=format)
            candidates = read_candidates(data, images, format, split, keys)
        training: list[Example] = []
        if baseline is not None:
            if baseline not in BASELINES:
                raise UsageError(f"baseline='{baseline}'; allowed are {', '.join(BASELINES)}.")
            source = train_annotations if isinstance(data, Candidates) else train_annotations or data
            if source is None:
                raise UsageError("train_annotations is missing: give the file with the baseline's training pairs.")
            for part in [train_split] if isinstance(train_split, str) else train_split:
                training += read_split(source, images, format, part, keys)
        fold_counts = dict.fromkeys([folds] if isinstance(folds, int) else folds)
        for number in fold_counts:
            check_ranking_options(len(candidates.images), k=k, folds=number, itc_weight=itc_weight)
        started = time.perf_counter()
        every_image = [*candidates.images, *(example.image for example in training)]
        with cached_images(
            ready.mmbert, own_processor, cache, every_image, computation, batch_size=batch_size, num_workers=num_workers
        ) as opened:
            load_image = image_loader(opened, own_processor)
            encoded = encode(
                ready,
                own_processor,
                candidates.images,
                candidates.texts,
                batch_size=batch_size,
                num_workers=num_workers,
                keep_tokens=any("itm" in REQUIRED_OBJECTIVES[name] for name in scorers),
                half_tokens=half_tokens,
                load=load_image,
            )
            seconds = time.perf_counter() - started
            ranked = {name: (name, encoded) for name in scorers}
            if baseline is not None:
                solved = closed_form_candidates(
                    ready, own_processor, training, candidates, encoded, num_workers, load_image
                )
                ranked = {baseline: ("itc", solved), **ranked}
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
                    itc_weight=itc_weight,
                )
                metrics = RetrievalMetrics(common | ranking.metrics | {"scorer": name})
                report[name if number == 1 else f"{name}, {number} folds"] = metrics
                if on_result is not None:
                    on_result(metrics)
        return report


def evaluate_foils(
    model: ModelSource,
    foils: Sequence[Foil] | str | Path | Sequence[str | Path],
    images: str | Path | None = None,
    *,
    scorer: str = "auto",
    seed: int = 0,
    batch_size: int = 64,
    num_workers: int = 0,
    device: str | torch.device | None = None,
    processor: MMBertProcessor | None = None,
    cache: str | Path | None = None,
    precision: str | None = None,
) -> FoilReport:
    """Compute how often a true caption scores above a false one, by category.

    Args:
        model: As in `evaluate_retrieval`.
        foils: One or several files in SugarCrepe's format, or the records that `read_foils` returns.
        images: Folder of the images, for files.
        scorer: itm, itc, or "auto": itm if the model has it, else itc.
        seed: Seed of the shuffled images.
        batch_size: As in `evaluate_retrieval`, and so are `num_workers`, `device` and `processor`.
        num_workers: Processes that decode images.
        device: For a folder.
        processor: For an `MMBertForPreTraining`.
        cache: As in `evaluate_retrieval`, and so is `precision`.
        precision: By default the run's.

    Raises:
        UsageError: An option that is not allowed, or the model has not the objective of the scorer.
        DataError: Something is wrong with a file, an image or the saved weights.
    """
    _check_sizes(batch_size, num_workers)
    with _ready(model, processor, device, precision) as (ready, own_processor, computation):
        scorer = choose_foil_scorer(ready, scorer)
        given = [foils] if isinstance(foils, str | Path) else [*foils]
        records = [record for record in given if isinstance(record, Foil)]
        files = [Path(file) for file in given if not isinstance(file, Foil)]
        if files:
            records += read_foils(files, ImageFolder(_require_images(images)))
        if not records:
            raise UsageError("foils is empty; give at least one file or record.")
        every_image = [record.image for record in records]
        with cached_images(
            ready.mmbert, own_processor, cache, every_image, computation, batch_size=batch_size, num_workers=num_workers
        ) as opened:
            return FoilReport(
                foil_metrics(
                    ready,
                    own_processor,
                    records,
                    scorer=scorer,
                    seed=seed,
                    batch_size=batch_size,
                    num_workers=num_workers,
                    load=image_loader(opened, own_processor),
                )
            )


def read_candidates(
    file: str | Path, images: str | Path | None, format: str, split: str, keys: Mapping[str, Any]
) -> Candidates:
    """Read the images and captions of one split, see `read_split`."""
    return Candidates.from_examples(read_split(file, images, format, split, keys))


def read_split(
    file: str | Path, images: str | Path | None, format: str, split: str, keys: Mapping[str, Any]
) -> Sequence[Example]:
    """Read the examples of one split.

    Args:
        file: Annotation file.
        images: Folder of the images.
        format: A name in `mmbert.data.readers.FORMATS`.
        split: Name of the split; for a file without splits the name that its examples get.
        keys: Options of the reader.

    Raises:
        DataError: Something is wrong with the file, or the split has no image.
        UsageError: An unknown format or option, or no folder of images.
    """
    folder = str(_require_images(images))
    if format == "karpathy":
        found = read_examples(format, file, folder, only=split, **keys)
    elif "split_key" in keys:
        found = read_examples(format, file, folder, **keys)
    else:
        found = read_examples(format, {split: file}, folder, **keys)
    if not found.get(split):
        raise DataError(str(file), f"no image in the split {split!r}", f"one of the splits it has: {', '.join(found)}")
    return found[split]


def align_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align the columns of a text table: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


class _Ready(NamedTuple):
    """Model in evaluation mode, its processor, and how it computes."""

    model: MMBertForPreTraining
    processor: MMBertProcessor
    computation: Computation


@contextmanager
def _ready(
    model: ModelSource,
    processor: MMBertProcessor | None,
    device: str | torch.device | None,
    precision: str | None,
) -> Iterator[_Ready]:
    """Load a folder, or take the model as it is; in evaluation mode and the precision inside the block."""
    folder = None
    if isinstance(model, str | Path):
        model = load(model, device)
    place = "model is"
    if isinstance(model, LoadedModel):
        folder = model.name
        place, processor, model = f"'{model.name}' holds", model.processor, model.model
    if not isinstance(model, MMBertForPreTraining):
        raise UsageError(
            f"{place} a {type(model).__name__}, which has no head to rank with; give the folder RUN/model of a run "
            "that was pretrained with itm, itc or both."
        )
    if processor is None:
        raise UsageError("processor is missing: give the MMBertProcessor of the model, or the folder of a saved model.")
    computation = evaluation_computation(precision, model.mmbert, folder)
    was_training = model.training
    model.eval()
    try:
        with computation.context():
            yield _Ready(model, processor, computation)
    finally:
        model.train(was_training)


def _split(split: str | None, *, has_splits: bool, format: str) -> str:
    """Name of the split to rank: test by default."""
    if split is not None and not has_splits:
        how = ", or give split_key, the field with the split" if format in ("jsonl", "csv") else ""
        raise UsageError(f"split='{split}': a file of format {format} is ranked as one split; leave split out{how}.")
    return split or "test"


def _check_sizes(batch_size: int, num_workers: int) -> None:
    for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
        if value < least:
            raise UsageError(f"{name}={value}: must be {least} or more.")


def _require_images(images: str | Path | None) -> str | Path:
    if images is None:
        raise UsageError("images is missing: give the folder of the images.")
    return images
