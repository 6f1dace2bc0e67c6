"""Build model, processor and data of a run from its options, and the fingerprint that must not change on resume.

The cheapest part comes first, so that a wrong option is reported before weights or images are read.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import lightning as L

from mmbert.data.datamodule import PairsDataModule, SplitsDataModule
from mmbert.data.image_processor import ImageSettings
from mmbert.data.labelled_datamodule import LabelledDataModule, read_task_data
from mmbert.data.ngrams import find_ngrams
from mmbert.data.options import DataOptions
from mmbert.data.prepare import prepare_missing
from mmbert.data.processor import MMBertProcessor
from mmbert.data.tokenizers import load_tokenizer
from mmbert.errors import UsageError
from mmbert.model.configuration import MMBertConfig
from mmbert.model.initialization import build_model, has_head, saved_config
from mmbert.model.lora import TARGETS, LoraOptions, add_adapters
from mmbert.model.modeling import HeadedModel, MMBertForPreTraining, MMBertForTask
from mmbert.model.objectives.boxes import BoxClasses
from mmbert.model.objectives.mlm import MaskedLanguageModeling
from mmbert.model.objectives.ngrams import CaptionNGrams
from mmbert.model.options import KEYS, ModelOptions
from mmbert.training.option_checks import warn_of_unused_options
from mmbert.training.options import OptimOptions

log = logging.getLogger("mmbert")


FREEZE_OPTIONS = {"text": "freeze_text", "image": "freeze_image"}
"""Encoder -> its key of `OptimOptions`."""


class Parts(NamedTuple):
    """Model, processor and data of a run."""

    model: HeadedModel
    processor: MMBertProcessor
    data: SplitsDataModule
    preparation_seconds: float
    """Time that generating a missing data set took."""


def assemble(model_options: ModelOptions, data_options: DataOptions, optim: OptimOptions, *, seed: int) -> Parts:
    """Build tokenizer, model and data so that they fit each other.

    From scratch the model takes its vocabulary from the tokenizer; a pretrained text encoder brings its own, and the
    tokenizer must not go beyond it. The labels of a task come from its training data.

    Raises:
        UsageError: Options that contradict each other.
        DataError: Something is wrong with the annotations.
    """
    optim.check()
    if model_options.task is not None and optim.first_stage is not None:
        raise UsageError(
            f"optim.first_stage='{optim.first_stage}' trains one objective of pretraining alone, but "
            f"model.task={model_options.task} has none; leave first_stage and first_stage_steps out."
        )
    lora = _lora_options(model_options, optim)
    MMBertConfig(**{key: getattr(model_options, key) for key in KEYS})
    preparation_seconds = prepare_missing(data_options)
    tokenizer = _tokenizer(model_options, data_options)
    task, examples, labels = model_options.task, {}, []
    if task is not None:
        examples, labels = read_task_data(data_options, task)
    images_each = len(examples["train"][0].images) if examples else 1
    L.seed_everything(seed, verbose=False)
    model = build_model(model_options, labels=labels, num_images=images_each)
    config = model.config
    if len(tokenizer) > config.vocab_size:
        raise UsageError(
            f"data.tokenizer='{tokenizer.name_or_path}' has {len(tokenizer)} entries, but the text encoder embeds "
            f"{config.vocab_size}; use the tokenizer that belongs to it."
        )
    if data_options.max_text_length > config.max_position_embeddings:
        raise UsageError(
            f"data.max_text_length={data_options.max_text_length} is more than "
            f"model.max_position_embeddings={config.max_position_embeddings}."
        )
    if model_options.pretrained is None:
        settings = ImageSettings.of_timm(model.mmbert.image_encoder.vit.pretrained_cfg, config.image_size)
    else:
        settings = MMBertProcessor.from_pretrained(model_options.pretrained).image_settings
    processor = MMBertProcessor(tokenizer, settings, max_text_length=data_options.max_text_length)
    warn_of_unused_options(optim, data_options, config.objective_options() if task is None else {})
    data: SplitsDataModule
    if task is None:
        _check_mask_token(model, processor)
        data = PairsDataModule(data_options, processor, seed=seed)
        _start_ngrams(model, data)
        _start_boxes(model, data)
        _start_mlm_at_prior(model, data)
        if optim.first_stage is not None and optim.first_stage not in model.config.objective_options():
            names = ", ".join(model.config.objective_options())
            raise UsageError(f"optim.first_stage='{optim.first_stage}' is none of the objectives {names}.")
    else:
        data = LabelledDataModule(data_options, examples, labels, processor, task=task, seed=seed)
        _start_new_head_at_prior(model, model_options.pretrained, data)
    model.mmbert.text_encoder.freeze(optim.freeze_text)
    model.mmbert.image_encoder.freeze(optim.freeze_image)
    if task is None and "mim" in model.config.objective_options():
        model.mmbert.check_masking()
    if lora is not None:  # after `freeze`, which makes all other parameters trainable
        add_adapters(model, lora, seed=seed)
    if optim.activation_checkpointing:
        model.gradient_checkpointing_enable()
    if optim.compile:
        model.compile(dynamic=True)
    return Parts(model, processor, data, preparation_seconds)


def _lora_options(model: ModelOptions, optim: OptimOptions) -> LoraOptions | None:
    """Read `model.lora`; None without it.

    Raises:
        UsageError: Values that are not allowed, or other options that contradict it.
    """
    if model.lora is None:
        return None
    lora = LoraOptions.parse(model.lora)
    if optim.name == "muon":
        raise UsageError("optim.name=muon orthogonalizes updates of whole matrices, not of model.lora; use adamw.")
    for name in TARGETS[lora.targets]:
        option = FREEZE_OPTIONS[name]
        frozen = getattr(optim, option)
        if frozen != "none":
            raise UsageError(
                f"model.lora.targets={lora.targets} already freezes the weights of the {name} encoder and trains its "
                f"adapters, but optim.{option}={frozen}; leave one of them out."
            )
        if model.pretrained is None and getattr(model, f"{name}_pretrained") is None:
            raise UsageError(
                f"model.lora.targets={lora.targets}: the {name} encoder is random, and frozen it would stay so; give "
                f"model.{name}_pretrained or model.pretrained, or leave it out of the targets."
            )
    return lora


def _check_mask_token(model: HeadedModel, processor: MMBertProcessor) -> None:
    """Raise on objectives that read masked texts where the tokenizer has no mask token."""
    assert isinstance(model, MMBertForPreTraining)
    masked = [name for name, objective in model.objectives.items() if "masked" in objective.reads]  # pyright: ignore
    if masked and processor.tokenizer.mask_token is None:
        raise UsageError(
            f"the objectives {', '.join(masked)} read masked texts, but data.tokenizer="
            f"'{processor.tokenizer.name_or_path}' has no mask token; disable them (--model.objectives '{{itc: 1}}') "
            "or name another tokenizer."
        )


def _start_ngrams(model: HeadedModel, data: PairsDataModule) -> None:
    """Find the n-grams of the training captions and build the head of the objective ngrams for them.

    The head of `model.pretrained` is kept where it has the same n-grams.
    """
    assert isinstance(model, MMBertForPreTraining)
    objective = model.objectives["ngrams"] if "ngrams" in model.objectives else None
    if objective is None:
        return
    assert isinstance(objective, CaptionNGrams)
    frequencies = find_ngrams(
        data.train_samples.examples, longest=objective.longest, min_fraction=objective.min_fraction
    )
    if model.config.ngrams != [*frequencies]:
        objective.start([*frequencies.values()], std=model.config.initializer_range)
        model.config.ngrams = [*frequencies]
    log.info(
        "objective ngrams: %d n-grams of the training captions, %.1f an image, such as %s",
        len(frequencies), sum(frequencies.values()), ", ".join([*frequencies][-5:]),
    )  # fmt: skip


def _start_boxes(model: HeadedModel, data: PairsDataModule) -> None:
    """Read the boxes of the training images and build the head of the objective boxes for their classes.

    The head of `model.pretrained` is kept where it has the same classes.
    """
    assert isinstance(model, MMBertForPreTraining)
    objective = model.objectives["boxes"] if "boxes" in model.objectives else None
    if objective is None:
        if data.options.boxes:
            log.warning("data.boxes=%r has no effect here: it is for the objective boxes", data.options.boxes)
        return
    assert isinstance(objective, BoxClasses)
    covered = data.use_boxes()
    if model.config.box_classes != [*covered]:
        objective.start([*covered.values()], std=model.config.initializer_range)
        model.config.box_classes = [*covered]
    log.info(
        "objective boxes: %d classes, such as %s; their boxes cover %.1f %% of an image",
        len(covered), ", ".join([*covered][:5]), 100 * sum(covered.values()),
    )  # fmt: skip


def _start_mlm_at_prior(model: HeadedModel, data: PairsDataModule) -> None:
    """Start the bias of a new MLM head at the token frequencies of the training captions, if its option says so."""
    assert isinstance(model, MMBertForPreTraining)
    head = model.objectives["mlm"] if "mlm" in model.objectives else None
    if not isinstance(head, MaskedLanguageModeling) or head.initial_bias != "prior" or head.bias.any():
        return  # a bias that is not 0 is that of a checkpoint
    loss = head.start_at_prior(data.train_samples.token_counts(model.config.vocab_size))
    log.info("the head of mlm is new: its bias is the log-frequency of the captions' tokens, a loss of %.2f", loss)


def _start_new_head_at_prior(model: HeadedModel, pretrained: str | None, data: LabelledDataModule) -> None:
    """Start the head's bias at the label frequencies of training, unless `pretrained` has a head for these labels."""
    assert isinstance(model, MMBertForTask)
    if model.task.initial_bias != "prior" or (pretrained is not None and has_head(pretrained, model.config)):
        return
    loss = model.task.start_at_prior(data.train_samples.scores)
    log.info(
        "the head of %s is new: its bias is the prior of %s labels in %s training examples, so the first loss is "
        "about %.3f",
        model.config.task, f"{len(model.task.labels):,}", f"{len(data.train_samples.scores):,}", loss,
    )  # fmt: skip


def validate_architecture(requested: Mapping[str, Any], built: MMBertConfig) -> None:
    """Raise where pretrained weights or the tokenizer make another architecture than the one requested.

    Args:
        requested: Keys of the architecture that a file or the command line names; None stands for what fits. Keys that
            always follow the tokenizer are not compared.
        built: The model's.

    Raises:
        UsageError: With the key.
    """
    for key, value in requested.items():
        fact = getattr(built, key)
        if value is not None and value != fact and key not in ("objectives", "vocab_size", "pad_token_id"):
            raise UsageError(
                f"model.{key}={value!r}, but the pretrained weights have {fact!r}; leave it out, or give "
                f"--model.{key}={fact}."
            )


def validate_heads(options: ModelOptions, built: MMBertConfig) -> None:
    """Raise where the folder of the weights has no trained head for the task or an objective.

    Raises:
        UsageError: With the option that gives trained heads; or the task's head has other options.
    """
    saved = saved_config(str(options.pretrained))
    lacking = {*built.objective_options()} - {*saved.objective_options()} if built.task is None else {built.task}
    if saved.task != built.task or saved.labels != built.labels or (built.task is None and lacking):
        raise UsageError(
            f"model.pretrained='{options.pretrained}' has no head for {', '.join(sorted(lacking))} with these labels, "
            "so a random one would be evaluated: give --ckpt_path RUN/checkpoints/best-step=N.ckpt."
        )
    if (saved.task_options or {}) != (built.task_options or {}):
        raise UsageError(
            f"model.task_options={built.task_options}, but the head in model.pretrained='{options.pretrained}' was "
            f"trained with {saved.task_options}; give the same."
        )


def _tokenizer(model: ModelOptions, data: DataOptions) -> Any:
    """Load the tokenizer that the options name; a model from scratch takes its vocabulary from it."""
    source = data.tokenizer or model.pretrained or model.text_pretrained
    if source is None:
        raise UsageError("data.tokenizer is missing: name one, or a text encoder by model.text_pretrained.")
    if source == model.pretrained:
        saved_config(source)  # a mistyped folder is no tokenizer of the hub
    tokenizer = load_tokenizer(source)
    if model.pretrained is None and model.text_pretrained is None:
        model.vocab_size = len(tokenizer)
        model.pad_token_id = int(tokenizer.pad_token_id)  # pyright: ignore[reportArgumentType]
    return tokenizer


CHANGEABLE = {  # options that may change on resume: they change no number, or only what is reported
    "data.annotations", "data.images", "data.tokenizer", "data.num_workers", "data.eval_batch_size", "data.val_size",
    "data.test_captions", "data.max_bad_fraction", "data.questions", "data.image_names", "data.prepare",
    "data.boxes", "data.cache", "data.images_in_memory", "optim.activation_checkpointing", "optim.compile",
}  # fmt: skip


def tokenizer_checksum(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's content, independent of where it was loaded from."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = json.loads(backend.to_str()) if backend is not None else sorted(tokenizer.get_vocab().items())
    if isinstance(content, dict):
        content = {**content, "truncation": None, "padding": None}  # set by each call
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def run_identity(config: Any, built: MMBertConfig, data: SplitsDataModule) -> dict[str, Any]:
    """Run fingerprint: the options that change its numbers, and hashes of training samples and tokenizer.

    Args:
        config: The sections as parsed.
        built: The model's, partly from pretrained weights and tokenizer.
        data: Its training samples (names of images and texts) and tokenizer are hashed.

    Returns:
        Flat names to plain values, for a checkpoint.
    """
    sections = {name: config[name].as_dict() for name in ("model", "data", "optim")}
    sections["model"] |= {key: getattr(built, key) for key in KEYS}
    flat = {
        f"{s}.{k}": v for s, options in sections.items() for k, v in options.items() if f"{s}.{k}" not in CHANGEABLE
    }
    length = ("accumulate_grad_batches", "limit_train_batches", "max_epochs", "max_steps")
    trainer = {f"trainer.{k}": config.trainer[k] for k in (*length, "gradient_clip_val", "precision")}
    return {
        **{k: v if isinstance(v, int | float | str | None) else repr(v) for k, v in {**flat, **trainer}.items()},
        "seed_everything": int(config.seed_everything),
        "training pairs (SHA-256)": _examples_sha256(data, "train"),
        "tokenizer (SHA-256)": tokenizer_checksum(data.processor.tokenizer)[:16],
        **_boxes_sha256(data),
    }


def validation_identity(config: Any, data: SplitsDataModule) -> dict[str, Any]:
    """What metrics of validation depend on besides the weights; all of it may change on resume.

    Args:
        config: The sections as parsed.
        data: Its validation samples (names of images and texts) are hashed.

    Returns:
        Flat names to plain values, for a checkpoint: under other values its best score can't be compared.
    """
    limit = config.trainer.limit_val_batches
    return {
        "data.val_size": config.data.val_size,
        "evaluation.val_images": config.evaluation.val_images,
        "evaluation.val_scorer": config.evaluation.val_scorer,
        "trainer.limit_val_batches": limit,
        # Which samples a number of batches covers depends on their size.
        "data.eval_batch_size": None if limit in (None, 1.0) else config.data.eval_batch_size,
        "validation pairs (SHA-256)": _examples_sha256(data, "val"),
    }


def _boxes_sha256(data: SplitsDataModule) -> dict[str, str]:
    boxes = data.train_samples.boxes if isinstance(data, PairsDataModule) else None
    if boxes is None:
        return {}
    total = hashlib.sha256()
    for image in boxes:
        total.update(image.corners.tobytes() + image.classes.tobytes())
    return {"boxes (SHA-256)": total.hexdigest()[:16]}


def _examples_sha256(data: SplitsDataModule, split: str) -> str:
    total = hashlib.sha256()
    for example in data.examples.get(split, ()):
        total.update("\0".join([*example.contents, ""]).encode("utf-8", "surrogatepass"))
    return total.hexdigest()[:16]
