"""Options of the section `data` of a configuration, and their validation."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmbert.errors import UsageError, did_you_mean

log = logging.getLogger("mmbert")


@dataclass(kw_only=True)
class DataOptions:
    """Location, format and processing of training, validation and test data."""

    format: str = "coco"
    """Format of the annotations: a name in `mmbert.data.readers.FORMATS` (coco, karpathy, jsonl, csv); for a task one
    in `mmbert.data.labelled.LABELLED_FORMATS` (vqav2, easy_vqa, jsonl, nlvr, nlvr2)."""
    annotations: str | dict[str, str] = ""
    """One file with a split for each record, or a file for each split: {train: ..., val: ..., test: ...}. Every split
    whose name starts with "test" is tested and reported under its own name."""
    images: str | dict[str, str] = ""
    """Folder that the annotations' image paths are relative to, or one for each split."""
    boxes: str | list[str] | None = None
    """File or files with boxes of the training images for the objective boxes, in the format of COCO's
    instances_train2017.json; joined by image id, or by file name where the captions' format has no ids."""
    prepare: str | None = None
    """Data set to generate where its files are missing: a name in `mmbert.data.prepare.GENERATORS` (shapes, easy_vqa).
    It is written to data/NAME in the working directory, and only if other options name files there."""
    image_key: str | list[str] | None = "image"
    """Field of a JSONL or CSV record with the image's path; for a task several fields, where a text has several
    images, or null, where it has none."""
    caption_key: str | list[str] = "caption"
    """Field or fields of a JSONL or CSV record with captions: a string or a list of strings; empty ones are dropped."""
    delimiter: str | None = None
    """Character between the columns of a CSV file: any single one, a tab also as "tab". None: detected from the header
    among , ; tab and |."""
    drop_uncaptioned: bool = False
    """Drop images without a caption, and count them in a warning, instead of ending with an error."""
    split_key: str | None = None
    """Field of a JSONL or CSV record with its split."""
    split_values: dict[str, list[str]] | None = None
    """Values of `split_key` of each split, {val: [...], test: [...]}; the others are for training."""
    text_key: str = "text"
    """Field of a task's JSONL record with the text."""
    label_key: str = "label"
    """Field of a task's JSONL record with the label."""
    id_key: str | None = None
    """Field of a task's JSONL record with its id in predictions. None: its number in the file."""
    questions: dict[str, str] | None = None
    """Question files of vqav2, one for each split."""
    image_names: str | dict[str, str] = ""
    """How an image id of vqav2, or the value of `image_key` of a task's JSONL, becomes a file name: a template such as
    COCO_val2014_{:012d}.jpg or {}.jpg, or a JSON file with COCO's list of images; one for all or one for each split."""
    min_answer_count: int = 9
    """Answers that are the most frequent one of at least this many training questions form the vocabulary of VQA."""
    tokenizer: str | None = None
    """Tokenizer: a name on the hub or a folder. None: that of `model.pretrained` or `model.text_pretrained`."""
    max_text_length: int = 64
    """Longer texts are truncated; in tokens incl. [CLS] and [SEP]."""
    mlm_probability: float = 0.15
    """Fraction of tokens that masked language modelling (MLM) predicts."""
    whole_word: bool = False
    """Mask all tokens of a word together."""
    mask_content: bool = False
    """In training mask only content words: those that captions of one image share more often than chance. Validation
    and test mask any word."""
    opposites: dict[str, str] | None = None
    """Words of opposite meanings that describe images, {left: right, above: below}: content words for `mask_content`,
    and exchanged, for nothing else, by the edited captions of `objectives.itm.edited`. Where opposites and synonyms
    stand in the same places, as above, over and below do, other edits would call true captions wrong."""
    crop: float = 1.0
    """Smallest fraction of a training image's area that a random crop keeps; 1 = no crop."""
    flip: bool = False
    """Mirror half of the training images, but none whose caption, question or answer mentions left or right; with the
    objective ngrams, none of which any caption does."""
    batch_size: int = 64
    """Training samples of each process and step."""
    eval_batch_size: int = 128
    """Samples of each process and step in validation and test; changes no result."""
    num_workers: int = 1
    """Processes that decode images, for each training process; changes no result."""
    images_in_memory: bool | None = None
    """Keep decoded images that are not augmented in memory, shared by the loader's processes; changes no result. None:
    if they take at most a quarter of the free memory."""
    length_pool: int = 50
    """Batches whose texts are sorted by length together; 1 = no grouping."""
    cache: str | None = "auto"
    """Folder for the outputs of a frozen image encoder (`optim.freeze_image`), which are computed once instead of in
    every epoch, and shared by all runs with the same frozen encoder; changes no result. auto: `encoder_cache` beside
    the run's folder, if it takes less than 10 GB and half of the free disk space; null: none. Needs images without
    augmentation, or `views`."""
    cache_dtype: str | None = None
    """Type in which the cache stores numbers: fp32, fp16 or bf16; then a resumed run must read a cache as before. None:
    as the encoder returns them, which is exact."""
    views: int | None = None
    """Augmented views of each training image (`crop`, `flip`) that the cache holds; an epoch takes one of them."""
    on_bad_sample: str = "stop"
    """What happens with an unreadable image: stop ends the run with its name; skip replaces it by another sample,
    counts it in metrics.json, and ends the run above `max_bad_fraction`."""
    max_bad_fraction: float = 0.01
    """Fraction of a split's samples that may be skipped."""
    train_fraction: float = 1.0
    """Fraction of the training images or examples that is used: a random sample that depends on the seed only and is
    part of every larger one."""
    eval_seed: int | None = None
    """Seed of the masks, wrong images and samples of validation and test. None: the run's. Runs with the same one are
    tested on the same items."""
    val_size: int | None = 1000
    """Largest number of images (with their first caption) or examples for validation, a fixed sample; None = all."""
    test_captions: int = 1
    """Largest number of captions of each image for testing MLM and matching; retrieval takes the first."""


def check_options(options: DataOptions, *, task: str | None = None) -> None:
    """Validate the options, and warn of those without effect.

    Args:
        options: The section.
        task: The task that the data is for; None for pretraining.

    Raises:
        UsageError: A value out of range, an option for other data, or a mapping with a key that is no split.
    """
    for name in ("batch_size", "eval_batch_size", "length_pool", "test_captions", "min_answer_count"):
        if getattr(options, name) < 1:
            raise UsageError(f"data.{name}={getattr(options, name)}: must be 1 or more.")
    if options.val_size is not None and options.val_size < 1:
        raise UsageError(f"data.val_size={options.val_size}: 1 or more, or null for all.")
    if options.num_workers < 0:
        raise UsageError(f"data.num_workers={options.num_workers}: must be 0 or more.")
    if options.max_text_length < 3:
        raise UsageError(f"data.max_text_length={options.max_text_length}: [CLS], one token and [SEP] need 3.")
    if options.on_bad_sample not in ("stop", "skip"):
        raise UsageError(f"data.on_bad_sample='{options.on_bad_sample}'; allowed are stop, skip.")
    if not 0 <= options.max_bad_fraction <= 1:
        raise UsageError(f"data.max_bad_fraction={options.max_bad_fraction}: a fraction from 0 to 1.")
    if options.cache_dtype not in (None, "fp32", "fp16", "bf16"):
        raise UsageError(f"data.cache_dtype='{options.cache_dtype}'; allowed are fp32, fp16, bf16, or null.")
    if options.views is not None and options.views < 1:
        raise UsageError(f"data.views={options.views}: 1 or more, or null.")
    for name in ("mlm_probability", "crop", "train_fraction"):
        if not 0 < getattr(options, name) <= 1:
            raise UsageError(f"data.{name}={getattr(options, name)}: a fraction above 0, up to 1.")
    _check_splits(options)
    _check_required(options, task)
    _check_foreign(options, task)
    _warn_without_effect(options, task)


def is_used(split: str) -> bool:
    """Return whether a run trains, validates or tests on a split of this name."""
    return split in ("train", "val") or split.startswith("test")


def _check_splits(options: DataOptions) -> None:
    """Check the keys of options that map splits to values."""
    annotations = options.annotations
    for name in ("annotations", "images", "questions", "image_names", "split_values"):
        for split in value if isinstance(value := getattr(options, name), Mapping) else ():
            if not is_used(split):
                near = did_you_mean(split, ("val", "train", "test"))
                raise UsageError(f"data.{name}.{split}: allowed are train, val, and names that begin with test.{near}")
            if name != "split_values" and isinstance(annotations, Mapping) and split not in annotations:
                known = ", ".join(annotations)
                raise UsageError(
                    f"data.{name}.{split}: data.annotations has no such split, only {known}; leave it out, or name its "
                    f"annotation file.{did_you_mean(split, annotations)}"
                )


def _check_required(options: DataOptions, task: str | None) -> None:
    needed = {"annotations": "", "images": ""}
    if task is not None:
        needed["images"] = "; for texts without images set data.image_key: null"
        if options.image_key is None:
            needed.pop("images")
            if options.images:
                raise UsageError("data.image_key=null is for texts without images; leave data.images out.")
    if options.format == "easy_vqa":
        needed.clear()
    for name, hint in needed.items():
        if not getattr(options, name):
            raise UsageError(f"data.{name} is missing: set the path of your data, see configs/ for examples{hint}.")


def _check_foreign(options: DataOptions, task: str | None) -> None:
    for_tasks, for_captions = ("text_key", "label_key", "id_key", "questions", "image_names"), ("caption_key",)
    for name in for_tasks if task is None else (*for_captions, "delimiter", "drop_uncaptioned", "boxes"):
        if is_set(options, name):
            use = "a task, which model.task names" if task is None else f"pretraining, not for model.task={task}"
            raise UsageError(f"data.{name}={getattr(options, name)!r} is for {use}; leave it out.")
    if task is None and not isinstance(options.image_key, str):
        raise UsageError(f"data.image_key={options.image_key!r}: pretraining takes one image a record, so one field.")


def _warn_without_effect(options: DataOptions, task: str | None) -> None:
    """Warn of options that are set but change nothing; they may come from a shared base, so they are no error."""
    reasons: dict[str, str] = {} if task == "vqa" else {"min_answer_count": "model.task=vqa only"}
    if task is not None:
        reasons |= dict.fromkeys(
            ("mlm_probability", "whole_word", "mask_content", "opposites", "test_captions"), "pretraining only"
        )
    if options.on_bad_sample == "stop":
        reasons["max_bad_fraction"] = "data.on_bad_sample=skip only"
    if options.image_key is None:
        reasons |= dict.fromkeys(("crop", "flip", "on_bad_sample"), "texts with images only")
    for name, use in reasons.items():
        if is_set(options, name):
            log.warning("data.%s=%r has no effect here: it is for %s", name, getattr(options, name), use)


def is_set(options: DataOptions, name: str) -> bool:
    """Return whether an option differs from its default."""
    return getattr(options, name) != getattr(DataOptions, name)


def reader_options(options: DataOptions, task: str | None = None) -> dict[str, Any]:
    """Select the options of the format's reader: all that tables have, and whatever else is set.

    A reader raises on options that it does not have.
    """
    names = ["image_key", "split_key", "split_values"]
    names += ["caption_key"] if task is None else ["text_key", "label_key", "id_key"]
    tables = ("jsonl", "csv")
    chosen = {name: getattr(options, name) for name in names if options.format in tables or is_set(options, name)}
    return chosen | {n: getattr(options, n) for n in ("delimiter", "drop_uncaptioned") if is_set(options, n)}
