"""Reading a published checkpoint from a folder, a file or the hub, without executing anything in it."""

import json
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor

from mmbert.errors import DataError, UsageError
from mmbert.model.hub import FILES, HUB_NAME
from mmbert.model.importing.base import State
from mmbert.model.weights import INDEX_FILE, SINGLE_FILE, check_finite, read_weights

PICKLES = (".bin", ".pth", ".pt", ".ckpt")
"""Endings of files that `torch.save` wrote."""
CONTENTS = ("state_dict", "model")
"""Keys under which training scripts save the tensors."""


class ReadSource(NamedTuple):
    """Files of a published checkpoint."""

    folder: Path  # where tokenizer and preprocessing are, if they are anywhere
    config: dict[str, Any]  # of config.json; empty without one
    state: State


def read_source(source: str) -> ReadSource:
    """Read configuration and tensors of a checkpoint.

    Args:
        source: Folder, file of weights, or name on the hub, OWNER/MODEL.

    Raises:
        UsageError: Nothing there, the hub does not give it, or a pickle that holds more than tensors.
        DataError: A broken file, or weights that are not finite.
    """
    path = _fetch(source)
    folder = path if path.is_dir() else path.parent
    file = folder / "config.json"
    config: dict[str, Any] = {}
    if file.is_file():
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
            assert isinstance(config, dict)
        except (OSError, ValueError, AssertionError) as error:
            raise DataError(str(file), f"no readable JSON object ({error})", "the file of the checkpoint") from error
    state = read_pickle(path) if path.is_file() else _read_folder(path)
    check_finite(state.items(), source)
    return ReadSource(folder, config, state)


def _fetch(source: str) -> Path:
    """Return the local folder or file; a name on the hub is fetched, without files that could hold code."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    if not HUB_NAME.fullmatch(source) or source.startswith("."):
        raise UsageError(f"'{source}' is no folder, no file, and no name on the hub such as OWNER/MODEL.")
    try:
        folder = Path(snapshot_download(source, allow_patterns=[*FILES]))
        if not [*folder.glob("*.safetensors")]:
            folder = Path(snapshot_download(source, allow_patterns=[*FILES, "pytorch_model.bin"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"'{source}' is no folder, and the hub does not give it: {reason}") from error
    return folder


def _read_folder(folder: Path) -> State:
    """Read the weights of a folder, from safetensors if there are any.

    Raises:
        UsageError: No weights, or several pickles.
    """
    if (folder / SINGLE_FILE).is_file() or (folder / INDEX_FILE).is_file():
        return read_weights(folder)
    files = sorted(file for file in folder.iterdir() if file.suffix in PICKLES)
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none of them"
        raise UsageError(
            f"'{folder}': expected {SINGLE_FILE} or one file that ends in {', '.join(PICKLES)}; found {found}."
        )
    return read_pickle(files[0])


def read_pickle(file: Path) -> dict[str, Tensor]:
    """Read the tensors of a file that `torch.save` wrote; code in it is not executed.

    Raises:
        UsageError: It holds Python objects, or no tensors.
        DataError: It is broken.
    """
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line or "nsupported" in line), "")
        raise UsageError(
            f"'{file}' is a pickle with Python objects besides tensors, and was not executed "
            f"({' '.join(reason.split())[:120]}); save its tensors alone, as safetensors."
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(str(file), f"no readable checkpoint ({reason})", "a file that torch.save wrote") from error
    for key in CONTENTS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise UsageError(f"'{file}' holds no named tensors.")
    return {str(k).removeprefix("module."): v for k, v in content.items() if isinstance(v, Tensor)}
