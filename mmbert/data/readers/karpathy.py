"""Reader of Karpathy's JSON (dataset_coco.json, dataset_flickr30k.json): each image has its split and sentences."""

from pathlib import Path

from mmbert.data.readers.base import (
    UNCAPTIONED,
    Example,
    ImageFolder,
    Problems,
    clean_caption,
    note_empty_caption,
    note_uncaptioned,
)
from mmbert.data.readers.strict import expect, field, load_json, missing_key
from mmbert.errors import DataError, UsageError, did_you_mean, quote

SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}


def read_karpathy(
    path: Path,
    images: ImageFolder,
    problems: Problems,
    *,
    split: str | None = None,
    only: str | None = None,
    drop_uncaptioned: bool = False,
) -> list[Example]:
    """Read a file with all splits; `restval` counts as train, as in the papers.

    Args:
        path: the annotation file.
        images: folder that holds `filename`, or `filepath`/`filename` where a `filepath` is given.
        problems: receives errors.
        split: not allowed, since the file names its splits.
        only: train, val or test: records of the others are ignored, so their images need not exist.
        drop_uncaptioned: drop images without a caption instead of raising an error.

    Raises:
        DataError: the file cannot be read.
        UsageError: `split` is given, or `only` is no split.
    """
    if only is not None and only not in SPLITS.values():
        raise UsageError(f"split {only!r}; a karpathy file has train, val, test.{did_you_mean(only, SPLITS)}")
    if split is not None:
        raise UsageError(f"annotations: a split {split!r} for {path}; a karpathy file names its own splits")
    top = expect(load_json(path), dict, "the file", str(path))
    examples = []
    seen: dict[Path, str] = {}
    others: dict[str, None] = {}
    for index, record in enumerate(field(top, "images", list, str(path))):
        place = f"{path}:images[{index}]"
        with problems:
            record = expect(record, dict, "the image", place)
            name = field(record, "split", str, place)
            if name not in SPLITS:
                raise DataError(place, f"the split {quote(name)}", f"{', '.join(SPLITS)}.{did_you_mean(name, SPLITS)}")
            if only is not None and SPLITS[name] != only:
                others[SPLITS[name]] = None
                continue
            filename = field(record, "filename", str, place)
            if record.get("filepath"):
                filename = f"{field(record, 'filepath', str, place)}/{filename}"
            file, image_id = images.find(filename, place)
            if file in seen:
                raise DataError(place, f"the image of {seen[file]} again", "each image in one record")
            seen[file] = place
            captions = []
            before = problems.total
            for number, sentence in enumerate(field(record, "sentences", list, place)):
                where = f"{place}.sentences[{number}]"
                sentence = expect(sentence, dict, "the sentence", where)
                if "raw" not in sentence:
                    raise missing_key("raw", sentence, where)
                if caption := clean_caption(sentence["raw"], where):
                    captions.append(caption)
                else:
                    note_empty_caption(problems, where)
            if captions:
                examples.append(Example(file, tuple(captions), image_id, SPLITS[name], place))
            elif drop_uncaptioned:
                note_uncaptioned(problems, place)
            elif problems.total == before:  # otherwise its empty captions are already reported
                raise DataError(place, "no sentence with text", UNCAPTIONED)
    if others and not examples and not problems.total:
        raise DataError(str(path), f"no image in the split {only!r}", f"one of the splits it has: {', '.join(others)}")
    return examples
