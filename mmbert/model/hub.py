"""Folders of saved models that are on the Hugging Face hub."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from mmbert.errors import UsageError

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
FILES = ("*.json", "*.txt", "*.model", "*.safetensors")
"""Files of a model folder; nothing that could hold code is fetched."""


def model_folder(source: str | Path, **options: Any) -> Path:
    """Return the folder of a saved model; a name OWNER/MODEL that is no local path is fetched from the hub.

    Args:
        source: Folder, or a name on the hub.
        options: `revision`, `token`, `cache_dir` and `local_files_only` of the hub; others are ignored.

    Raises:
        UsageError: The hub has no such model, or can't be reached.
    """
    folder = Path(source).expanduser()
    if folder.exists() or not HUB_NAME.fullmatch(str(source)) or str(source).startswith("."):
        return folder
    known = {k: options[k] for k in ("revision", "token", "cache_dir", "local_files_only") if k in options}
    try:
        return Path(snapshot_download(str(source), allow_patterns=[*FILES], **known))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"'{source}' is neither a folder nor a model that the hub gives: {reason}") from error
