"""From names to a model: architecture, then the pretrained weights of BERT and of the ViT."""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel
from transformers.utils import logging as logging_of_transformers

from mmbert.errors import UsageError
from mmbert.model.configuration import MMBertConfig
from mmbert.model.encoders import create_vit
from mmbert.model.modeling import HeadedModel, MMBertForPreTraining, MMBertForTask
from mmbert.model.options import KEYS, ModelOptions

log = logging.getLogger("mmbert")


def build_model(options: ModelOptions, *, labels: Sequence[str] = (), num_images: int = 1) -> HeadedModel:
    """Builds the model that `options` describe and loads the pretrained weights they name.

    The weights are loaded after construction, because transformers redraws foreign weights during it.

    Args:
        options: Architecture and sources.
        labels: What `options.task` chooses from.
        num_images: Images of each text of the task.

    Raises:
        UsageError: A width, depth or name that does not fit the pretrained weights.
    """
    of_task = {} if options.task is None else {"labels": [*labels], "num_images": num_images}
    if options.pretrained is not None:
        return _build_from_folder(options, of_task)
    text = None if options.text_pretrained is None else load_bert(options.text_pretrained)
    vit: Any = None
    architecture = {name: getattr(options, name) for name in KEYS}
    if text is not None:
        _fill_from_bert(architecture, text.config, options.text_pretrained)
    if options.image_pretrained is not None:
        architecture["image_model"] = timm_name(options.image_pretrained)
        vit = create_vit(timm_source(options.image_pretrained), pretrained=True, img_size=options.image_size)
        _fill_from_vit(architecture, vit, options.image_pretrained)
    model = new_model(MMBertConfig(**architecture, **of_task))
    if text is not None:
        load_layers(
            model.mmbert.text_encoder.bert,
            text.state_dict(),
            unused="encoder.layer",
            source="text_pretrained",
        )
    if vit is not None:
        own = model.mmbert.image_encoder.vit
        load_layers(own, vit.state_dict(), unused="blocks", source="image_pretrained")
        own.pretrained_cfg = vit.pretrained_cfg  # mean, std and interpolation that these weights were trained with
    return model


def new_model(config: MMBertConfig) -> HeadedModel:
    """The model that `config` describes, with random weights."""
    return MMBertForPreTraining(config) if config.task is None else MMBertForTask(config)


STARTS_ANEW = ("objectives", "task", "hidden_dropout_prob", "attention_probs_dropout_prob")
"""Keys that may differ from those of the folder a model starts from."""


def saved_config(folder: str) -> MMBertConfig:
    """The configuration of a saved mmbert.

    Raises:
        UsageError: The folder holds none.
    """
    if not (Path(folder) / "model.safetensors").is_file() or not (Path(folder) / "config.json").is_file():
        raise UsageError(
            f"'{folder}' is no folder of a saved mmbert: config.json or model.safetensors is missing. "
            "A run leaves one in RUN/model."
        )
    try:
        return MMBertConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UsageError(f"'{folder}' is no folder of a saved mmbert: {error}") from error


def _build_from_folder(options: ModelOptions, of_task: dict[str, Any]) -> HeadedModel:
    folder = str(options.pretrained)
    if options.text_pretrained is not None or options.image_pretrained is not None:
        raise UsageError("model.pretrained gives both encoders; leave model.text_pretrained and image_pretrained out.")
    saved = saved_config(folder)
    default = ModelOptions()
    for key in KEYS:
        asked = getattr(options, key)
        if key in STARTS_ANEW:
            setattr(saved, key, asked)
        elif asked != getattr(default, key) and asked != getattr(saved, key):
            raise UsageError(
                f"model.{key}={asked!r}, but model.pretrained='{folder}' has {getattr(saved, key)!r}; leave it out."
            )
    saved.labels, saved.num_images = of_task.get("labels", []), of_task.get("num_images", 1)
    model = new_model(MMBertConfig(**{k: getattr(saved, k) for k in (*KEYS, "labels", "num_images")}))
    state = load_file(Path(folder) / "model.safetensors")
    own = model.state_dict()
    fitting = {name: x for name, x in state.items() if name in own and own[name].shape == x.shape}
    lacking = [name for name in own if name.startswith("mmbert.") and name not in fitting]
    if lacking:
        raise UsageError(f"model.pretrained='{folder}' lacks {len(lacking)} weights, such as {lacking[0]}.")
    model.load_state_dict(fitting, strict=False)
    fresh = sorted({".".join(name.split(".")[:2]) for name in own if name not in fitting})
    log.info("pretrained: %d tensors from %s; fresh: %s", len(fitting), folder, ", ".join(fresh) or "none")
    return model


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences transformers' reports and progress bars; errors are still raised."""
    level, bars = logging_of_transformers.get_verbosity(), logging_of_transformers.is_progress_bar_enabled()
    logging_of_transformers.set_verbosity_error()
    logging_of_transformers.disable_progress_bar()
    try:
        yield
    finally:
        logging_of_transformers.set_verbosity(level)
        if bars:
            logging_of_transformers.enable_progress_bar()


def load_bert(source: str) -> BertModel:
    """Loads a pretrained BERT without its pooler, in fp32, from the hub or a folder.

    Raises:
        UsageError: Nothing there, or another kind of model.
    """
    try:
        config = BertConfig.from_pretrained(source)
        if config.model_type != "bert":
            raise UsageError(f"text_pretrained='{source}' is a {config.model_type}; mmbert takes a BERT.")
        with quiet_transformers():  # it would report the pooler, which is not wanted, as unexpected
            return BertModel.from_pretrained(source, dtype=torch.float32, add_pooling_layer=False, use_safetensors=True)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"text_pretrained='{source}' is no BERT on the hub and no folder with one: {reason}"
        ) from error


def timm_source(source: str) -> str:
    """What `timm.create_model` understands: a folder gets timm's prefix, a hub name stays."""
    path = Path(source.removeprefix("local-dir:"))
    return f"local-dir:{path}" if source.startswith("local-dir:") or path.is_dir() else source


def timm_name(source: str) -> str:
    """The architecture of a pretrained ViT: from the folder's config.json, or the name itself.

    Raises:
        UsageError: A folder without a readable config.json.
    """
    resolved = timm_source(source)
    if not resolved.startswith("local-dir:"):
        if source.startswith((".", "/", "~")):
            raise UsageError(
                f"image_pretrained='{source}' is no folder; give one with config.json and model.safetensors."
            )
        return source
    file = Path(resolved.removeprefix("local-dir:")) / "config.json"
    try:
        return json.loads(file.read_text())["architecture"]
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"image_pretrained='{source}': {file} does not name a timm 'architecture' ({error!r})."
        ) from error


def load_layers(module: nn.Module, state: dict[str, Tensor], *, unused: str, source: str) -> None:
    """Copies pretrained weights into `module`, which may have fewer layers but lacks nothing.

    Args:
        module: The encoder.
        state: Weights of the pretrained encoder.
        unused: Prefix of the layers that may be left over.
        source: Name of the option, for messages.

    Raises:
        UsageError: A weight is missing or has another shape, or one that is no surplus layer is left over.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in state]
    shapes = [name for name in own if name in state and state[name].shape != own[name].shape]
    surplus = [name for name in state if name not in own and not name.startswith(f"{unused}.")]
    surplus = [name for name in surplus if not name.startswith(("pooler.", "embeddings.position_ids"))]
    if missing or shapes or surplus:
        raise UsageError(
            f"{source}: the pretrained weights do not fit; missing {missing[:3]} ({len(missing)}), other shape "
            f"{shapes[:3]} ({len(shapes)}), unknown {surplus[:3]} ({len(surplus)}). More layers than the pretrained "
            "encoder has, or another width?"
        )
    module.load_state_dict({name: state[name] for name in own}, strict=True)
    left = len(
        {name.removeprefix(f"{unused}.").split(".")[0] for name in state if name not in own and name.startswith(unused)}
    )
    log.info("%s: %d tensors loaded%s", source, len(own), f", the last {left} layers left out" if left else "")


def _fill_from_bert(architecture: dict, bert: BertConfig, source: str | None) -> None:
    if architecture["text_layers"] > bert.num_hidden_layers:
        raise UsageError(
            f"text_layers={architecture['text_layers']}, but text_pretrained='{source}' has {bert.num_hidden_layers}."
        )
    facts = {
        "text_hidden_size": bert.hidden_size,
        "text_num_attention_heads": bert.num_attention_heads,
        "text_intermediate_size": bert.intermediate_size,
    }
    for name, fact in facts.items():
        if architecture[name] not in (None, fact):
            raise UsageError(f"{name}={architecture[name]}, but text_pretrained='{source}' has {fact}; leave it out.")
    architecture.update(facts)
    for name in ("vocab_size", "max_position_embeddings", "layer_norm_eps", "pad_token_id"):
        architecture[name] = getattr(bert, name)


def _fill_from_vit(architecture: dict, vit: Any, source: str) -> None:
    if architecture["image_layers"] > len(vit.blocks):
        raise UsageError(
            f"image_layers={architecture['image_layers']}, but image_pretrained='{source}' has {len(vit.blocks)}."
        )
    facts = {
        "image_hidden_size": vit.num_features,
        "image_num_attention_heads": vit.blocks[0].attn.num_heads,  # weights of any number of heads fit any other
        "patch_size": vit.patch_embed.patch_size[0],
    }
    for name, fact in facts.items():
        if architecture[name] not in (None, fact):
            raise UsageError(f"{name}={architecture[name]}, but image_pretrained='{source}' has {fact}; leave it out.")
    architecture.update(facts)
