"""Checks of a run's options that the parser can't make, and its messages in one sentence."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

from mmbert.data.options import DataOptions
from mmbert.errors import UsageError, did_you_mean
from mmbert.training.options import OptimOptions

log = logging.getLogger("mmbert")
ATTEMPT_AT_A_TYPE = re.compile(r"$|Expected a|Not a valid subclass|an? (class path|dict) |Does not validate")
"""jsonargparse's messages about types of a union that a value does not have."""


def validate_sections(config: Any, sections: Mapping[str, type | None]) -> None:
    """Raise on what jsonargparse lets through: a section that is no mapping, and null where a value is required.

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


def validate_run_options(command: str, checkpoint: str | None, resume: str | None, pretrained: str | None) -> None:
    """Raise on options of a run that contradict each other.

    Args:
        command: fit, validate or test.
        checkpoint: --ckpt_path.
        resume: --resume.
        pretrained: model.pretrained.

    Raises:
        UsageError: With the option, and what to give instead.
    """
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise UsageError(f"--ckpt_path {checkpoint}: there is no such file.")
    if command == "fit" and checkpoint is not None and resume is not None:
        raise UsageError("--resume chooses the checkpoint; leave --ckpt_path out.")
    if command != "fit" and resume is not None:
        raise UsageError(
            f"--resume resumes a training; {command} takes --ckpt_path RUN/checkpoints/best-step=N.ckpt, and "
            "another --name for its results."
        )
    if command != "fit" and checkpoint is None and pretrained is None:
        raise UsageError(
            f"{command} would evaluate random weights: give --ckpt_path RUN/checkpoints/best-step=N.ckpt or "
            "--model.pretrained RUN/model."
        )


def warn_without_effect(task: str, explicit: Mapping[str, Any]) -> None:
    """Log the options of pre-training that files or command line name and that a task does not use.

    Args:
        task: model.task.
        explicit: Flat options that are named.
    """
    unused = [key for key in explicit if key.startswith(("evaluation.", "model.objectives"))]
    if unused:
        log.warning("model.task=%s: no effect of %s, which are of pre-training", task, ", ".join(sorted(unused)))


def warn_of_unused_options(optim: OptimOptions, data: DataOptions, objectives: Mapping[str, Mapping[str, Any]]) -> None:
    """Log options that differ from their default and change nothing beside the others; a base may have set them.

    Args:
        optim: The section.
        data: The section.
        objectives: Enabled objective -> its options; none for a task.
    """
    itc = objectives.get("itc", {})
    unused: list[tuple[str, Any, str]] = []
    if optim.name != "muon" and optim.muon_lr != OptimOptions.muon_lr:
        unused.append(("optim.muon_lr", optim.muon_lr, "optim.name=muon"))
    if optim.schedule == "constant" and optim.final_lr != OptimOptions.final_lr:
        unused.append(("optim.final_lr", optim.final_lr, "optim.schedule=cosine or linear"))
    if objectives and data.opposites and not data.mask_content and not objectives.get("itm", {}).get("edited"):
        unused.append(("data.opposites", data.opposites, "data.mask_content and objectives.itm.edited"))
    if itc.get("init", "random") != "closed_form":
        for name, default in (("ridge", 0.3), ("init_samples", None)):
            if itc.get(name, default) != default:
                unused.append((f"objectives.itc.{name}", itc[name], "objectives.itc.init=closed_form"))
    for name, value, use in unused:
        log.warning("%s=%r has no effect here: it is for %s", name, value, use)


def explain_parser_error(message: str, options: Sequence[str], subcommands: Sequence[str] = ()) -> str:
    """Turn jsonargparse's message into one sentence, with a suggestion for a misspelt name.

    Args:
        message: Of the parser, maybe over several lines.
        options: The options it knows, like "model.fusion".
        subcommands: The subcommands it knows.
    """
    message = " ".join(line.strip() for line in message.strip().splitlines())
    unknown = re.search(r"unrecognized arguments: (--?([\w.]+))", message)
    if unknown:
        return f"there is no option {unknown.group(1)}.{_closest(unknown.group(2), options)}"
    choice = re.search(r"invalid choice: '([\w.-]+)'", message)
    if choice and subcommands:
        near = did_you_mean(choice.group(1), subcommands)
        return f"there is no subcommand '{choice.group(1)}'; allowed are {', '.join(subcommands)}.{near}"
    nested = re.search(r"(?:Group '([\w.]+)' does not accept option|Option) '([\w.]+)'(?: is not accepted)?", message)
    if nested:
        name = ".".join(filter(None, nested.groups()))
        return f"there is no option {name}.{_closest(name, options)}"
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
    if typed and (reason := _reason_in_class(typed.group(2))):
        return f"{typed.group(1)}: {reason}"
    if typed:
        said = re.sub(r"<class '([\w.]+)'>", r"\1", typed.group(2))
        return f"{typed.group(1)}: {said[:1].lower()}{said[1:]}"
    return message


def _reason_in_class(message: str) -> str:
    """Find why a callback or logger was refused among jsonargparse's attempts at every type; "" if there is no reason.

    Args:
        message: In one line, "... Errors: - ATTEMPT - ATTEMPT Given value ...".
    """
    option = re.search(r"there is no option \w+\.( Did you mean '\w+'\?)?", message)
    if option:
        return option.group(0)
    name = re.search(r"Expected a dot import path string: ([\w.]+)", message)
    if name is not None:
        from lightning.pytorch import callbacks, loggers

        near = did_you_mean(name.group(1), [*callbacks.__all__, *loggers.__all__])
        return f"there is no class {name.group(1)}; give a name of lightning.pytorch or a class's full path.{near}"
    attempts = message.partition(" Errors: - ")[2].partition(" Given value")[0].split(" - ")
    reasons = [attempt for attempt in attempts if not ATTEMPT_AT_A_TYPE.match(attempt)]
    return re.sub(r"Problem with given class_path '(?:[\w.]+\.)?(\w+)'", r"\1", reasons[0]) if reasons else ""


def explain_constructor_error(error: Exception) -> str:
    """Turn what the constructor of a callback or logger raised into one sentence."""
    message = " ".join(str(error).split())
    return f"trainer: {_reason_in_class(message) or message[:400] or type(error).__name__}"


def _closest(name: str, options: Sequence[str]) -> str:
    """Suggestion for a misspelt option; if none is close, for its section, as of Lightning's options not yet known."""
    near = did_you_mean(name, options)
    section, dot, option = name.partition(".")
    if not near and dot:
        near = did_you_mean(section, options).replace("'?", f".{option}'?")
    return near
