"""`mmbert evaluate retrieval` and `mmbert evaluate foils`: what a saved model can do, on files one names."""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mmbert.cli.command_line import add_model
from mmbert.data.examples import read_examples
from mmbert.data.processor import MMBertProcessor
from mmbert.data.readers import FORMATS
from mmbert.data.readers.base import ImageFolder
from mmbert.data.readers.foils import read_foils
from mmbert.errors import DataError, UsageError, printable
from mmbert.evaluation.encoding import encode
from mmbert.evaluation.foils import foil_metrics
from mmbert.evaluation.retrieval import REQUIRED_OBJECTIVES, SCORERS, Candidates, choose_scorer, rank_candidates
from mmbert.inference.loading import load_folder
from mmbert.model.modeling import MMBertForPreTraining
from mmbert.runtime.distributed import rank, torchrun_process_group


def add_options(command: argparse.ArgumentParser) -> None:
    """Adds what may follow `mmbert evaluate`."""
    tasks = command.add_subparsers(required=True, metavar="retrieval|foils")
    retrieval = tasks.add_parser(
        "retrieval",
        help="rank images and captions against each other",
        description="Prints recall at 1, 5 and 10 of both directions, median ranks and rsum, with the number of "
        "encoder and fusion passes, the time and the peak memory; docs/evaluation.md tells how it is counted.",
    )
    retrieval.set_defaults(run=_retrieval)
    _add_common(retrieval)
    retrieval.add_argument("--annotations", metavar="FILE", required=True, help="The annotation file.")
    retrieval.add_argument("--format", choices=FORMATS, required=True, help=f"Its format: {', '.join(FORMATS)}.")
    retrieval.add_argument("--split", help="Its split that is ranked (default test), for karpathy or with --split_key; "
                           "any other file is one split.")  # fmt: skip
    retrieval.add_argument("--scorer", nargs="+", default=["auto"], choices=["auto", *SCORERS],
                           help="One or more: itc (contrastive), itm (every pair is fused), two_stage (pairs that are "
                           "near by itc are fused); auto: two_stage where the model has both objectives.")  # fmt: skip
    retrieval.add_argument("--k", type=int, default=32, help="Shortlist of two_stage, in texts an image and in "
                           "images a text.")  # fmt: skip
    retrieval.add_argument("--folds", type=int, nargs="+", default=[1], help="One or more: mean over so many "
                           "consecutive parts of the images; 5 is the 1k protocol of COCO's 5,000.")  # fmt: skip
    retrieval.add_argument("--equal_texts", action="store_true",
                           help="Count a caption as right for every image that carries an equal one.")  # fmt: skip
    retrieval.add_argument("--image_key", metavar="K", help="Field with the image's path (jsonl, csv).")
    retrieval.add_argument("--caption_key", metavar="K", nargs="+", help="Fields with captions (jsonl, csv).")
    retrieval.add_argument("--split_key", metavar="K", help="Field that tells the split (jsonl, csv).")

    foils = tasks.add_parser(
        "foils",
        help="compare true captions with false ones (SugarCrepe)",
        description="Prints, for each category, how often the true caption scores above the foil: with the right "
        "image, with a blank one, and with another image of the file.",
    )
    foils.set_defaults(run=_foils)
    _add_common(foils)
    foils.add_argument("--foils", metavar="FILE", nargs="+", required=True, help="Files in SugarCrepe's format.")
    foils.add_argument("--scorer", default="auto", choices=["auto", "itm", "itc"], help="auto: itm, else itc.")
    foils.add_argument("--seed", type=int, default=0, help="Of the wrong images.")


def _add_common(task: argparse.ArgumentParser) -> None:
    add_model(task)
    task.add_argument("--images", metavar="DIR", required=True, help="Folder of the images.")
    task.add_argument("--batch_size", type=int, default=64, help="Images, or texts, encoded in one call.")
    task.add_argument("--num_workers", type=int, default=0, help="Processes that decode images.")
    task.add_argument("--out", metavar="REPORT.json", help="Writes all numbers to this file.")


def _retrieval(
    *,
    model: str,
    annotations: str,
    images: str,
    format: str,
    split: str | None,
    scorer: list[str],
    k: int,
    folds: list[int],
    equal_texts: bool,
    batch_size: int,
    num_workers: int,
    out: str | None,
    **keys: str | list[str] | None,
) -> int:
    with torchrun_process_group():
        ready, processor = _load(model, batch_size, num_workers)
        split = _split(split, told=format == "karpathy" or keys["split_key"] is not None, format=format)
        scorers = list(dict.fromkeys(choose_scorer(ready, name) for name in scorer))
        candidates = _candidates(format, annotations, images, split, {n: v for n, v in keys.items() if v is not None})
        started = time.perf_counter()
        encoded = encode(
            ready,
            processor,
            candidates.images,
            candidates.texts,
            batch_size=batch_size,
            num_workers=num_workers,
            keep_tokens=any("itm" in REQUIRED_OBJECTIVES[name] for name in scorers),
        )
        spent = {"split": split, "equal_texts": equal_texts, "encoding_seconds": time.perf_counter() - started}
        reports = [
            spent
            | rank_candidates(ready, encoded, candidates, name, k=k, folds=number, equal_texts=equal_texts).metrics
            for number in dict.fromkeys(folds)
            for name in scorers
        ]
        _finish(_retrieval_table(reports), reports, out)
    return 0


def _split(asked: str | None, *, told: bool, format: str) -> str:
    """The split that is ranked: test, if nothing else is asked for of a file that tells splits."""
    if asked is not None and not told:
        how = "; --split_key names the field that tells it" if format in ("jsonl", "csv") else ""
        raise UsageError(f"--split {asked}: the whole file is ranked, as format {format} tells no splits{how}.")
    return asked or "test"


def _candidates(format: str, annotations: str, images: str, split: str, keys: Mapping[str, Any]) -> Candidates:
    if format == "karpathy":
        found = read_examples(format, annotations, images, only=split, **keys)
    elif "split_key" in keys:
        found = read_examples(format, annotations, images, **keys)
    else:
        found = read_examples(format, {split: annotations}, images, **keys)
    if not found.get(split):
        raise DataError(
            annotations, f"no image in the split {split!r}", f"one of the splits it has: {', '.join(found)}"
        )
    return Candidates.from_examples(found[split])


def _retrieval_table(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    first = reports[0]
    ways = {"image_to_text": "image to text", "text_to_image": "text to image"}
    rows = {
        "scorer": [r["scorer"] for r in reports],
        "k": [str(r["k"] or "-") for r in reports],
        "folds": [str(r["folds"]) for r in reports],
        **{
            f"{title} R@{k}": [f"{r[f'{way}/R@{k}']:.4f}" for r in reports]
            for way, title in ways.items()
            for k in (1, 5, 10)
        },
        **{f"{title} median rank": [f"{r[f'{way}/median_rank']:g}" for r in reports] for way, title in ways.items()},
        "rsum": [f"{r['rsum']:.2f}" for r in reports],
        "image passes": [f"{r['image_passes']:,}" for r in reports],
        "text passes": [f"{r['text_passes']:,}" for r in reports],
        "fusion passes": [f"{r['fusion_passes']:,}" for r in reports],
        "encoding seconds": [f"{r['encoding_seconds']:.2f}" for r in reports],
        "scoring seconds": [f"{r['scoring_seconds']:.2f}" for r in reports],
        "peak memory": [f"{r['peak_memory'] / 1e9:.2f} GB" for r in reports],
    }
    ties = "equal texts are right" if first["equal_texts"] else "equal texts are wrong"
    head = f"{first['num_images']:,} images, {first['num_texts']:,} texts of {first['split']}; ties rank last; {ties}"
    return [head, *_aligned([[name, *values] for name, values in rows.items()])]


def _foils(
    *,
    model: str,
    foils: list[str],
    images: str,
    scorer: str,
    seed: int,
    batch_size: int,
    num_workers: int,
    out: str | None,
) -> int:
    with torchrun_process_group():
        ready, processor = _load(model, batch_size, num_workers)
        records = read_foils([Path(file) for file in foils], ImageFolder(images))
        report = foil_metrics(
            ready, processor, records, scorer=scorer, seed=seed, batch_size=batch_size, num_workers=num_workers
        )
        columns = ["count", "accuracy", "blank", "shuffled"]
        table = [["category", *columns]]
        for category, row in report.items():
            shares = ["-" if row[name] is None else f"{row[name]:.4f}" for name in columns[1:]]
            table.append([printable(category), f"{row['count']:,}", *shares])
        _finish(_aligned(table), report, out)
    return 0


def _load(model: str, batch_size: int, num_workers: int) -> tuple[MMBertForPreTraining, MMBertProcessor]:
    """The model on the GPU if there is one."""
    for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
        if value < least:
            raise UsageError(f"--{name} {value}: must be {least} or more.")
    ready, processor = load_folder(model)
    if not isinstance(ready, MMBertForPreTraining):
        raise UsageError(f"'{model}' holds a {type(ready).__name__}, which has no head to rank with; give RUN/model.")
    return ready.to("cuda" if torch.cuda.is_available() else "cpu"), processor  # pyright: ignore[reportArgumentType]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def _finish(lines: Sequence[str], report: Any, out: str | None) -> None:
    """Prints, and writes the file, once for all processes."""
    if rank() != 0:
        return
    print("\n".join(lines))
    if out is not None:
        Path(out).write_text(json.dumps(report, indent=2) + "\n")
