"""Pretrained text encoders of the families in `text_families.py`, from the hub or a folder: configuration, weights."""

from typing import Any, NamedTuple

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PreTrainedConfig

from mmbert.errors import UsageError
from mmbert.model.pretrained_bert import (
    OUTSIDE,
    UNUSED_BUFFERS,
    check_keys,
    check_sizes,
    encoder_names,
    weights_folder,
)
from mmbert.model.text_families import COMMON_KEYS, FAMILIES, FamilyTextEncoder
from mmbert.model.weights import check_finite, copy_weights, read_weights

DISTILBERT_EPS = 1e-12
"""Epsilon of DistilBERT's LayerNorms, for which its configuration has no key."""


class PretrainedText(NamedTuple):
    """A text encoder as it was read: nothing is dropped before `load_text_weights` accounts for it."""

    source: str
    tower: str  # key of `FAMILIES`
    config: Any  # of transformers
    state: dict[str, Tensor]  # by the names of the family's model; others have OUTSIDE before them


def read_model_type(source: str) -> str | None:
    """Read `model_type` of a config.json on the hub or in a folder; None where there is no such file."""
    try:
        return str(PreTrainedConfig.get_config_dict(source)[0].get("model_type", "bert"))
    except OSError:
        return None


def read_text_encoder(source: str, tower: str) -> PretrainedText:
    """Read configuration and weights of a text encoder from the hub or a folder, safetensors only.

    Args:
        source: Name on the hub, or a folder with config.json and model.safetensors.
        tower: Its family, a key of `FAMILIES`.

    Raises:
        UsageError: No weights, or a configuration that mmbert can't express.
        DataError: Broken weights, or some that are not finite.
    """
    where = f"text_pretrained='{source}'"
    try:
        config = parse_config(PreTrainedConfig.get_config_dict(source)[0], source, tower)
        folder = weights_folder(source)
    except OSError as error:
        raise UsageError(
            f"{where}, a {tower}: {str(error).splitlines()[0]}; AutoModel.from_pretrained('{source}')"
            ".save_pretrained(FOLDER) of transformers writes them, and AutoTokenizer its tokenizer."
        ) from error
    state = read_weights(folder)
    check_finite(state.items(), where)
    return PretrainedText(source, tower, config, encoder_names(state, source, FAMILIES[tower].word_embeddings))


def parse_config(content: dict[str, Any], source: str, tower: str) -> Any:
    """Build the configuration of transformers from a config.json.

    Args:
        content: Of config.json.
        source: Where it comes from, for messages.
        tower: A key of `FAMILIES`.

    Raises:
        UsageError: A key or value that mmbert can't express.
    """
    family = FAMILIES[tower]
    known = {*COMMON_KEYS, *family.keys, *family.dropouts, *family.arguments, *family.unused}
    activation = next(key for key, name in family.keys.items() if name == "text_hidden_act")
    check_keys(content, source, known, activation=activation, model=tower)
    try:
        return family.config_class.from_dict(content)
    except (StrictDataclassError, TypeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"text_pretrained='{source}': config.json describes no {tower}: {reason}") from error


def fill_family_architecture(architecture: dict[str, Any], text: PretrainedText) -> None:
    """Set the keys of `Architecture` that a pretrained text encoder determines.

    Raises:
        UsageError: A key was given another value, or there are more layers than the encoder has.
    """
    family, layers = FAMILIES[text.tower], architecture["text_layers"]
    keys = {name: key for key, name in {**COMMON_KEYS, **family.keys}.items()}
    layers_key = keys.pop("text_layers")
    found = {name: getattr(text.config, key) for name, key in keys.items()}
    found = {"text_layer_norm_eps": DISTILBERT_EPS, **found}
    check_sizes(architecture, found, text.source, layers=getattr(text.config, layers_key))
    default = family.config_class(**{layers_key: max(layers, 1)})
    arguments: dict[str, Any] = {key: getattr(text.config, key, None) for key in family.arguments}
    if "layer_types" in arguments:  # one for each layer
        arguments["layer_types"] = arguments["layer_types"][:layers]
    arguments = {key: value for key, value in arguments.items() if value != getattr(default, key, None)}
    given = architecture["text_model_args"]
    if given and given != arguments:
        raise UsageError(f"text_model_args={given}, but text_pretrained='{text.source}' has {arguments}; leave it out.")
    architecture.update(found, text_tower=text.tower, text_model_args=arguments or None)


def load_text_weights(encoder: FamilyTextEncoder, text: PretrainedText) -> None:
    """Copy a pretrained model into the text encoder, which may have fewer layers and has no heads.

    Raises:
        UsageError: A tensor is missing, has another shape or is unknown; see `copy_weights`.
    """
    family, used = encoder.family, len(encoder.blocks()[1])
    layers = f"{family.layers}."

    def unused(name: str) -> str:
        if name.startswith(OUTSIDE):
            return name.removeprefix(OUTSIDE).split(".")[0]
        number = name.removeprefix(layers).split(".")[0]
        if name.startswith(layers) and number.isdigit() and used <= int(number) < text.config.num_hidden_layers:
            return f"{layers}{number}"
        return name if name in (*UNUSED_BUFFERS, *family.unused_tensors) else ""

    copy_weights(encoder.transformer, text.state, source=f"text_pretrained='{text.source}'", unused=unused)
