"""Reading safetensors weights, and copying them so that every tensor of file and module is accounted for."""

import json
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mmbert.errors import DataError, UsageError, quote

log = logging.getLogger("mmbert")

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


def shard_names(index: Path) -> list[str]:
    """Return the file names that a sharded model's index refers to, sorted.

    Raises:
        DataError: The index is not readable, or names a file outside of its folder.
    """
    try:
        names = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(
            str(index), f"no readable weight_map ({error})", "the index that save_pretrained writes"
        ) from error
    for name in names:
        if Path(name).name != name or (index.parent / name).is_symlink():
            raise DataError(f"{index}:weight_map", quote(name), "a file in the same folder")
    return names


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a model folder, from one safetensors file or from the shards of its index.

    Raises:
        UsageError: The folder has neither.
        DataError: A file is broken, or the index names a file outside of the folder.
    """
    if (folder / SINGLE_FILE).is_file():
        names = [SINGLE_FILE]
    elif (folder / INDEX_FILE).is_file():
        names = shard_names(folder / INDEX_FILE)
    else:
        raise UsageError(f"'{folder}' has no weights: expected {SINGLE_FILE} or {INDEX_FILE}.")
    state: dict[str, Tensor] = {}
    for name in names:
        try:
            state |= load_file(folder / name)
        except (OSError, SafetensorError) as error:
            raise DataError(str(folder / name), f"no readable safetensors file ({error})", "an intact file") from error
    return state


def check_finite(weights: Iterable[tuple[str, Tensor]], source: str) -> None:
    """Raise on weights that are no numbers, such as those of a run that diverged.

    Args:
        weights: Names and tensors; no buffers, which may be infinite on purpose.
        source: What they come from, for the message.

    Raises:
        DataError: A tensor has NaN or infinite values; with its name.
    """
    for name, value in weights:
        if value.is_floating_point() and not value.isfinite().all():
            raise DataError(source, f"NaN or infinite values in '{name}'", "finite weights")


def copy_weights(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str,
    unused: Callable[[str], str] = lambda name: "",
    used_elsewhere: Collection[str] = (),
) -> None:
    """Copy `state` into `module`, and log what was loaded and what was not.

    Args:
        module: Every one of its parameters and persistent buffers is set.
        state: Tensors of the file, by their names in `module`.
        source: What the weights come from, for messages.
        unused: Returns a label for a tensor that the module is known not to have, such as "pooler"; "" for others.
        used_elsewhere: Tensors that initialise other modules.

    Raises:
        UsageError: The file lacks a tensor, has it in another shape, or has one that is neither used nor known to be
            unused; with the first name.
    """
    expected = module.state_dict()
    missing = [name for name in expected if name not in state]
    if missing:
        raise UsageError(
            f"{source}: the file lacks {len(missing)} of the {len(expected)} tensors of the model, first "
            f"'{missing[0]}'; it has {len(state)}, first '{next(iter(state), '')}'."
        )
    mismatched = [name for name in expected if state[name].shape != expected[name].shape]
    if mismatched:
        first = mismatched[0]
        raise UsageError(
            f"{source}: {len(mismatched)} tensors have another shape than in the model, first '{first}': "
            f"{tuple(state[first].shape)} in the file, {tuple(expected[first].shape)} in the model."
        )
    others = [name for name in state if name not in expected]
    labels = {name: unused(name) for name in others if name not in used_elsewhere}
    unknown = [name for name, label in labels.items() if not label]
    if unknown:
        raise UsageError(
            f"{source}: the file has {len(unknown)} tensors that the model has no place for, first '{unknown[0]}'."
        )
    module.load_state_dict({name: state[name] for name in expected}, strict=True)
    log.info(
        "%s: %d of the %d tensors in the file loaded, which set all %d of the encoder%s%s",
        source, len(expected), len(state), len(expected),
        f"; {len(others) - len(labels)} more initialise fusion and heads" if len(others) > len(labels) else "",
        not_used(labels.values()),
    )  # fmt: skip


def not_used(labels: Iterable[str]) -> str:
    """Format the labels of unused tensors for a log line: "; not used: pooler (2)"."""
    counts = describe_counts(labels)
    return f"; not used: {counts}" if counts else ""


def describe_counts(labels: Iterable[str]) -> str:
    """Format labels with their number: "pooler (2), cls (8)"."""
    return ", ".join(f"{label} ({count})" for label, count in Counter(labels).items())
