"""Pretrained BERT and RoBERTa text encoders: configuration and weights, from the hub or a folder."""

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import BertConfig, BertModel, CamembertConfig, RobertaConfig, XLMRobertaConfig
from transformers.activations import ACT2FN
from transformers.utils.hub import cached_file

from mmbert.errors import UsageError, did_you_mean
from mmbert.model.fusion.base import BERT_NAMES
from mmbert.model.text_families import FAMILIES
from mmbert.model.weights import INDEX_FILE, SINGLE_FILE, check_finite, copy_weights, read_weights, shard_names

CONFIGS: dict[str, Any] = {
    config.model_type: config for config in (BertConfig, RobertaConfig, XLMRobertaConfig, CamembertConfig)
}
"""Value of `model_type` in config.json -> class of the configuration. All but the first are RoBERTas
(arXiv:1907.11692), whose position table begins with rows that stand for no position."""

POSITIONS = "embeddings.position_embeddings.weight"
WORD_EMBEDDINGS = "embeddings.word_embeddings.weight"
"""A tensor that every BERT has; what stands before it in a file is the prefix of the encoder's names."""

REQUIRED_VALUES = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "pruned_heads": {},
    "auto_map": {},
}
"""Keys of a BERT's config.json that change what it computes, with the only value that mmbert can express."""

UNUSED_KEYS = frozenset(
    # Pooler and heads.
    "directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type "
    "classifier_dropout id2label label2id num_labels problem_type finetuning_task task_specific_params "
    # Training; dropout is an option of training here.
    "hidden_dropout_prob attention_probs_dropout_prob gradient_checkpointing initializer_range use_cache output_past "
    "tie_word_embeddings tie_encoder_decoder chunk_size_feed_forward "
    # Provenance and outputs.
    "model_type architectures transformers_version name_or_path dtype torch_dtype return_dict output_hidden_states "
    "output_attentions output_scores return_dict_in_generate attn_implementation torchscript tf_legacy_loss "
    "use_bfloat16 cross_attention_hidden_size tokenizer_class prefix "
    # Generation, which old versions of transformers saved with every model.
    "bos_token_id eos_token_id sep_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id max_length "
    "min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p "
    "repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids "
    "num_return_sequences remove_invalid_values suppress_tokens begin_suppress_tokens exponential_decay_length_penalty "
    "".split()
)
"""Keys of a BERT's config.json without effect on the outputs of its encoder in evaluation mode."""

USED_KEYS = {
    "hidden_size": "text_hidden_size",
    "num_attention_heads": "text_num_attention_heads",
    "intermediate_size": "text_intermediate_size",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "type_vocab_size": "type_vocab_size",
    "layer_norm_eps": "layer_norm_eps",
    "pad_token_id": "pad_token_id",
    "hidden_act": "text_hidden_act",
}
"""Keys of `BertConfig` -> keys of `Architecture` that they set."""


class PretrainedBert(NamedTuple):
    """A BERT as it was read: nothing is dropped before `load_bert_weights` accounts for it."""

    source: str
    config: Any  # of BERT or RoBERTa, which have the same keys
    state: dict[str, Tensor]  # by the names of `BertModel`; tensors outside of the encoder have OUTSIDE before them


OUTSIDE = "outside of the encoder: "

UNUSED_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")
"""Constants that old versions of transformers saved."""


def read_bert(source: str) -> PretrainedBert:
    """Read configuration and weights of a BERT or RoBERTa from the hub or a folder, safetensors only.

    Of a RoBERTa only the rows of real positions are kept, so that it computes as a BERT.

    Args:
        source: Name on the hub, or a folder with config.json and model.safetensors.

    Raises:
        UsageError: Nothing found, another kind of model, or a configuration that mmbert can't express.
        DataError: Broken weights, or some that are not finite.
    """
    try:
        content: dict[str, Any] = BertConfig.get_config_dict(source)[0]
        kind = content.get("model_type", "bert")
        if kind not in CONFIGS:
            allowed = ", ".join((*CONFIGS, *FAMILIES))
            raise UsageError(f"text_pretrained='{source}' is a {kind}; allowed are {allowed}.")
        known = {field.name for field in dataclasses.fields(CONFIGS[kind])}
        check_keys(content, source, known, activation="hidden_act", model="BERT" if kind == "bert" else kind)
        config = CONFIGS[kind].from_dict(content)
        first = 0 if kind == "bert" else config.pad_token_id + 1
        folder = weights_folder(source)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"text_pretrained='{source}' is no BERT on the hub and no folder with one: {reason}"
        ) from error
    except (StrictDataclassError, TypeError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        reason = " ".join(str(error).split())
        raise UsageError(f"text_pretrained='{source}': config.json describes no BERT: {reason}") from error
    state = read_weights(folder)
    check_finite(state.items(), f"text_pretrained='{source}'")
    state = encoder_names(state, source, WORD_EMBEDDINGS)
    if POSITIONS in state:
        state[POSITIONS] = state[POSITIONS][first:]
    config.max_position_embeddings -= first
    return PretrainedBert(source, config, state)


def weights_folder(source: str) -> Path:
    """Return the folder with the weights, downloaded if `source` names a model on the hub.

    Raises:
        OSError: No safetensors weights.
    """
    if Path(source).is_dir():
        folder = Path(source)
        if not (folder / SINGLE_FILE).is_file() and not (folder / INDEX_FILE).is_file():
            raise OSError(f"no {SINGLE_FILE} in the folder; other formats of weights are not read")
        return folder
    file = cached_file(source, SINGLE_FILE, _raise_exceptions_for_missing_entries=False)
    if file is None:
        file = cached_file(source, INDEX_FILE, _raise_exceptions_for_missing_entries=False)
        if file is None:
            raise OSError(f"no {SINGLE_FILE}; other formats of weights are not read")
        for name in shard_names(Path(file)):
            cached_file(source, name)
    return Path(file).parent


def check_keys(content: dict[str, Any], source: str, known: Collection[str], *, activation: str, model: str) -> None:
    """Check that mmbert knows what every key of a config.json means for the outputs of the encoder.

    Args:
        content: Of config.json.
        source: Where it comes from, for messages.
        known: Keys of this kind of model, besides the `UNUSED_KEYS` of all.
        activation: The one with the name of the activation.
        model: Name of the kind of model, for messages.

    Raises:
        UsageError: An unknown key, or a value that mmbert can't express.
    """
    where, expected = f"text_pretrained='{source}'", REQUIRED_VALUES
    for key, value in content.items():
        if key in expected:
            if value not in (None, expected[key]):
                raise UsageError(f"{where}: config.json has {key}={value!r}; mmbert takes {expected[key]!r} only.")
        elif key not in known and key not in UNUSED_KEYS and not key.startswith("_"):
            raise UsageError(
                f"{where}: config.json has {key}={value!r}, which transformers' {model} does not have, so the outputs "
                "may not be those of the encoder. If it has no effect, remove the key from a copy of the folder."
            )
    name = content.get(activation, "gelu")
    if name not in ACT2FN:
        raise UsageError(
            f"{where}: config.json has {activation}={name!r}, which transformers does not have."
            f"{did_you_mean(str(name), ACT2FN)}"
        )


def encoder_names(state: dict[str, Tensor], source: str, word_embeddings: str) -> dict[str, Tensor]:
    """Rename tensors to the names of the encoder, whatever prefix a wrapper or a larger model gave them.

    Args:
        state: Tensors of the file.
        source: Where they come from, for messages.
        word_embeddings: Name of a tensor in the encoder; what stands before it in the file is the prefix.

    Returns:
        The tensors; those that do not have the prefix get `OUTSIDE` before their names.

    Raises:
        UsageError: The file has no word embeddings, those of several encoders, or a tensor under two names.
    """
    endings = (word_embeddings, f".{word_embeddings}")
    found = sorted(
        {name.removesuffix(word_embeddings) for name in state if name == endings[0] or name.endswith(endings[1])}
    )
    if len(found) != 1:
        places = ", ".join(repr(prefix) for prefix in found)
        raise UsageError(
            f"text_pretrained='{source}': "
            + (f"the file has several text encoders, under {places}; save one of them alone." if found else
               f"none of its {len(state)} tensors is named ...{word_embeddings}; the first is "
               f"'{next(iter(state), '')}'.")
        )  # fmt: skip
    prefix, renamed = found[0], {}
    for name, value in state.items():
        inner = name.removeprefix(prefix) if name.startswith(prefix) else OUTSIDE + name
        # TensorFlow's names of the LayerNorm parameters, in old files.
        inner = inner.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if inner in renamed:
            raise UsageError(f"text_pretrained='{source}': the file has '{inner}' under two names, one is '{name}'.")
        renamed[inner] = value
    return renamed


def fill_text_architecture(architecture: dict[str, Any], bert: PretrainedBert) -> None:
    """Set the keys of `Architecture` that a pretrained BERT determines.

    Raises:
        UsageError: A key was given another value, or there are more layers than the BERT has.
    """
    found = {name: getattr(bert.config, key) for key, name in USED_KEYS.items()}
    check_sizes(architecture, found, bert.source, layers=bert.config.num_hidden_layers)
    architecture.update(found)


def check_sizes(architecture: dict[str, Any], found: dict[str, Any], source: str, *, layers: int) -> None:
    """Check that the options contradict no size of a pretrained text encoder.

    Args:
        architecture: As the options say, by keys of `Architecture`.
        found: As the encoder has it.
        source: Where it comes from, for messages.
        layers: Its number of layers.

    Raises:
        UsageError: A key was given another value, or there are more layers than the encoder has.
    """
    if architecture["text_layers"] > layers:
        raise UsageError(f"text_layers={architecture['text_layers']}, but text_pretrained='{source}' has {layers}.")
    for name in ("text_hidden_size", "text_num_attention_heads", "text_intermediate_size"):
        if architecture[name] not in (None, found[name]):
            raise UsageError(
                f"{name}={architecture[name]}, but text_pretrained='{source}' has {found[name]}; leave it out."
            )


def load_bert_weights(module: BertModel, bert: PretrainedBert, *, used_elsewhere: Collection[str] = ()) -> None:
    """Copy a pretrained BERT into the text encoder, which may have fewer layers and has no pooler.

    Args:
        module: The text encoder.
        bert: As `read_bert` returns it.
        used_elsewhere: Tensors of its state that initialise other modules; see `mmbert.model.warm_start`.

    Raises:
        UsageError: A tensor is missing, has another shape or is unknown; see `copy_weights`.
    """
    used, available = len(module.encoder.layer), bert.config.num_hidden_layers

    def unused(name: str) -> str:
        if name.startswith(OUTSIDE):
            return name.removeprefix(OUTSIDE).split(".")[0]
        parts = name.split(".")
        layer = ".".join(parts[:3])
        if parts[:2] == ["encoder", "layer"] and parts[2].isdigit() and used <= int(parts[2]) < available:
            is_copied = any(other.startswith(f"{layer}.") for other in used_elsewhere)
            return layer if not is_copied or ".".join(parts[3:-1]) in BERT_NAMES.values() else ""
        return name if name in UNUSED_BUFFERS else "pooler" if parts[0] == "pooler" else ""

    copy_weights(
        module, bert.state, source=f"text_pretrained='{bert.source}'", unused=unused, used_elsewhere=used_elsewhere
    )
