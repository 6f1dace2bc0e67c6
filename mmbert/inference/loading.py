"""Loading a saved model's folder."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError

from mmbert.data.processor import SETTINGS_FILE, MMBertProcessor
from mmbert.errors import DataError, UsageError
from mmbert.model.auto_classes import TASK_CLASSES, MMBertForImageTextRetrieval
from mmbert.model.configuration import MMBertConfig
from mmbert.model.hub import model_folder
from mmbert.model.initialization import quiet_transformers
from mmbert.model.modeling import MMBertForPreTraining, MMBertForTask, MMBertModel, MMBertPreTrainedModel
from mmbert.model.weights import check_finite

CLASSES: dict[str, type[MMBertPreTrainedModel]] = {
    model.__name__: model
    for model in (
        MMBertForPreTraining,
        MMBertForTask,
        MMBertModel,
        MMBertForImageTextRetrieval,
        *TASK_CLASSES.values(),
    )
}
"""Class names that config.json may have under "architectures"."""


def load_folder(path: str | Path) -> tuple[MMBertPreTrainedModel, MMBertProcessor]:
    """Load a saved model in fp32 and evaluation mode, and its processor.

    Every tensor of the file and every parameter of the model is accounted for.

    Args:
        path: Folder RUN/model, or one that `save_pretrained` wrote, or the name of one on the hub.

    Raises:
        UsageError: The folder is not a model of mmbert.
        DataError: Its weights are missing, broken, not finite or of another architecture; or the tokenizer or the
            image settings are those of another model.
    """
    folder = model_folder(path)
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
    check_finite(model.named_parameters(), str(folder))
    _check_processor(processor, model.config, folder)
    return model.eval(), processor


def _check_processor(processor: MMBertProcessor, config: MMBertConfig, folder: Path) -> None:
    """Raise where tokenizer or image settings are those of another model."""
    facts = {
        "entries in its tokenizer": (len(processor.tokenizer), config.vocab_size),
        f"max_text_length in {SETTINGS_FILE}": (processor.max_text_length, config.max_position_embeddings),
    }
    for what, (found, allowed) in facts.items():
        if found > allowed:
            raise DataError(str(folder), f"{found} {what}", f"at most {allowed}, as config.json says")
    if processor.image_settings.image_size != config.image_size:
        found = f"image_size={processor.image_settings.image_size} in {SETTINGS_FILE}"
        raise DataError(str(folder), found, f"{config.image_size}, as config.json says")
