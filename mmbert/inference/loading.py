"""Loading a saved model's folder."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError

from mmbert.data.processor import MMBertProcessor
from mmbert.errors import DataError, UsageError
from mmbert.model.initialization import quiet_transformers
from mmbert.model.modeling import MMBertForPreTraining, MMBertForTask, MMBertModel, MMBertPreTrainedModel

CLASSES = {model.__name__: model for model in (MMBertForPreTraining, MMBertForTask, MMBertModel)}
"""Class names that config.json may have under "architectures"."""


def load_folder(path: str | Path) -> tuple[MMBertPreTrainedModel, MMBertProcessor]:
    """Load a saved model in fp32 and evaluation mode, and its processor.

    Every tensor of the file and every parameter of the model is accounted for.

    Args:
        path: Folder RUN/model, or one that `save_pretrained` wrote.

    Raises:
        UsageError: The folder is not a model of mmbert.
        DataError: Its weights are missing, broken or of another architecture.
    """
    folder = Path(path)
    try:
        config = json.loads((folder / "config.json").read_text())
        name = str((config.get("architectures") or [None])[0])
    except (OSError, ValueError, AttributeError) as error:
        hint = " A run has it below itself: RUN/model." if (folder / "model").is_dir() else ""
        raise UsageError(f"'{path}' is no mmbert model folder: no readable config.json.{hint}") from error
    if name not in CLASSES:
        raise UsageError(f"'{path}' holds a {name}; expected {', '.join(CLASSES)}, as save_pretrained writes it.")
    processor = MMBertProcessor.from_pretrained(folder)
    try:
        with quiet_transformers():
            model, report = CLASSES[name].from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            str(folder), f"weights that can't be loaded ({reason})", "what save_pretrained wrote"
        ) from error
    for kind in ("missing_keys", "unexpected_keys"):
        if report[kind]:
            found = f"{kind.replace('_', ' ')}, first {sorted(report[kind])[0]!r}"
            raise DataError(str(folder), found, f"the weights of the {name} that config.json describes")
    return model.eval(), processor
