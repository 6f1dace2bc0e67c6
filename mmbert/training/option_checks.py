"""Checks of a run's options that the parser can't make, and its messages in one sentence."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

from mmbert.errors import UsageError, did_you_mean


def validate_sections(config: Any, sections: Mapping[str, type | None]) -> None:
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


def validate_run_options(
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


def explain_parser_error(message: str, options: Sequence[str], subcommands: Sequence[str] = ()) -> str:
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
