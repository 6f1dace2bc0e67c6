"""FSDP2: parameters, gradients and optimizer state are spread over the processes, layer by layer."""

from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mmbert.errors import UsageError
from mmbert.model.layers import FusionLayer
from mmbert.model.modeling import HeadedModel


def fsdp_strategy(devices: Any, nodes: int) -> ModelParallelStrategy:
    """Lightning's strategy `model_parallel` as mmbert uses it: data-parallel, with the full state dict in one file.

    Raises:
        UsageError: `devices` is no number, so the size of the mesh is not known.
    """
    if not str(devices).isdigit():
        raise UsageError(f"trainer.strategy=model_parallel needs trainer.devices as a number; it is {devices!r}.")
    size = int(devices) * nodes
    return ModelParallelStrategy(data_parallel_size=size, tensor_parallel_size=1, save_distributed_checkpoint=False)


def shard(model: HeadedModel, mesh: DeviceMesh) -> None:
    """Shard every transformer layer by itself, and the rest (embeddings, heads) with the model."""
    if isinstance(model, FSDPModule):
        return
    encoders = model.mmbert.text_encoder, model.mmbert.image_encoder
    layers = [layer for encoder in encoders for layer in encoder.blocks()[1]]
    layers += [module for module in model.modules() if isinstance(module, FusionLayer)]
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def gather_shards(model: HeadedModel) -> None:
    """Unshard all parameters until `spread_shards`, for an evaluation.

    It calls parts of the model by themselves, and not as often on every rank, so no call may wait for the other ranks.
    """
    if isinstance(model, FSDPModule):
        # Before the first training step: else FSDP takes the first module that is called, an encoder, for the root.
        model._get_fsdp_state()._lazy_init()
        model.set_reshard_after_forward(False)
        for module in _sharded_modules(model):
            module.unshard()


def spread_shards(model: HeadedModel) -> None:
    """Reshard after the evaluation."""
    if isinstance(model, FSDPModule):
        model.set_reshard_after_forward(True)
        model.set_reshard_after_forward(False, recurse=False)  # as `fully_shard` has it for the outermost module
        for module in _sharded_modules(model):
            module.reshard()


def _sharded_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def full_tensor(value: Tensor) -> Tensor:
    """The full tensor of a sharded one; others as they are."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def copy_full(parameter: Tensor, value: Tensor) -> None:
    """Copy a full tensor into a parameter that may be sharded; all ranks must call it."""
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value.to(parameter), parameter.device_mesh, parameter.placements)
    parameter.copy_(value)


def load_full_state_dict(module: nn.Module, state: dict[str, Any]) -> None:
    """Load a full state dict into a model that may be sharded."""
    set_model_state_dict(module, state, options=StateDictOptions(full_state_dict=True))


def full_state_dict(model: nn.Module) -> dict[str, Any]:
    """The full state dict of a model that may be sharded, on rank 0; all ranks must call it."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
