"""`mmbert evaluate retrieval`, `foils`, `task`, `shares` and `bias`: evaluate a saved model on annotation files."""

import argparse
from collections.abc import Sequence
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmbert.cli.command_line import add_json, add_model, print_json, utf8_text
from mmbert.data.labelled import LABELLED_FORMATS
from mmbert.data.readers import FORMATS
from mmbert.evaluation.options import FOIL_SCORERS, PRECISIONS, RETRIEVAL_SCORERS
from mmbert.runtime.files import atomic_write_text, check_output_file
from mmbert.runtime.terminal import is_first_process

if TYPE_CHECKING:
    from mmbert.inference.evaluate.retrieval import RetrievalMetrics


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the subcommands of `mmbert evaluate` and their options."""
    command.description = "Evaluates a saved model; docs/evaluation.md describes the metrics."
    tasks = command.add_subparsers(required=True, metavar="retrieval|foils|task|shares|bias")
    retrieval = tasks.add_parser(
        "retrieval",
        help="rank images and captions against each other",
        description="Prints recall at 1, 5 and 10 and the median rank of both directions for each scorer as soon as it "
        "is computed, with the number of encoder and fusion passes, time and peak memory. Before a scorer with fusion "
        "starts, the number of fusion passes and their estimated time are logged; Ctrl-C stops.",
    )
    retrieval.set_defaults(run=_retrieval)
    _add_common(retrieval)
    retrieval.add_argument("--annotations", metavar="FILE", required=True, help="The annotation file.")
    retrieval.add_argument("--format", choices=FORMATS, required=True, help=f"Its format: {', '.join(FORMATS)}.")
    retrieval.add_argument("--split", type=utf8_text, help="Split to rank (default test), for karpathy or with "
                           "--split_key; any other file is one split.")  # fmt: skip
    retrieval.add_argument("--scorer", nargs="+", default=["auto"], choices=["auto", *RETRIEVAL_SCORERS],
                           help="One or more: itc (contrastive vectors, no fusion), itm (fuses every pair), two_stage "
                           "(fuses the K nearest by itc); auto: itc, then two_stage, as far as the model has the "
                           "objectives.")  # fmt: skip
    retrieval.add_argument("--baseline", choices=["closed_form"],
                           help="Rank first by linear projections of the encoders' outputs, solved from training "
                           "pairs: what training has to beat.")  # fmt: skip
    retrieval.add_argument("--train_annotations", metavar="FILE",
                           help="The baseline's training pairs (default: the annotation file, if it holds several "
                           "splits).")  # fmt: skip
    retrieval.add_argument("--train_split", nargs="+", default=["train"], metavar="NAME",
                           help="Their split or splits (default train).")  # fmt: skip
    retrieval.add_argument("--k", type=int, default=32, help="Shortlist of two_stage, in texts per image and images "
                           "per text (default 32).")  # fmt: skip
    retrieval.add_argument("--itc_weight", type=_weight, default=0.0, metavar="W",
                           help="Factor of the contrastive logit that two_stage adds to the matching score (default "
                           "0); auto: chosen on the validation split.")  # fmt: skip
    retrieval.add_argument("--val_annotations", metavar="FILE",
                           help="Validation images for --itc_weight auto (default: the annotation file, if it holds "
                           "several splits).")  # fmt: skip
    retrieval.add_argument("--val_split", nargs="+", default=["val"], metavar="NAME",
                           help="Their split or splits (default val).")  # fmt: skip
    retrieval.add_argument("--folds", type=int, nargs="+", default=[1], help="One or more numbers of consecutive parts "
                           "of the images that are ranked separately; prints their mean. 5 is the 1k protocol of "
                           "COCO's 5,000.")  # fmt: skip
    retrieval.add_argument("--half_tokens", action="store_true",
                           help="Keep the encoders' outputs for fusion in fp16, in half the memory.")  # fmt: skip
    retrieval.add_argument("--equal_texts", action="store_true",
                           help="Count a caption as correct for every image with an equal caption.")  # fmt: skip
    retrieval.add_argument("--captions", type=int, metavar="N", help="Rank the first N captions of each image "
                           "(default: all).")  # fmt: skip
    retrieval.add_argument("--first_images", type=int, metavar="N", help="Rank the first N images of the split "
                           "(default: all).")  # fmt: skip
    _add_caption_keys(retrieval)

    foils = tasks.add_parser(
        "foils",
        help="score true captions against false ones (SugarCrepe)",
        description="Prints for each category how often the true caption scores above the false one (foil): with the "
        "image, with a blank image, and with another image of the file.",
    )
    foils.set_defaults(run=_foils)
    _add_common(foils)
    foils.add_argument("--foils", metavar="FILE", nargs="+", required=True, help="Files in SugarCrepe's format.")
    foils.add_argument("--scorer", default="auto", choices=["auto", *FOIL_SCORERS], help="auto: itm, else itc.")
    foils.add_argument("--seed", type=int, default=0, help="Seed of the other images.")

    task = tasks.add_parser(
        "task",
        help="evaluate a fine-tuned model on labelled examples (VQA, NLVR2, SNLI-VE ...)",
        description="Prints the metrics of a run's test split for another file: accuracy, also with a blank image, "
        "another image and an empty text. Labels of training, which priors need, are not saved with a model.",
    )
    task.set_defaults(run=_task)
    _add_common(task, images_required=False)
    task.add_argument("--format", choices=LABELLED_FORMATS, required=True, help=f"{', '.join(LABELLED_FORMATS)}.")
    task.add_argument("--annotations", metavar="FILE", required=True, help="The annotation file; of vqav2 the answers.")
    _add_label_keys(task)
    task.add_argument("--split", help="Split to evaluate (default test) of a file with --split_key.")
    task.add_argument("--seed", type=int, default=0, help="Seed of the other images.")

    shares = tasks.add_parser(
        "shares",
        help="how much of the scores comes from the text, how much from the image (MM-SHAP)",
        description="Prints the mean shares of text and image in the scores of random pairs of a split, by Shapley "
        "values: of the matching score, or of a fine-tuned model's answers.",
    )
    shares.set_defaults(run=_shares)
    _add_source(shares, images_required=False)
    formats = [*dict.fromkeys([*FORMATS, *LABELLED_FORMATS])]
    shares.add_argument("--annotations", metavar="FILE", required=True, help="The annotation file.")
    shares.add_argument("--format", choices=formats, required=True, help=f"Its format: {', '.join(formats)}.")
    shares.add_argument("--split", type=utf8_text, help="Split (default test), for karpathy or with --split_key.")
    shares.add_argument("--pairs", type=int, default=100, help="Images, each with one text (default 100).")
    shares.add_argument("--samples", type=int, default=16, help="Permutations for each pair (default 16).")
    shares.add_argument("--target", choices=["itm", "itc"], help="Score of a pretrained model (default itm, else itc).")
    shares.add_argument("--seed", type=int, default=0, help="Seed of the choice and of the permutations.")
    _add_caption_keys(shares)
    _add_label_keys(shares, besides=("image", "split"))

    bias = tasks.add_parser(
        "bias",
        help="compare two words, such as man and woman, in captions about occupations",
        description="Prints by occupation which of two words a pretrained model prefers: by MLM without an image, and "
        "with --images by the matching probability of captions that differ in the word.",
    )
    bias.set_defaults(run=_bias)
    _add_source(bias, images_required=False)
    bias.add_argument("--words", nargs=2, metavar="W", type=utf8_text, help="The words (default man woman).")
    bias.add_argument("--occupations", nargs="+", metavar="O", type=utf8_text, help="Default: 26 occupations.")
    bias.add_argument("--templates", nargs="+", metavar="T", type=utf8_text,
                      help="Captions with {word} and {occupation} (default: three).")  # fmt: skip
    bias.add_argument("--num_images", type=int, default=32, help="Images, chosen at random (default 32).")
    bias.add_argument("--seed", type=int, default=0, help="Seed of the choice and of the intervals.")
    bias.add_argument("--card", action="store_true", help="Write the result into the model card, MODEL/README.md.")


def _add_caption_keys(command: argparse.ArgumentParser) -> None:
    """Add options of the readers of captions."""
    command.add_argument(
        "--image_key", type=utf8_text, metavar="K", help="Field with the path of the image (jsonl, csv)."
    )
    command.add_argument(
        "--caption_key", type=utf8_text, metavar="K", nargs="+", help="Fields with captions (jsonl, csv)."
    )
    command.add_argument("--split_key", type=utf8_text, metavar="K", help="Field with the split (jsonl, csv).")
    command.add_argument(
        "--delimiter", type=utf8_text, metavar="C", help="Character between columns (csv), a tab also as tab."
    )
    command.add_argument("--drop_uncaptioned", action="store_true",
                         help="Drop images without a caption (coco, karpathy).")  # fmt: skip


def _add_label_keys(command: argparse.ArgumentParser, *, besides: Sequence[str] = ()) -> None:
    """Add options of the readers of labelled examples, without those that the command has already."""
    command.add_argument("--questions", metavar="Q.json", help="Question file of vqav2.")
    command.add_argument("--image_names", metavar="NAMES", help="How an image_id becomes a file name: a template such "
                         "as COCO_val2014_{:012d}.jpg, or COCO's JSON file (vqav2, jsonl).")  # fmt: skip
    for key, content in (("image", "the path of the image"), ("text", "the text"), ("label", "the label"),
                         ("id", "the row's id"), ("group", "the statement's id"), ("split", "the split")):  # fmt: skip
        if key not in besides:
            command.add_argument(f"--{key}_key", metavar="K", help=f"Field with {content} (jsonl).")


def _add_common(task: argparse.ArgumentParser, *, images_required: bool = True) -> None:
    """Add options of the evaluations that encode a split batch by batch."""
    _add_source(task, images_required=images_required)
    task.add_argument("--batch_size", type=int, default=64, help="Images or texts per encoder call.")
    task.add_argument("--num_workers", type=int, default=0, help="Processes that decode images.")
    task.add_argument("--cache", metavar="DIR", help="Folder of the encoder cache (data.cache of a run): images are "
                      "read from it, and missing ones added.")  # fmt: skip


def _add_source(task: argparse.ArgumentParser, *, images_required: bool) -> None:
    add_model(task)
    task.add_argument("--images", metavar="DIR", required=images_required, help="Folder of the images.")
    task.add_argument("--device", help="cpu, cuda, cuda:1 ...; default: the GPU if there is one.")
    task.add_argument("--precision", metavar="P", help=f"{', '.join(PRECISIONS)}; default: that of the run whose "
                      "folder holds the model, else 32-true.")  # fmt: skip
    task.add_argument("--out", metavar="REPORT.json", help="Write all numbers to this file.")
    add_json(task)


def _weight(value: str) -> float | str:
    """Read a number, or auto."""
    try:
        return value if value == "auto" else float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is neither a number of 0 or more nor auto") from None


def _retrieval(*, model: str, annotations: str, out: str | None, json: bool, **options: Any) -> int:
    from mmbert.inference.evaluate.retrieval import evaluate_retrieval
    from mmbert.runtime.distributed import rank, torchrun_process_group

    check_output_file(out)
    finished: list[RetrievalMetrics] = []

    def show(metrics: "RetrievalMetrics") -> None:
        finished.append(metrics)
        if rank() == 0 and not json:
            print("" if len(finished) > 1 else f"{metrics.describe_data()}\n", metrics, sep="\n", flush=True)
        if rank() == 0:
            _write(finished, out)

    with torchrun_process_group():
        evaluate_retrieval(model, annotations, on_result=show, **options)
        if rank() == 0 and json:
            print_json(finished)
    return 0


def _foils(*, model: str, foils: list[str], out: str | None, json: bool, **options: Any) -> int:
    from mmbert.inference.evaluate.foils import evaluate_foils
    from mmbert.runtime.distributed import rank, torchrun_process_group

    check_output_file(out)
    with torchrun_process_group():
        report = evaluate_foils(model, foils, **options)
        if rank() == 0:
            _show(report, out, json)
    return 0


def _task(*, model: str, annotations: str, out: str | None, json: bool, **options: Any) -> int:
    from mmbert.inference.evaluate.task import evaluate_task

    check_output_file(out)
    if not is_first_process():
        return 0
    given = {key: value for key, value in options.items() if value is not None}
    _show(evaluate_task(model, annotations, **given), out, json)
    return 0


def _shares(*, model: str, annotations: str, out: str | None, json: bool, **options: Any) -> int:
    from mmbert.inference.evaluate.shares import evaluate_shares

    check_output_file(out)
    if not is_first_process():
        return 0
    given = {key: value for key, value in options.items() if value is not None and value is not False}
    _show(evaluate_shares(model, annotations, **given), out, json)
    return 0


def _bias(*, model: str, out: str | None, json: bool, card: bool, **options: Any) -> int:
    from mmbert.inference.evaluate.bias import evaluate_bias, find_card, write_bias_section

    check_output_file(out)
    if not is_first_process():
        return 0
    if card:
        find_card(model)
    given = {key: value for key, value in options.items() if value is not None}
    report = evaluate_bias(model, **given)
    _show(report, out, json)
    if card:
        write_bias_section(model, report)
    return 0


def _show(report: Any, out: str | None, json: bool) -> None:
    if json:
        print_json(report)
    else:
        print(report, flush=True)
    _write(report, out)


def _write(content: Any, out: str | None) -> None:
    if out is not None:
        atomic_write_text(Path(out), dumps(content, indent=2) + "\n")
