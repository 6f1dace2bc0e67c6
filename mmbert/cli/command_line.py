"""What a user reads on the terminal: our own log lines, and one sentence for each mistake."""

import argparse
import errno
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args, get_type_hints

from mmbert.errors import DataError, UsageError, did_you_mean
from mmbert.runtime.import_policy import OPTION, allow_from_here

NOISE = (  # warnings of Lightning about what is meant here
    "does not have many workers",
    "exists and is not empty",
    "isinstance.treespec",
    "not supported by the model summary",
    "in eval mode at the start of training",
    "smaller than the logging interval",
    "could not find the monitored key",
    "The dirpath has changed",
    "callbacks used to create the checkpoint need to be provided",
    "when logging on epoch level in distributed setting",
    "LightningCLI's args parameter is intended to run from within Python",
)

DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def set_up_logging() -> None:
    """Shows mmbert's log on the error stream, and of other libraries what is a warning that helps."""
    logging.basicConfig(format="mmbert: %(message)s", level=logging.WARNING, stream=sys.stderr)
    first = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"
    logging.getLogger("mmbert").setLevel(logging.INFO if first else logging.WARNING)
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
    for message in NOISE:
        warnings.filterwarnings("ignore", message=f".*{message}.*")


class _AllowImport(argparse.Action):
    def __call__(self, parser: object, namespace: object, values: Any, option_string: str | None = None) -> None:
        allow_from_here(values)


def add_model(command: argparse.ArgumentParser, description: str = "A saved model's folder: RUN/model.") -> None:
    """Adds the argument MODEL to a command, and the option of `add_allow_import`, which a model may need."""
    command.add_argument("model", metavar="MODEL", help=description)
    add_allow_import(command)


def add_allow_import(command: argparse.ArgumentParser) -> None:
    """Adds the option that lets files name classes of a module, here a fusion; see `mmbert.runtime.allowed_imports`."""
    command.add_argument(OPTION, metavar="MODULE", action=_AllowImport, default=argparse.SUPPRESS,
                         help="A module of yours that a fusion comes from, such as my_fusion.")  # fmt: skip


def print_line(line: str) -> None:
    """Prints what may hold any character, on a terminal of any encoding."""
    encoding = sys.stdout.encoding or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding))


@contextmanager
def one_sentence_for_mistakes() -> Iterator[None]:
    """Turns a user's mistake into a sentence without traceback: exit code 2 for options, 1 for files."""
    try:
        yield
    except (UsageError, DataError) as error:
        text = str(error)
        if "Original Traceback" in text:  # a loader's process wraps its error
            text = text.strip().splitlines()[-1].split(": ", 1)[-1]
        print(f"mmbert: error: {text}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, UsageError) else 1) from None
    except BrokenPipeError:  # whoever read the output, `head`, has enough; Python would try to flush once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except OSError as error:
        if error.errno not in DISK_IS_FULL:
            raise
        place = f"{error.filename}: " if error.filename else ""
        print(f"mmbert: error: {place}{error.strerror}; make room; a run goes on with --resume auto", file=sys.stderr)
        raise SystemExit(1) from None


def refuse_empty(config: Any, sections: Mapping[str, type | None]) -> None:
    """Refuses what jsonargparse lets through: a section that is no mapping, and null for a value that must be there.

    Args:
        config: The sections as parsed.
        sections: Name of each section, and the dataclass of its options; None: only the section itself is checked.

    Raises:
        UsageError: With the key.
    """
    for name, options in sections.items():
        if not hasattr(config[name], "as_dict"):
            raise UsageError(f"{name}: expected a mapping of options. Got value: {config[name]!r}")
        for key, kind in ({} if options is None else get_type_hints(options)).items():
            if config[name].get(key) is None and type(None) not in get_args(kind):
                raise UsageError(f"{name}.{key}: expected a {getattr(kind, '__name__', kind)}. Got value: null")


def refuse_contradictions(
    subcommand: str, checkpoint: str | None, resume: str | None, pretrained: str | None, trainer: Mapping[str, Any]
) -> None:
    """Refuses options of a run that would have no effect, or another one than was meant.

    Args:
        subcommand: fit, validate or test.
        checkpoint: --ckpt_path.
        resume: --resume.
        pretrained: model.pretrained.
        trainer: The section as parsed.

    Raises:
        UsageError: With the option, and what to give instead.
    """
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise UsageError(f"--ckpt_path {checkpoint}: there is no such file.")
    if subcommand == "fit" and checkpoint is not None and resume is not None:
        raise UsageError("--resume takes its own checkpoint; leave --ckpt_path out.")
    if subcommand != "fit" and resume is not None:
        raise UsageError(
            f"--resume goes on with training; {subcommand} takes --ckpt_path RUN/checkpoints/best-step=N.ckpt, and "
            "another --name for its results."
        )
    if subcommand != "fit" and checkpoint is None and pretrained is None:
        raise UsageError(
            f"{subcommand} would judge random weights: give --ckpt_path RUN/checkpoints/best-step=N.ckpt or "
            "--model.pretrained RUN/model."
        )
    clip = trainer["gradient_clip_val"]
    if (clip or 0) < 0:
        raise UsageError(f"trainer.gradient_clip_val={clip}: above 0, or 0 for no clipping.")
    for name in ("logger", "enable_checkpointing"):
        if trainer[name] is False:
            raise UsageError(f"trainer.{name}=false: a run always writes its metrics and checkpoints; leave it out.")


def explain(message: str, options: Sequence[str], subcommands: Sequence[str] = ()) -> str:
    """Turns jsonargparse's message into one sentence, with a suggestion where a name is misspelt.

    Args:
        message: What the parser says, maybe over several lines.
        options: The options it knows, like "model.fusion".
        subcommands: The subcommands it knows.
    """
    message = " ".join(line.strip() for line in message.strip().splitlines())
    unknown = re.search(r"unrecognized arguments: (--?([\w.]+))", message)
    if unknown:
        return f"there is no option {unknown.group(1)}.{did_you_mean(unknown.group(2), options)}"
    choice = re.search(r"invalid choice: '([\w.-]+)'", message)
    if choice and subcommands:
        near = did_you_mean(choice.group(1), subcommands)
        return f"there is no subcommand '{choice.group(1)}'; allowed are {', '.join(subcommands)}.{near}"
    nested = re.search(r"does not accept option '([\w.]+)'|Option '([\w.]+)' is not accepted", message)
    if nested:
        name = nested.group(1) or nested.group(2)
        return f"there is no option {name}.{did_you_mean(name, options)}"
    denied = re.search(r"Importing '([\w.]+)' is not allowed", message)
    if denied:
        name = denied.group(1)
        key = re.search(r"Parser key \"([\w.]+)\"", message)
        place = f"{key.group(1)}: " if key else ""
        return (
            f"{place}a configuration may not name '{name}', since naming it runs its code; if you trust it, add "
            f"--allow-import {name.split('.')[0]} on the command line."
        )
    typed = re.search(r"Parser key \"([\w.]+)\": (.*)", message)
    if typed:
        said = re.sub(r"<class '([\w.]+)'>", r"\1", typed.group(2))
        return f"{typed.group(1)}: {said[:1].lower()}{said[1:]}"
    return message
