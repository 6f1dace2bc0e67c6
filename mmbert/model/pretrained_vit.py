"""Pretrained timm ViTs: architecture, arguments and weights, from the hub or a folder."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.models import get_pretrained_cfg, load_model_config_from_hf, load_state_dict_from_hf, parse_model_name
from timm.models._hub import load_model_config_from_path, load_state_dict_from_path
from torch import Tensor, nn

from mmbert.errors import UsageError
from mmbert.model.encoders import POOLING_PARTS, create_vit, side, vit_sizes
from mmbert.model.options import TIMM_FACTORY_ARGUMENTS, TIMM_KEYS
from mmbert.model.weights import check_finite, copy_weights, not_used

log = logging.getLogger("mmbert")

WRAPPER_PREFIXES = ("module.", "_orig_mod.")
"""Prefixes that DataParallel and torch.compile give all names."""


class PretrainedVit(NamedTuple):
    """A ViT of timm with the weights of its file, and what is needed to build it again without the file."""

    source: str
    architecture: str  # timm name, without a place of weights
    arguments: dict[str, Any]  # of the architecture, besides those that are keys of `Architecture`
    vit: Any


def read_vit(source: str, *, image_size: int) -> PretrainedVit:
    """Build the ViT that `source` names, load its weights, and account for every tensor of the file.

    Args:
        source: A timm name with a weights tag, "hf-hub:OWNER/NAME", or a folder with config.json and model.safetensors.
        image_size: Side of the images, in pixels; timm resamples the position embedding to it.

    Raises:
        UsageError: Nothing found, not a ViT, or a tensor that the file lacks or the ViT has no place for.
        DataError: Weights that are not finite.
    """
    where = f"image_pretrained='{source}'"
    name, architecture, saved_arguments, state = _read_source(source)
    for prefix in WRAPPER_PREFIXES:
        if all(tensor.startswith(prefix) for tensor in state):
            state = {tensor.removeprefix(prefix): value for tensor, value in state.items()}
    check_finite(state.items(), where)
    arguments = _arguments(saved_arguments, where)
    if "global_pool" not in arguments and "norm.weight" not in state and "fc_norm.weight" in state:
        arguments["global_pool"] = "avg"  # its tokens are not normalised before pooling
    with _recorded_loads() as loads:
        vit = create_vit(
            name,
            pretrained=True,
            pretrained_cfg_overlay={"source": "", "state_dict": dict(state)},
            img_size=image_size,
            **arguments,
        )
    vit.pretrained_cfg.pop("state_dict", None)
    _account(vit, state, loads, where)
    return PretrainedVit(source, architecture, arguments, vit)


def _read_source(source: str) -> tuple[str, str, dict[str, Any], dict[str, Tensor]]:
    """Return the name for timm, the architecture, its saved arguments, and the tensors of the file."""
    where = f"image_pretrained='{source}'"
    path = Path(source.removeprefix("local-dir:")).expanduser()
    try:
        if source.startswith("local-dir:") or path.is_dir():
            _, architecture, arguments = load_model_config_from_path(path)
            return f"local-dir:{path}", architecture, arguments, load_state_dict_from_path(path)
        if source.startswith((".", "/", "~")):
            raise UsageError(f"{where} is no folder; give one with config.json and model.safetensors.")
        scheme, identifier = parse_model_name(source)
        if scheme == "hf-hub":
            _, architecture, arguments = load_model_config_from_hf(identifier)
            return source, architecture, arguments, load_state_dict_from_hf(identifier)
        weights = get_pretrained_cfg(source)
        if weights is None or not weights.has_weights:
            raise UsageError(f"{where}: timm has no pretrained weights of that name; see timm.list_pretrained().")
        if weights.hf_hub_id is None or weights.custom_load:
            raise UsageError(f"{where}: timm has these weights in a format of their own; save them in a folder first.")
        file: dict[str, Any] = {} if weights.hf_hub_filename is None else {"filename": weights.hf_hub_filename}
        return source, source, {}, load_state_dict_from_hf(weights.hf_hub_id, **file)
    except UsageError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"{where}: no config.json and weights of a timm model found ({reason}).") from error


def _arguments(saved: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the saved arguments that change what the ViT computes and are not keys of `Architecture`."""
    if saved.get("in_chans") not in (None, 3):
        raise UsageError(f"{where} takes images of {saved['in_chans']} channels; mmbert has 3.")
    fixed = {"num_classes", "in_chans"} | TIMM_KEYS.keys()
    refused = [name for name in saved if name in TIMM_FACTORY_ARGUMENTS - fixed and saved[name]]
    if refused:
        raise UsageError(f"{where}: config.json has model_args.{refused[0]}, which is no argument of an architecture.")
    kept = {name: value for name, value in saved.items() if name not in fixed | TIMM_FACTORY_ARGUMENTS}
    if kept.get("global_pool") in ("token", "map", "", None):  # these pool behind the final norm
        kept.pop("global_pool", None)
    return kept


@contextmanager
def _recorded_loads() -> Iterator[list[tuple[set[str], Any]]]:
    """Record what `load_state_dict` got and did not find: timm loads non-strictly and logs the rest at level INFO."""
    original, loads = nn.Module.load_state_dict, []

    def recorded(self: nn.Module, state_dict: Any, *args: Any, **options: Any) -> Any:
        result = original(self, state_dict, *args, **options)
        loads.append((set(state_dict), result))
        return result

    nn.Module.load_state_dict = recorded
    try:
        yield loads
    finally:
        nn.Module.load_state_dict = original


def _account(vit: Any, state: dict[str, Tensor], loads: list[tuple[set[str], Any]], where: str) -> None:
    """Raise unless every tensor of the ViT was set, and every tensor of the file used or known to be unused."""
    if len(loads) != 1:
        raise UsageError(f"{where}: timm did not load these weights as tensors by name; save them in a folder first.")
    passed, result = loads[0]
    expected = vit.state_dict()
    missing = [name for name in result.missing_keys if name in expected]
    if missing:
        raise UsageError(
            f"{where}: the file lacks {len(missing)} of the {len(expected)} tensors of the model, first "
            f"'{missing[0]}'; it has {len(state)}, first '{next(iter(state), '')}'."
        )
    unknown = [name for name in result.unexpected_keys if not _is_head(name)]
    if unknown:
        raise UsageError(
            f"{where}: the file has {len(unknown)} tensors that the model has no place for, first '{unknown[0]}'."
        )
    unused = [name.split(".")[0] for name in state if _is_head(name) and name not in expected]
    converted = [name for name in state if name not in passed and not _is_head(name)]
    log.info(
        "%s: all %d tensors of the ViT loaded from the %d in the file%s%s",
        where, len(expected), len(state), not_used(unused),
        f"; {len(converted)} renamed or dropped by timm, first '{converted[0]}'" if converted else "",
    )  # fmt: skip


def _is_head(name: str) -> bool:
    return name.split(".")[0] in (*POOLING_PARTS, "pre_logits")


def fill_image_architecture(architecture: dict[str, Any], pretrained: PretrainedVit) -> None:
    """Set the keys of `Architecture` that a pretrained ViT determines.

    Raises:
        UsageError: A key was given another value, or there are more layers than the ViT has.
    """
    source, sizes = pretrained.source, vit_sizes(pretrained.vit)
    if architecture["image_layers"] > len(pretrained.vit.blocks):
        raise UsageError(
            f"image_layers={architecture['image_layers']}, but image_pretrained='{source}' has "
            f"{len(pretrained.vit.blocks)}."
        )
    facts: dict[str, Any] = {TIMM_KEYS[name]: sizes[name] for name in ("embed_dim", "num_heads", "patch_size")}
    facts["image_model_args"] = pretrained.arguments
    for key, fact in facts.items():
        if architecture[key] not in (None, {}, fact):
            raise UsageError(f"{key}={architecture[key]}, but image_pretrained='{source}' has {fact}; leave it out.")
    architecture.update(facts, image_model=pretrained.architecture)


def load_vit_weights(vit: Any, pretrained: PretrainedVit) -> None:
    """Copy a pretrained ViT into that of the image encoder, which may have fewer layers.

    Raises:
        UsageError: A tensor is missing, has another shape or is unknown; or the copy computes other numbers, because
            the architecture can't express the source.
    """
    where = f"image_pretrained='{pretrained.source}'"
    used, available = len(vit.blocks), len(pretrained.vit.blocks)

    def unused(name: str) -> str:
        parts = name.split(".")
        is_block = parts[0] == "blocks" and parts[1].isdigit() and used <= int(parts[1]) < available
        return ".".join(parts[:2]) if is_block else ""

    copy_weights(vit, pretrained.vit.state_dict(), source=where, unused=unused)
    vit.pretrained_cfg = pretrained.vit.pretrained_cfg  # mean, std and interpolation that it was trained with
    difference = _output_difference(vit, pretrained.vit)
    if difference > 1e-3:
        raise UsageError(
            f"{where}: built as image_model='{pretrained.architecture}' with {pretrained.arguments} its outputs "
            f"differ by {difference:.2g} from those of the source, so some of its arguments can't be expressed."
        )


@torch.no_grad()
def _output_difference(vit: Any, source: Any) -> float:
    """Return the largest difference of the two ViTs' outputs on one random image, relative to the largest output.

    The source loses the layers that the copy does not have.
    """
    source.blocks = source.blocks[: len(vit.blocks)]
    size = side(vit.patch_embed.img_size)
    pixel_values = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    training = vit.training
    got, expected = (model.eval().forward_features(pixel_values) for model in (vit, source))
    vit.train(training)
    return float((got - expected).abs().max() / expected.abs().max())
