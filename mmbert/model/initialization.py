"""Building a model from options: architecture, then the pretrained weights of BERT, ViT or a saved mmbert model."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.utils import logging as transformers_logging

from mmbert.errors import UsageError
from mmbert.model.configuration import MMBertConfig
from mmbert.model.modeling import HeadedModel, MMBertForPreTraining, MMBertForTask
from mmbert.model.options import KEYS, ModelOptions
from mmbert.model.pretrained_bert import PretrainedBert, fill_text_architecture, load_bert_weights, read_bert
from mmbert.model.pretrained_text import (
    PretrainedText,
    fill_family_architecture,
    load_text_weights,
    read_model_type,
    read_text_encoder,
)
from mmbert.model.pretrained_vit import fill_image_architecture, load_vit_weights, read_vit
from mmbert.model.text_families import FAMILIES, FamilyTextEncoder
from mmbert.model.warm_start import WarmStart, plan_warm_start
from mmbert.model.weights import INDEX_FILE, SINGLE_FILE, check_finite, describe_counts, not_used, read_weights

log = logging.getLogger("mmbert")


def build_model(options: ModelOptions, *, labels: Sequence[str] = (), num_images: int = 1) -> HeadedModel:
    """Build the model that `options` describe, and load the pretrained weights they name.

    A load accounts for every tensor of the file and every parameter of the encoder, or raises with the first name.

    Args:
        options: Architecture and sources of weights.
        labels: Classes of `options.task`.
        num_images: Images per text of the task.

    Raises:
        UsageError: Options that contradict each other or the pretrained weights; weights that lack a tensor or have an
            unknown one.
    """
    if options.fusion_init not in ("bert", "random"):
        raise UsageError(f"fusion_init='{options.fusion_init}': allowed are bert, random.")
    if options.pretrained_parts not in ("all", "encoders"):
        raise UsageError(f"model.pretrained_parts='{options.pretrained_parts}': allowed are all, encoders.")
    if options.pretrained_parts != "all" and options.pretrained is None:
        raise UsageError("model.pretrained_parts=encoders: model.pretrained, which they are taken from, is missing.")
    task_keys = {} if options.task is None else {"labels": [*labels], "num_images": num_images}
    if options.pretrained is not None:
        return _build_from_folder(options, task_keys)
    if options.image_pretrained is None and "." in options.image_model:
        name, tag = options.image_model.split(".", 1)
        raise UsageError(
            f"image_model='{options.image_model}' names weights ({tag}), but only image_pretrained loads weights: give "
            f"--model.image_pretrained {options.image_model}, or image_model={name} to train from scratch."
        )
    text = _read_text(options)
    architecture: dict[str, Any] = {name: getattr(options, name) for name in KEYS}
    if isinstance(text, PretrainedBert):
        fill_text_architecture(architecture, text)
    elif text is not None:
        fill_family_architecture(architecture, text)
    image = None
    if options.image_pretrained is not None:
        image = read_vit(options.image_pretrained, image_size=options.image_size)
        fill_image_architecture(architecture, image)
    model = new_model(MMBertConfig(**architecture, **task_keys))
    # After construction, because that draws all weights.
    if isinstance(text, PretrainedBert):
        start = plan_warm_start(model, text) if options.fusion_init == "bert" else WarmStart()
        bert: Any = model.mmbert.text_encoder.transformer
        load_bert_weights(bert, text, used_elsewhere={*start.sources.values()})
        start.apply(model, text.state)
    elif text is not None:
        assert isinstance(model.mmbert.text_encoder, FamilyTextEncoder)
        load_text_weights(model.mmbert.text_encoder, text)
        if options.fusion_init == "bert":
            log.info("fusion_init=bert: fusion and heads start random: text_pretrained='%s' is a %s, and only those of "
                     "a BERT fit them", text.source, text.tower)  # fmt: skip
    if image is not None:
        load_vit_weights(model.mmbert.image_encoder.vit, image)
    return model


def _read_text(options: ModelOptions) -> PretrainedBert | PretrainedText | None:
    """Read the pretrained text encoder, whose config.json tells its family.

    Raises:
        UsageError: `text_tower` says another family; see `read_bert` and `read_text_encoder`.
    """
    source, tower = options.text_pretrained, options.text_tower
    if source is None:
        return None
    if tower not in ("bert", *FAMILIES):
        raise UsageError(
            f"text_pretrained='{source}' loads a BERT, but text_tower='{tower}': leave "
            "one out. mmbert import converts a CLIP or a FLAVA for model.pretrained."
        )
    found = read_model_type(source)
    if found is not None and tower not in ("bert", found):  # bert is the default
        raise UsageError(f"text_pretrained='{source}' is a {found}, but text_tower='{tower}': leave text_tower out.")
    return read_text_encoder(source, found) if found in FAMILIES else read_bert(source)  # reports a missing file


def new_model(config: MMBertConfig) -> HeadedModel:
    """Build the model that `config` describes, with random weights."""
    return MMBertForPreTraining(config) if config.task is None else MMBertForTask(config)


STARTS_ANEW = ("objectives", "task", "task_options", "hidden_dropout_prob", "attention_probs_dropout_prob")
"""Keys that may differ from those of `model.pretrained`."""
FUSION_KEYS = (
    *("fusion", "fusion_layers", "fusion_norm", "fusion_final_norm", "intermediate_size", "pooler", "bridge_text_norm"),
    *("early_image_norm", "early_image_types", "early_pool", "early_class_token", "early_inputs"),
)
"""Keys of the fusion alone: with `model.pretrained_parts=encoders` they are those requested."""
FUSION = "mmbert.fusion."
"""Prefix of the fusion's parameters."""
CLASSES = {"ngrams": "ngrams", "boxes": "box_classes"}
"""Objective -> key of `MMBertConfig` with the classes of its head, which are those of the training data."""


def saved_config(folder: str) -> MMBertConfig:
    """Read the configuration of a saved mmbert model.

    Raises:
        UsageError: The folder has no configuration or no weights.
    """
    path = Path(folder)
    has_weights = (path / SINGLE_FILE).is_file() or (path / INDEX_FILE).is_file()
    if not has_weights or not (path / "config.json").is_file():
        raise UsageError(
            f"'{folder}' is no folder of a saved mmbert model: config.json or model.safetensors is missing. "
            "A run writes one to RUN/model."
        )
    try:
        return MMBertConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UsageError(f"'{folder}' is no folder of a saved mmbert model: {error}") from error


def _build_from_folder(options: ModelOptions, task_keys: dict[str, Any]) -> HeadedModel:
    """Build the model of a saved folder with the heads that the options name, and load the weights."""
    folder = str(options.pretrained)
    if options.text_pretrained is not None or options.image_pretrained is not None:
        raise UsageError("model.pretrained gives both encoders; leave model.text_pretrained and image_pretrained out.")
    new_fusion = options.pretrained_parts == "encoders"
    if options.fusion_init == "random" and not new_fusion:
        log.warning("model.fusion_init=random has no effect: model.pretrained='%s' has the fusion's weights", folder)
    saved = saved_config(folder)
    default = ModelOptions()
    for key in KEYS:
        requested = getattr(options, key)
        if key in STARTS_ANEW or (new_fusion and key in FUSION_KEYS):
            setattr(saved, key, requested)
        elif requested != getattr(default, key) and requested != getattr(saved, key):
            raise UsageError(
                f"model.{key}={requested!r}, but model.pretrained='{folder}' has {getattr(saved, key)!r}; leave it out."
            )
    saved.labels, saved.num_images = task_keys.get("labels", []), task_keys.get("num_images", 1)
    state = read_weights(Path(folder))
    for name, key in CLASSES.items():
        has_objective = options.task is None and name in saved.objective_options()
        if not has_objective or f"objectives.{name}.head.weight" not in state:
            setattr(saved, key, [])
    keys = (*KEYS, "labels", "num_images", *CLASSES.values())
    model = new_model(MMBertConfig(**{key: getattr(saved, key) for key in keys}))
    with_task = has_head(folder, model.config)
    _load_saved_weights(model, state, folder, with_task=with_task, with_fusion=not new_fusion)
    return model


def has_head(folder: str, config: MMBertConfig) -> bool:
    """Whether a saved model has a head for the same task, labels and number of images."""
    saved = saved_config(folder)
    return all(getattr(saved, key) == getattr(config, key) for key in ("task", "labels", "num_images"))


def _load_saved_weights(
    model: HeadedModel, state: dict[str, Tensor], folder: str, *, with_task: bool, with_fusion: bool
) -> None:
    """Load all weights of encoders and fusion, and those of heads that the folder has in the same shape.

    Args:
        model: Built with random weights.
        state: Weights of the folder.
        folder: For messages.
        with_task: Load the head of the task; a head for other labels may have the same shape.
        with_fusion: Load the fusion; otherwise it keeps its random weights.

    Raises:
        UsageError: A tensor of the encoders or the fusion is missing, has another shape or is unknown.
        DataError: Weights that are not finite.
    """
    where = f"model.pretrained='{folder}'"
    if state and not any(name.startswith("mmbert.") for name in state):
        state = {f"mmbert.{name}": value for name, value in state.items()}  # a saved MMBertModel
    if not with_fusion:
        state = {name: value for name, value in state.items() if not name.startswith(FUSION)}
    expected = model.state_dict()
    body = [name for name in expected if name.startswith("mmbert.") and (with_fusion or not name.startswith(FUSION))]
    missing = [name for name in body if name not in state]
    if missing:
        raise UsageError(f"{where} lacks {len(missing)} of {len(body)} weights, first '{missing[0]}'.")
    unknown = [name for name in state if name.startswith("mmbert.") and name not in expected]
    if unknown:
        raise UsageError(f"{where} has {len(unknown)} weights that the model has no place for, first '{unknown[0]}'.")
    mismatched = [name for name in body if state[name].shape != expected[name].shape]
    if mismatched:
        first = mismatched[0]
        raise UsageError(
            f"{where} has {len(mismatched)} weights of another shape, first '{first}': {tuple(state[first].shape)} "
            f"instead of {tuple(expected[first].shape)}."
        )
    loaded = {name: x for name, x in state.items() if name in expected and x.shape == expected[name].shape}
    if not with_task:
        loaded = {name: x for name, x in loaded.items() if _head_of(name) != "task"}
    fresh = [_head_of(name) for name in expected if name not in loaded]
    model.load_state_dict({**expected, **loaded}, strict=True)
    check_finite(model.named_parameters(), where)
    if isinstance(model, MMBertForPreTraining) and "itc" in model.objectives:
        itc: Any = model.objectives["itc"]
        itc.is_trained = "objectives.itc.text_projection.weight" in loaded
    unused = [_head_of(name) for name in state if name not in loaded]
    log.info(
        "%s: %d of the %d tensors in the file loaded; newly initialized: %s%s",
        where, len(loaded), len(state), describe_counts(fresh) or "none", not_used(unused),
    )  # fmt: skip


def _head_of(name: str) -> str:
    """Return the fusion, objective or task that a parameter belongs to: "fusion", "objectives.itc", "task"."""
    if name.startswith(FUSION):
        return "fusion"
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "objectives" else parts[0]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the reports and progress bars of transformers; errors are still raised."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
