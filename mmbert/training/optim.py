"""AdamW or Muon with parameter groups, and the learning rate schedule."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from mmbert.model.modeling import HeadedModel
from mmbert.training.muon import Muon
from mmbert.training.options import OptimOptions

DECAYS: dict[str, Callable[[float], float]] = {  # progress after warm-up, 0 to 1 -> fraction of the way down, 1 to 0
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}


def parameter_groups(model: HeadedModel, options: OptimOptions) -> list[dict]:
    """Parameter groups: every trainable parameter in exactly one, by part of the model, weight decay and optimizer.

    As in BERT and timm: matrices, kernels and BERT's embedding tables are decayed; biases, norms, the ViT's position
    embeddings and class token, bottleneck tokens, stand-ins for an absent modality and temperatures are not.
    """
    parts: dict[str, tuple[nn.Module, ...]] = {
        "text": (model.mmbert.text_encoder,),
        "image": (model.mmbert.image_encoder,),
        "fusion": (model.mmbert.fusion, model.mmbert.text_projection, model.mmbert.image_projection),
        "head": (model.heads,),
    }
    factors = {part: getattr(options, f"{part}_lr_factor") for part in parts}
    of_itc: set[Tensor] = set()
    if options.itc_lr_factor != 1 and "itc" in model.heads._modules:  # else as one group with the other heads
        itc = model.heads.get_submodule("itc")
        of_itc, parts["itc"] = set(itc.parameters()), (itc,)
        factors["itc"] = options.itc_lr_factor * options.head_lr_factor
    groups = []
    for part, modules in parts.items():
        trainable = [
            (n, p)
            for module in modules
            for n, p in module.named_parameters()
            if p.requires_grad and (part == "itc" or p not in of_itc)
        ]
        matrices = hidden_matrices(modules) if options.name == "muon" and part not in ("head", "itc") else set()
        for name, lr, decay, chosen in (
            ("muon", options.muon_lr, options.weight_decay, [p for _, p in trainable if p in matrices]),
            (
                f"{options.weight_decay:g}",
                options.lr,
                options.weight_decay,
                [p for n, p in trainable if is_decayed(n, p) and p not in matrices],
            ),
            ("0", options.lr, 0.0, [p for n, p in trainable if not is_decayed(n, p)]),
        ):
            if chosen:
                group = {"params": chosen, "lr": lr * factors[part], "weight_decay": decay, "name": f"{part}/{name}"}
                groups.append({**group, "muon": True} if name == "muon" else group)
    return groups


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies to a parameter: to matrices, kernels and embedding tables of modules."""
    return parameter.ndim > 1 and name.rpartition(".")[2].endswith("weight")


def hidden_matrices(modules: Iterable[nn.Module]) -> set[Tensor]:
    """Find the weight matrices between hidden states: those of linear layers, not of embeddings and convolutions."""
    found = (m.weight for module in modules for m in module.modules() if isinstance(m, nn.Linear))
    return {weight for weight in found if weight.requires_grad}


def build_optimizer(
    model: HeadedModel,
    options: OptimOptions,
    total_steps: int,
    *,
    fused: bool = True,
    muon_dtype: torch.dtype = torch.float32,
) -> tuple:
    """Build the optimizer and its schedule over `total_steps` optimizer steps."""
    groups, arguments = parameter_groups(model, options), {"betas": options.betas, "fused": fused}
    if options.name == "muon":
        optimizer = Muon(groups, **arguments, dtype=muon_dtype)
    else:
        optimizer = torch.optim.AdamW(groups, **arguments)
    return optimizer, Schedule(optimizer, lambda step: lr_factor(step, total_steps, options))


class Schedule(LambdaLR):
    """Learning-rate schedule that skips parameter groups which a callback adds later, as `BaseFinetuning` does."""

    def get_lr(self) -> list[float | Tensor]:
        """Compute the learning rate of each group."""
        added = self.optimizer.param_groups[len(self.base_lrs) :]
        return [*super().get_lr(), *(group["lr"] for group in added)]


def lr_factor(step: int, total_steps: int, options: OptimOptions) -> float:
    """Learning rate at an optimizer step, counted from 0, as a fraction of the peak; both stages warm up and decay."""
    first = min(options.first_stage_steps, total_steps)
    if step < first:
        total_steps = first
    else:
        step, total_steps = step - first, total_steps - first
    warmup = math.ceil(options.warmup * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    return options.final_lr + (1 - options.final_lr) * DECAYS[options.schedule](progress)
