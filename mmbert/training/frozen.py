"""Frozen weights, which checkpoints leave out: they are named and hashed instead, and never change."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mmbert.errors import UsageError


def drop_frozen(checkpoint: dict[str, Any], module: nn.Module, facts: dict[str, Any] | None) -> dict[str, Any] | None:
    """Remove frozen parameters from a checkpoint's `state_dict`.

    Args:
        checkpoint: About to be saved; changed in place. One with averaged weights is left alone.
        module: The training module.
        facts: What an earlier call returned, which saves hashing again.

    Returns:
        `names` and `sha256` of what was removed, for `restore_frozen`; None if nothing was.
    """
    if "current_model_state" in checkpoint:  # weight averaging keeps two models, of which only names agree
        return None
    names = sorted(name for name, p in module.named_parameters() if not p.requires_grad)
    if not names:
        return None
    if facts is None or facts["names"] != names:
        facts = {"names": names, "sha256": weights_sha256(module, names)}
    removed = set(names)
    checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in removed}
    return facts


def restore_frozen(checkpoint: dict[str, Any], module: nn.Module) -> None:
    """Put the frozen parameters of a module into a checkpoint that was saved without them.

    Raises:
        UsageError: The module's frozen weights are not those that the checkpoint was trained with.
    """
    facts = checkpoint["mmbert"].get("frozen")
    if facts is None:
        return
    own = dict(module.named_parameters())
    if not own.keys() >= set(facts["names"]) or weights_sha256(module, facts["names"]) != facts["sha256"]:
        raise UsageError(
            f"the checkpoint was saved without its {len(facts['names'])} frozen weights ({facts['names'][0]}, ...), "
            "and those of this model are others: give the same model.text_pretrained, model.image_pretrained or "
            "model.pretrained that it was trained with."
        )
    checkpoint["state_dict"] |= {name: own[name].detach() for name in facts["names"]}


def validate_cached(checkpoint: dict[str, Any], module: nn.Module) -> None:
    """Check that a checkpoint has the frozen weights of the module, by which the encoder cache was filled.

    Raises:
        UsageError: It has others, as one may that was saved with its frozen weights.
    """
    for name, parameter in module.named_parameters():
        saved = checkpoint["state_dict"].get(name)
        if not parameter.requires_grad and saved is not None and ".image_encoder." in name:
            if saved.shape != parameter.shape or not saved.to(parameter.device).equal(parameter):
                raise UsageError(
                    f"the checkpoint has another frozen weight {name} than this model, whose frozen image encoder "
                    "filled the encoder cache: give the weights that it was trained with, or data.cache=null."
                )


def weights_sha256(module: nn.Module, names: Sequence[str]) -> str:
    """SHA-256 over names, shapes and values of parameters."""
    own, total = dict(module.named_parameters()), hashlib.sha256()
    for name in names:
        value = own[name].detach().cpu().contiguous()
        total.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        total.update(value.view(-1).view(torch.uint8).numpy().tobytes())  # numpy has no bf16
    return total.hexdigest()
