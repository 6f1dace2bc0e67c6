"""The teacher of the objective distill: its check, its hash, and its vectors of the training data before step 1."""

import hashlib
import logging
from pathlib import Path

import torch
from torch import Tensor

from mmbert.data.datamodule import PairsDataModule, SplitsDataModule
from mmbert.data.encoder_cache import EncoderCache, StoredTensor
from mmbert.data.processor import SETTINGS_FILE
from mmbert.data.teacher_vectors import TeacherVectors, zero_vectors
from mmbert.data.tokenizers import MERGES_FILE, VOCABULARY_FILES
from mmbert.errors import UsageError
from mmbert.evaluation.model_cache import Computation, library_versions
from mmbert.inference.loading import load_folder
from mmbert.model.configuration import MMBertConfig
from mmbert.model.hub import model_folder
from mmbert.model.initialization import saved_config
from mmbert.model.modeling import MMBertForPreTraining, MMBertModel
from mmbert.model.objectives.itc import ImageTextContrast
from mmbert.model.options import KEYS, Architecture
from mmbert.training.encoder_caching import AUTO_FOLDER

log = logging.getLogger("mmbert")

STORE_FORMAT = 1
"""Changes where older vectors must not be read."""


def find_teacher(options: Architecture) -> Path | None:
    """Find and check the teacher's folder; None without the objective distill.

    Raises:
        UsageError: No teacher is named, or its folder is no saved model with the objective itc.
    """
    config = MMBertConfig(**{key: getattr(options, key) for key in KEYS})
    distill = None if config.task is not None else config.objective_options().get("distill")
    if distill is None:
        return None
    teacher = distill.get("teacher")
    if teacher is None:
        raise UsageError(
            "objectives.distill.teacher is missing: name the folder of a saved or imported model with the objective "
            "itc (--model.objectives.distill.teacher=FOLDER)."
        )
    folder = model_folder(teacher)
    saved = saved_config(str(folder))
    has_heads = saved.task is None and MMBertModel.__name__ not in (saved.architectures or [])
    if not has_heads or "itc" not in saved.objective_options():
        raise UsageError(
            f"objectives.distill.teacher='{teacher}' has no head of the objective itc; name a model that has one, such "
            "as a CLIP that mmbert import converted."
        )
    if saved.objective_options()["itc"].get("interaction") == "tokens":
        raise UsageError(
            f"objectives.distill.teacher='{teacher}' compares the vectors of all tokens (objectives.itc.interaction="
            "tokens), but a teacher needs one vector of each image and text; name another model."
        )
    return folder


def teacher_identity(folder: Path | None) -> dict[str, str]:
    """Return the part of the run's fingerprint that names the teacher; empty without one."""
    return {} if folder is None else {"teacher (SHA-256)": teacher_sha256(folder)[:16]}


def teacher_sha256(folder: Path) -> str:
    """Hash a teacher's weights, configuration, tokenizer and image settings."""
    total, kept = hashlib.sha256(), {"config.json", SETTINGS_FILE, MERGES_FILE, *VOCABULARY_FILES}
    for file in sorted(folder.iterdir()):
        if file.name in kept or file.suffix == ".safetensors":
            total.update(file.name.encode())
            with open(file, "rb") as handle:
                total.update(hashlib.file_digest(handle, "sha256").digest())
    return total.hexdigest()


def without_teacher(config: MMBertConfig) -> None:
    """Remove the teacher's folder from the configuration of a trained student, which needs it no more."""
    if isinstance(distill := config.objectives.get("distill"), dict):
        kept = {name: value for name, value in distill.items() if name != "teacher"}
        config.objectives = {**config.objectives, "distill": kept}


def use_teacher(
    folder: Path, config: MMBertConfig, data: SplitsDataModule, *, root: Path, computation: Computation, dry: bool
) -> None:
    """Compute the teacher's vectors of the training data, and let its samples read them; the teacher is dropped.

    Args:
        folder: Of the teacher.
        config: The student's.
        data: Its training images, without augmentation, and all of their captions are encoded.
        root: Folder of the runs: the vectors are kept where the encoder cache is (`data.cache`), and runs with the same
            teacher share them.
        computation: The trainer's precision and device.
        dry: Write nothing; the vectors are zeros.

    Raises:
        UsageError: The folder of the vectors can't be written.
        DataError: The teacher's files are damaged.
        BadImageError: An unreadable image, with `data.on_bad_sample=stop`.
    """
    assert isinstance(data, PairsDataModule)
    if dry:
        data.train_samples.teacher = zero_vectors
        return
    teacher, processor = load_folder(folder)
    assert isinstance(teacher, MMBertForPreTraining)
    itc, device, batch_size = teacher.objectives["itc"], computation.device, data.options.batch_size
    assert isinstance(itc, ImageTextContrast)
    teacher.to(device)  # pyright: ignore[reportArgumentType]
    log.info("objectives.distill: vectors of the teacher %s for the training images and captions", folder)

    @torch.no_grad()
    def encode_images(pixel_values: Tensor) -> Tensor:
        with computation.context():
            pixels = processor.image_settings.normalize(pixel_values.to(device))
            return itc.embed_image(teacher.mmbert.encode_image(pixels)).cpu()[:, None]

    @torch.no_grad()
    def encode_texts(texts: list[str]) -> Tensor:
        # Padded to one length, so that a vector does not depend on the texts beside it.
        inputs = processor(text=texts, padding="max_length").to(device)
        with computation.context():
            return itc.embed_text(teacher.mmbert.encode_text(inputs["input_ids"], inputs["attention_mask"])).cpu()

    facts = {
        "format": STORE_FORMAT, "teacher": teacher_sha256(folder), "precision": computation.precision,
        "device": device.type, "versions": library_versions(),
    }  # fmt: skip
    stored = StoredTensor((1, itc.text_projection.out_features), torch.float32)
    cache = data.options.cache
    root = root / AUTO_FOLDER if cache in (None, "auto") else Path(cache)
    images = EncoderCache(root, facts, stored, processor.image_settings)
    examples = data.train_samples.examples
    images.fill(
        [(example.image, None) for example in examples], encode_images, batch_size=batch_size,
        num_workers=data.options.num_workers, skip_unreadable=data.skip_unreadable,
    )  # fmt: skip
    temperature = config.objective_options()["distill"].get("temperature")
    vectors = TeacherVectors(images, facts, scale=float(itc.scale.detach()) if temperature is None else 1 / temperature)
    vectors.fill_texts([c for example in examples for c in example.captions], encode_texts, batch_size=batch_size)
    data.train_samples.teacher = vectors
