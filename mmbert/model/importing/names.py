"""Names of BERT's modules in mmbert's models and in published checkpoints."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from mmbert.model.importing.base import Computed, State

ABSENT = "used only where a text or an image is absent"


def absent(*names: str) -> dict[str, str]:
    """Return `Plan.new` for the learned vectors that stand for an absent modality."""
    return {f"mmbert.fusion.{name}": ABSENT for name in names}


def modules(pairs: Mapping[str, str]) -> dict[str, str | Computed]:
    """Map weight and bias of modules of the model to those of modules of the checkpoint."""
    return {f"{own}.{kind}": f"{theirs}.{kind}" for own, theirs in pairs.items() for kind in ("weight", "bias")}


def layers(own: str, theirs: str, numbers: Iterable[int], names: Mapping[str, str]) -> dict[str, str | Computed]:
    """Map layers; those of the model are counted from 0, those of the checkpoint are `numbers`.

    Args:
        own: Prefix of the model's layers, before the number.
        theirs: Prefix of the checkpoint's.
        numbers: Layers of the checkpoint.
        names: Module of a layer of the model -> of the checkpoint.
    """
    pairs = [(i, number, a, b) for i, number in enumerate(numbers) for a, b in names.items()]
    return modules({f"{own}.{i}.{a}": f"{theirs}.{number}.{b}" for i, number, a, b in pairs})


BERT_LAYER = {
    name: name
    for name in (
        *("attention.self.query", "attention.self.key", "attention.self.value"),
        *("attention.output.dense", "attention.output.LayerNorm"),
        *("intermediate.dense", "output.dense", "output.LayerNorm"),
    )
}
"""Modules of `BertLayer`, in our text encoder and in checkpoints."""

BERT_EMBEDDINGS = ("word_embeddings", "position_embeddings", "token_type_embeddings")


def embeddings(theirs: str) -> dict[str, str | Computed]:
    """Map the embeddings of BERT, their LayerNorm included."""
    own = "mmbert.text_encoder.bert.embeddings"
    tables: dict[str, str | Computed] = {f"{own}.{x}.weight": f"{theirs}.{x}.weight" for x in BERT_EMBEDDINGS}
    return {**tables, **modules({f"{own}.LayerNorm": f"{theirs}.LayerNorm"})}


class Head(NamedTuple):
    """The MLM head of a checkpoint."""

    options: dict[str, Any]  # of the objective mlm
    tensors: dict[str, str | Computed]
    unused: dict[str, str]


def mlm_head(state: State, theirs: str, word_embeddings: str) -> Head:
    """Map BERT's MLM head, whose output matrix is tied to the word embeddings where the file has the same values.

    Args:
        state: Tensors of the checkpoint.
        theirs: Prefix of the head.
        word_embeddings: Name of the word embedding matrix.
    """
    own = "objectives.mlm"
    names = modules({f"{own}.transform": f"{theirs}.transform.dense", f"{own}.norm": f"{theirs}.transform.LayerNorm"})
    bias, matrix = f"{theirs}.bias", f"{theirs}.decoder.weight"
    names[f"{own}.bias"] = bias if bias in state else f"{theirs}.decoder.bias"
    unused = {f"{theirs}.decoder.bias": f"same as {theirs}.bias"} if bias in state else {}
    tied = matrix not in state or torch.equal(state[matrix], state[word_embeddings])
    if tied:
        return Head({"weight": 1.0}, names, {**unused, matrix: "same as the word embeddings"})
    return Head({"weight": 1.0, "tied": False}, {**names, f"{own}.decoder.weight": matrix}, unused)
