"""Where the data is and how it is read: the section `data` of a configuration, and what can't be meant in it."""

from dataclasses import dataclass
from typing import Any

from mmbert.errors import UsageError, did_you_mean


@dataclass(kw_only=True)
class DataOptions:
    """Where the pairs are and how they are read."""

    format: str = "coco"
    """Format of the annotations: a name in `mmbert.data.readers.FORMATS` (coco, karpathy, jsonl, csv); for a task one
    in `mmbert.data.labelled.LABELLED_FORMATS` (vqav2, easy_vqa, jsonl, nlvr, nlvr2)."""
    annotations: str | dict[str, str] = ""
    """One file that tells the splits itself, or a file for each: {train: ..., val: ..., test: ...}. Every split whose
    name starts with "test" is tested and reported under its own name."""
    images: str | dict[str, str] = ""
    """Folder that the annotations' image paths start from, or one for each split."""
    prepare: str | None = None
    """Data set to generate where its files are missing: a name in `mmbert.data.prepare.GENERATORS` (shapes, easy_vqa).
    It is written to data/NAME in the working directory, and only if other options name files there."""
    image_key: str | list[str] | None = "image"
    """Field of a JSONL or CSV record with the image's path; for a task fields, where a text has several images, or
    null, where it has none."""
    caption_key: str | list[str] = "caption"
    """Field or fields with the caption (a string or a list of strings); every text that is not empty counts."""
    split_key: str | None = None
    """Field that tells the split of a JSONL or CSV record."""
    split_values: dict[str, list[str]] | None = None
    """Values of `split_key` that make up a split, {val: [...], test: [...]}; the others are for training."""
    text_key: str = "text"
    """Field of a task's JSONL record with the text."""
    label_key: str = "label"
    """Field of a task's JSONL record with the label."""
    id_key: str | None = None
    """Field of a task's JSONL record that names it in predictions. None: its number in the file."""
    questions: dict[str, str] | None = None
    """Question files of vqav2, one for each split."""
    image_names: str | dict[str, str] = ""
    """How an image_id becomes a file name: a template, COCO_val2014_{:012d}.jpg, or a JSON file with COCO's list of
    images; one for all or one for each split. For a task's JSONL what the field's value is put into, {}.jpg."""
    min_answer_count: int = 9
    """Training questions that an answer must be the commonest one of to be in the vocabulary of VQA."""
    tokenizer: str | None = None
    """Tokenizer: a name on the hub or a folder. None: that of `model.pretrained` or `model.text_pretrained`."""
    max_text_length: int = 64
    """Longer texts are cut, in tokens incl. [CLS] and [SEP]."""
    mlm_probability: float = 0.15
    """Fraction of tokens that masked language modelling predicts."""
    whole_word: bool = False
    """Mask all pieces of a word together."""
    crop: float = 1.0
    """Smallest fraction of a training image's area that a random crop keeps; 1 = no crop."""
    flip: bool = False
    """Mirror half of the training images, never one whose caption says left or right."""
    batch_size: int = 64
    """Training pairs a step and process."""
    eval_batch_size: int = 128
    """Pairs a step in validation and test; changes no result."""
    num_workers: int = 1
    """Processes that decode images; changes no result."""
    length_pool: int = 50
    """Batches whose texts are sorted by length together; 1 = no grouping."""
    on_bad_sample: str = "stop"
    """What an image that can't be read does: stop ends the run with its name; skip puts another sample in its place,
    counts it in metrics.json, and ends the run above `max_bad_fraction`."""
    max_bad_fraction: float = 0.01
    """Fraction of a split's pairs that may be skipped."""
    train_fraction: float = 1.0
    """Fraction of the training images or examples that is used: a sample that follows from the seed, the same for
    every model, and part of every larger one."""
    eval_seed: int | None = None
    """Seed of the masks, wrong images and samples of validation and test. None: the run's. Runs with the same one
    answer the same test items."""
    val_size: int | None = 1000
    """At most so many images, with their first caption, or examples of a task validate, a fixed sample; None = all."""
    test_captions: int = 1
    """Captions of each image that masked words and matching are tested on, at most; retrieval takes the first."""


def check_options(options: DataOptions, *, task: str | None = None) -> None:
    """Refuses what can't be meant.

    Args:
        options: The section.
        task: The task that the data is for; None for pretraining.

    Raises:
        UsageError: A value out of range, or an option that would have no effect.
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
    for name in ("mlm_probability", "crop", "train_fraction"):
        if not 0 < getattr(options, name) <= 1:
            raise UsageError(f"data.{name}={getattr(options, name)}: a fraction above 0, up to 1.")
    for split in options.annotations if isinstance(options.annotations, dict) else ():
        if not is_used(split):
            near = did_you_mean(split, ("val", "train", "test"))
            raise UsageError(f"data.annotations.{split}: allowed are train, val, and names that begin with test.{near}")
    _check_required(options, task)
    _check_foreign(options, task)


def is_used(split: str) -> bool:
    """Whether a run trains, validates or tests on a split of this name."""
    return split in ("train", "val") or split.startswith("test")


def _check_required(options: DataOptions, task: str | None) -> None:
    needed = {"annotations": "", "images": ""}
    if task is not None:
        needed["images"] = "; texts without images say data.image_key: null"
        if options.image_key is None:
            needed.pop("images")
            if options.images:
                raise UsageError("data.image_key=null is for texts without images; leave data.images out.")
    if options.format == "easy_vqa":
        needed.clear()
    for name, hint in needed.items():
        if not getattr(options, name):
            raise UsageError(f"data.{name} is missing: say where the data is, see configs/ for examples{hint}.")


def _check_foreign(options: DataOptions, task: str | None) -> None:
    foreign = ("text_key", "label_key", "id_key", "questions", "image_names") if task is None else ("caption_key",)
    for name in foreign:
        if is_set(options, name):
            use = "a task, which model.task names" if task is None else f"pretraining, not for model.task={task}"
            raise UsageError(f"data.{name} is for {use}; leave it out.")
    if task is None and not isinstance(options.image_key, str):
        raise UsageError(f"data.image_key={options.image_key!r}: pretraining takes one image a record, so one field.")


def is_set(options: DataOptions, name: str) -> bool:
    """Whether an option is another than where nothing is said."""
    return getattr(options, name) != getattr(DataOptions, name)


def reader_options(options: DataOptions, task: str | None = None) -> dict[str, Any]:
    """What the reader of records gets: all that tables have; of other formats what was asked for, which they refuse."""
    names = ["image_key", "split_key", "split_values"]
    names += ["caption_key"] if task is None else ["text_key", "label_key", "id_key"]
    tables = ("jsonl", "csv")
    return {name: getattr(options, name) for name in names if options.format in tables or is_set(options, name)}
