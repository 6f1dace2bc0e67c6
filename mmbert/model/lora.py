"""LoRA (arXiv:2106.09685) on the encoders: low-rank adapters are trained, their weights are frozen; needs peft."""

import importlib.util
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from mmbert.errors import UsageError, did_you_mean
from mmbert.model.encoders import Encoder
from mmbert.model.modeling import HeadedModel
from mmbert.runtime.randomness import torch_seed

log = logging.getLogger("mmbert")
TARGETS = {"text": ("text",), "image": ("image",), "both": ("text", "image")}
"""Value of `model.lora.targets` -> encoders that get adapters."""
ADAPTER = "default"
"""peft's name of the adapter."""


@dataclass(kw_only=True)
class LoraOptions:
    """Options of `model.lora`."""

    rank: int = 8
    """Rank of each adapter."""
    alpha: float = 16.0
    """Numerator of the scale alpha / rank of an adapter's output."""
    targets: str = "both"
    """Encoders that get adapters: text, image or both."""

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> "LoraOptions":
        """Build from a mapping.

        Raises:
            UsageError: An unknown key, a value that is not allowed, or peft is missing.
        """
        keys = [field.name for field in fields(cls)]
        for name in options:
            if name not in keys:
                raise UsageError(f"model.lora.{name}: allowed are {', '.join(keys)}.{did_you_mean(name, keys)}")
        found = cls(**options)
        if not isinstance(found.rank, int) or isinstance(found.rank, bool) or found.rank < 1:
            raise UsageError(f"model.lora.rank={found.rank!r}: a number of 1 or more.")
        if not isinstance(found.alpha, int | float) or isinstance(found.alpha, bool) or not 0 < found.alpha < math.inf:
            raise UsageError(f"model.lora.alpha={found.alpha!r}: a number above 0.")
        if not isinstance(found.targets, str) or found.targets not in TARGETS:
            near = did_you_mean(str(found.targets), TARGETS)
            raise UsageError(f"model.lora.targets={found.targets!r}; allowed are {', '.join(TARGETS)}.{near}")
        check_peft()
        return found


def check_peft() -> None:
    """Check that peft is installed.

    Raises:
        UsageError: It is not.
    """
    if importlib.util.find_spec("peft") is None:
        raise UsageError("model.lora needs peft, which is not installed: pip install 'mmbert[lora]'.")


def add_adapters(model: HeadedModel, options: LoraOptions, *, seed: int) -> None:
    """Freeze the encoders that `options.targets` names, and add trainable adapters to their transformer layers.

    An adapter computes B A x * alpha / rank beside W x; B starts at 0, so the model's outputs do not change.

    Args:
        model: With pretrained encoders; changed in place.
        options: See `LoraOptions`.
        seed: The run's seed, of the weights A.

    Raises:
        UsageError: peft is missing, or an encoder has no layer that adapters can be added to.
    """
    check_peft()
    from peft import LoraConfig, inject_adapter_in_model

    encoders: dict[str, Encoder] = {"text": model.mmbert.text_encoder, "image": model.mmbert.image_encoder}
    for name in TARGETS[options.targets]:
        encoder = encoders[name]
        layers = encoder.blocks()[1]
        inside = {module for layer in layers for module in layer.modules() if isinstance(module, nn.Linear)}
        found = [key for key, module in encoder.named_modules() if module in inside]
        if not found:
            raise UsageError(f"model.lora.targets={options.targets}: the {name} encoder has no layers; leave it out.")
        config = LoraConfig(r=options.rank, lora_alpha=options.alpha, target_modules=found)  # pyright: ignore
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_seed(seed, "lora", list(TARGETS["both"]).index(name)))
            inject_adapter_in_model(config, encoder, ADAPTER)
        check_adapters_are_used(encoder, name, model.config.image_size)
        trained = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
        log.info("LoRA of rank %d on %d linear layers of the %s encoder: %s parameters are trained, its own are frozen",
                 options.rank, len(found), name, f"{trained:,}")  # fmt: skip


def adapted_layers(module: nn.Module) -> dict[str, Any]:
    """Find the layers with an adapter, by name."""
    return {name: layer for name, layer in module.named_modules() if hasattr(layer, "lora_A")}


@torch.no_grad()
def check_adapters_are_used(encoder: Encoder, name: str, image_size: int) -> None:
    """Raise where an encoder reads the weight of an adapted layer without calling it, as some ViTs of timm do.

    Raises:
        UsageError: With the layer.
    """
    called: set[str] = set()
    adapted = adapted_layers(encoder)
    hooks = [layer.register_forward_hook(lambda *_, key=key: called.add(key)) for key, layer in adapted.items()]
    was_training = encoder.training
    encoder.eval()
    dtype = next(encoder.parameters()).dtype
    try:
        if name == "image":
            encoder(torch.zeros(1, 3, image_size, image_size, dtype=dtype))
        else:
            encoder(torch.zeros(1, 2, dtype=torch.int64))
    finally:
        encoder.train(was_training)
        for hook in hooks:
            hook.remove()
    unused = [key for key in adapted if key not in called]
    if unused:
        raise UsageError(
            f"model.lora: the {name} encoder does not call its layer {unused[0]}, so an adapter would have no effect; "
            f"set model.lora.targets to the other encoder."
        )


def merge_adapters(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add the adapters in a state dict to the weights they belong to, W + B A * alpha / rank.

    Args:
        model: With adapters, or without, where the state is returned as it is.
        state: Its full state dict.

    Returns:
        The state dict of the model without adapters.
    """
    merged = dict(state)
    for name, layer in adapted_layers(model).items():
        down = merged.pop(f"{name}.lora_A.{ADAPTER}.weight")
        up = merged.pop(f"{name}.lora_B.{ADAPTER}.weight")
        weight = merged.pop(f"{name}.base_layer.weight")
        merged[f"{name}.weight"] = weight + (up @ down) * layer.scaling[ADAPTER]
        if f"{name}.base_layer.bias" in merged:
            merged[f"{name}.bias"] = merged.pop(f"{name}.base_layer.bias")
    return merged
