"""Warm start: fusion layers and the MLM head start from the parts of a pretrained BERT that the text encoder lacks.

The multimodal layers of VisualBERT (arXiv:1908.03557), ALBEF (arXiv:2107.07651) and BLIP (arXiv:2201.12086) start from
BERT; each fusion strategy declares its own such layers in `Fusion.modules_from_bert`.
"""

import logging
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmbert.errors import UsageError
from mmbert.model.configuration import MMBertConfig
from mmbert.model.fusion.base import Fusion
from mmbert.model.modeling import HeadedModel, MMBertForPreTraining
from mmbert.model.pretrained_bert import OUTSIDE, PretrainedBert
from mmbert.model.weights import describe_counts

log = logging.getLogger("mmbert")

MLM_HEAD = {
    "transform.weight": "cls.predictions.transform.dense.weight",
    "transform.bias": "cls.predictions.transform.dense.bias",
    "norm.weight": "cls.predictions.transform.LayerNorm.weight",
    "norm.bias": "cls.predictions.transform.LayerNorm.bias",
    "bias": "cls.predictions.bias",
}
"""Parameters of `MaskedLanguageModeling` -> tensors of transformers' `BertForMaskedLM`."""
ROBERTA_MLM_HEAD = {
    "transform.weight": "lm_head.dense.weight",
    "transform.bias": "lm_head.dense.bias",
    "norm.weight": "lm_head.layer_norm.weight",
    "norm.bias": "lm_head.layer_norm.bias",
    "bias": "lm_head.bias",
}
"""The same for `RobertaForMaskedLM`."""


class WarmStart(NamedTuple):
    """Parameters that start from tensors of a BERT, and their description for the log."""

    sources: Mapping[str, str] = {}
    """Parameter of the model -> tensor in `PretrainedBert.state`."""
    description: str = ""

    @torch.no_grad()
    def apply(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Copy the tensors into the model, and log the description."""
        for name, source in self.sources.items():
            model.get_parameter(name).copy_(state[source])
        if self.description:
            log.info("%s", self.description)


def plan_warm_start(model: HeadedModel, bert: PretrainedBert) -> WarmStart:
    """Choose the tensors of a BERT from which fusion and MLM head start.

    Raises:
        UsageError: The file lacks a tensor of BERT's layers, or the fusion names a module that it does not have.
    """
    fusion, text = _plan_fusion(model.mmbert.fusion, bert)
    sources = {f"mmbert.fusion.{name}": source for name, source in fusion.items()}
    if isinstance(model, MMBertForPreTraining) and "mlm" in model.objectives:
        head, head_text = _plan_mlm_head(model.objectives["mlm"], model.config, bert)
        sources |= {f"objectives.mlm.{name}": source for name, source in head.items()}
        text = f"{text}; {head_text}"
    return WarmStart(sources, f"fusion_init=bert: {text}")


def _plan_fusion(fusion: Fusion, bert: PretrainedBert) -> tuple[dict[str, str], str]:
    """Return parameter of the fusion -> tensor of the BERT, and a description."""
    config, available = fusion.config, bert.config.num_hidden_layers
    modules = fusion.modules_from_bert()
    layers = sorted({number for name in modules.values() if (number := _layer_number(name)) is not None})
    where, random = f"text_pretrained='{bert.source}'", f"fusion='{config.fusion}' starts random"
    if not layers:
        return {}, f"{random}: it has no layers that BERT has"
    if layers[0] >= available:
        return {}, f"{random}: text_layers={config.text_layers} takes all {available} layers of {where}"
    differences = _differences(config)
    if differences:
        return {}, f"{random}: {differences} of {where}"
    if layers[-1] != available - 1:  # BERT's pooler reads its last layer
        modules = {own: theirs for own, theirs in modules.items() if not theirs.startswith("pooler.")}
    sources = _fusion_sources(fusion, modules, bert)
    parameters = [name for name, _ in fusion.named_parameters()]
    used = list(dict.fromkeys(_layer_or_module(source) for source in sources.values()))
    description = (
        f"{len(sources)} of {len(parameters)} tensors of fusion='{config.fusion}' start from {', '.join(used)}"
    )
    missing = sum(number >= available for number in layers)
    if missing:
        description += f"; {missing} of {len(layers)} layers start random"
    rest = describe_counts(_part(name) for name in parameters if name not in sources)
    return sources, f"{description}; random: {rest or 'none'}"


def _fusion_sources(fusion: Fusion, modules: Mapping[str, str], bert: PretrainedBert) -> dict[str, str]:
    """Return parameter of the fusion -> tensor of the BERT, for modules that the BERT has.

    Raises:
        UsageError: A tensor of one of its layers is missing or has another shape; an unknown module of the fusion.
    """
    sources: dict[str, str] = {}
    for own, theirs in modules.items():
        number = _layer_number(theirs)
        if number is not None and number >= bert.config.num_hidden_layers:
            continue
        try:
            parameters = fusion.get_submodule(own).named_parameters()
        except AttributeError as error:
            raise UsageError(
                f"fusion='{fusion.config.fusion}': modules_from_bert() names '{own}', which the fusion does not have."
            ) from error
        for kind, parameter in parameters:
            source = f"{theirs}.{kind}"
            tensor = bert.state.get(source)
            if tensor is not None and tensor.shape == parameter.shape:
                sources[f"{own}.{kind}"] = source
            elif number is not None:
                found = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}"
                raise UsageError(
                    f"text_pretrained='{bert.source}': '{source}', from which fusion.{own} of shape "
                    f"{tuple(parameter.shape)} starts, {found}; give intact weights, or model.fusion_init=random."
                )
    return sources


def _plan_mlm_head(head: nn.Module, config: MMBertConfig, bert: PretrainedBert) -> tuple[dict[str, str], str]:
    """Return parameter of the MLM head -> tensor of the BERT, all or none, and a description."""
    sources: dict[str, str] = {}
    tensors, name = (MLM_HEAD, "cls.predictions") if bert.config.model_type == "bert" else (ROBERTA_MLM_HEAD, "lm_head")
    for own, theirs in tensors.items():
        found = [
            n for n in bert.state if n.startswith(OUTSIDE) and f".{n.removeprefix(OUTSIDE)}".endswith(f".{theirs}")
        ]
        if len(found) != 1:
            return {}, f"the MLM head starts random: the file has {len(found) or 'no'} tensors named {theirs}"
        sources[own] = found[0]
        given, expected = tuple(bert.state[found[0]].shape), tuple(head.get_parameter(own).shape)
        if given != expected:
            return {}, f"the MLM head starts random: {theirs} has shape {given}, the model's {expected}"
    if config.text_hidden_act != "gelu":
        return {}, f"the MLM head starts random: its activation is gelu, BERT's {config.text_hidden_act}"
    return sources, f"the MLM head starts from {name}"


def _differences(config: MMBertConfig) -> str:
    """Describe how fusion layers differ from the text encoder's; empty if they are alike."""
    pairs = [
        (key, getattr(config, key), getattr(config, f"text_{key}"))
        for key in ("hidden_size", "num_attention_heads", "intermediate_size")
    ]
    pairs.append(("the activation", "gelu", config.text_hidden_act))
    pairs.append(("layer_norm_eps", config.layer_norm_eps, config.text_layer_norm_eps or config.layer_norm_eps))
    pairs.append(("fusion_norm", config.fusion_norm, "post"))
    return ", ".join(f"{key} is {own}, not the {text}" for key, own, text in pairs if own != text)


def _layer_number(name: str) -> int | None:
    """Return the number of the layer of `BertModel` that a module or tensor belongs to, counted from 0."""
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["encoder", "layer"] and len(parts) > 2 and parts[2].isdigit() else None


def _layer_or_module(source: str) -> str:
    """Return the layer or module of `BertModel` that a tensor belongs to: "encoder.layer.6", "pooler.dense"."""
    return source.rpartition(".")[0] if _layer_number(source) is None else ".".join(source.split(".")[:3])


def _part(name: str) -> str:
    """Return the part of the fusion that a parameter belongs to, without layer numbers: "layers.cross_attention"."""
    parts = [part for part in name.split(".") if not part.isdigit()]
    return ".".join(parts[: max(1, min(2, len(parts) - 1))])
