"""`import_checkpoint`: a published checkpoint as the folder of an mmbert model."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchvision.transforms import InterpolationMode
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mmbert.data.image_processor import ImageSettings
from mmbert.data.processor import MMBertProcessor
from mmbert.data.tokenizers import VOCABULARY_FILES
from mmbert.errors import DataError, UsageError
from mmbert.model.importing import Checkpoint, Plan, plan_import
from mmbert.model.importing.building import Account, build
from mmbert.model.importing.reading import read_source
from mmbert.model.modeling import MMBertPreTrainedModel

IMPORT_FILE = "import.json"
"""File of the folder that records the source, and what became of its tensors."""


def import_checkpoint(
    source: str,
    out: str | Path,
    *,
    partial: bool = False,
    tokenizer: str | None = None,
    labels: Sequence[str] = (),
    image_size: int | None = None,
) -> Account:
    """Convert a published checkpoint to a folder that `mmbert.load` and transformers' Auto classes read.

    The folder appears complete or not at all.

    Args:
        source: Folder, file of weights, or name on the hub; families are in `mmbert.model.importing.SOURCES`.
        out: Folder to write; it must not exist.
        partial: Also import a checkpoint that lacks tensors of the model, or has some that it has no place for.
        tokenizer: Folder or name on the hub of the tokenizer; None: that in the source.
        labels: Classes of the task's head, where the checkpoint does not name them.
        image_size: Side of the images, in pixels; the positions are interpolated. None: that of the checkpoint.

    Returns:
        What became of each tensor.

    Raises:
        UsageError: Not a checkpoint that mmbert can express; a partial one without `partial`; `out` exists.
        DataError: A broken file.
    """
    target = Path(out).expanduser()
    if target.exists():
        raise UsageError(f"'{out}' exists; give a new folder.")
    read = read_source(source)
    checkpoint = Checkpoint(source, read.config, read.state, tuple(labels))
    plan = plan_import(checkpoint)
    if image_size is not None:
        plan.config["image_size"] = image_size
    words = _tokenizer(read.folder, source, tokenizer)
    if words.pad_token_id is not None:
        plan.config.setdefault("pad_token_id", words.pad_token_id)
    model, account = build(plan, checkpoint, partial=partial)
    length = min(plan.max_text_length, model.config.max_position_embeddings)
    processor = MMBertProcessor(
        words, image_settings(read.folder, plan, model.config.image_size), max_text_length=length
    )
    if len(words) > model.config.vocab_size:
        raise UsageError(
            f"the tokenizer has {len(words)} entries, the checkpoint {model.config.vocab_size}; name its own by "
            "--tokenizer."
        )
    _write(target, model, processor, {"source": source, **account._asdict()})
    return account


def _tokenizer(folder: Path, source: str, given: str | None) -> PreTrainedTokenizerBase:
    """Load the tokenizer that was given, else that beside the weights.

    Raises:
        UsageError: There is none.
    """
    if given is None and not any((folder / name).is_file() for name in VOCABULARY_FILES):
        raise UsageError(f"'{source}' has no tokenizer; name one by --tokenizer, a folder or a name on the hub.")
    try:
        return AutoTokenizer.from_pretrained(given or folder)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"no tokenizer at '{given or folder}': {reason}") from error


def image_settings(folder: Path, plan: Plan, image_size: int) -> ImageSettings:
    """Read preprocessor_config.json of the checkpoint, if there is one; else take the family's usual settings."""
    file = folder / "preprocessor_config.json"
    settings: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), **plan.image_settings}
    if file.is_file():
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            names = {"image_mean": "mean", "image_std": "std"}
            settings |= {own: tuple(content[theirs]) for theirs, own in names.items() if theirs in content}
            if "resample" in content:
                settings["interpolation"] = RESAMPLE[content["resample"]].value
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(str(file), f"no readable preprocessing ({error})", "the checkpoint's own file") from error
    return ImageSettings(image_size, **settings)


RESAMPLE = {
    0: InterpolationMode.NEAREST,
    1: InterpolationMode.LANCZOS,
    2: InterpolationMode.BILINEAR,
    3: InterpolationMode.BICUBIC,
}
"""Pillow's numbers of resampling filters."""


def _write(target: Path, model: MMBertPreTrainedModel, processor: MMBertProcessor, record: dict[str, Any]) -> None:
    """Write the folder under another name, and rename it when it is complete."""
    temporary = target.with_name(f".{target.name}.importing")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        (temporary / IMPORT_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        temporary.rename(target)
    except OSError as error:
        raise UsageError(f"'{target}' can't be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
