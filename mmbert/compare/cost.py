"""What a model costs: parameters, FLOPs of a training step and of a pair, milliseconds a pair.

FLOPs are those of the mathematical operations: 2 m n k for a matrix product (m, k) x (k, n), and a convolution as the
product it is. Embedding look-ups, norms, softmax, GELU, losses and the optimizer count 0. Nothing that is computed
again counts twice, so that a number does not depend on the path that was taken: attention is two products forward and
four backward, whether a kernel keeps `q k^T` or computes it anew, and activation checkpointing is off while counting.
"""

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mmbert.data.datamodule import SplitsDataModule
from mmbert.model.configuration import MMBertConfig
from mmbert.model.initialization import new_model
from mmbert.model.modeling import HeadedModel, MMBertForTask
from mmbert.model.options import KEYS
from mmbert.runtime.randomness import torch_generator

Batch = dict[str, Tensor]

CHECKPOINTING = ("gradient_checkpointing", "grad_checkpointing", "checkpointing")
"""Flags of modules of transformers, of timm and of `mmbert.model.layers.FusionLayer` that recompute activations."""


class Parameters(NamedTuple):
    """Numbers of weights of a model."""

    total: int
    trained: int


def count_parameters(config: MMBertConfig, strategy: str, fusion_layers: int, intermediate_size: int) -> int:
    """Parameters of the whole model with another fusion part; no weight is drawn.

    Args:
        config: Of a model as built, so that the widths of pretrained encoders are in it.
        strategy: Its fusion strategy.
        fusion_layers: Depth of the fusion part.
        intermediate_size: Width of its feed-forward blocks.

    Raises:
        UsageError: There is no such model.
    """
    keys = {key: getattr(config, key) for key in (*KEYS, "labels", "num_images")}
    part = {"fusion": strategy, "fusion_layers": fusion_layers, "intermediate_size": intermediate_size}
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return parameters(new_model(MMBertConfig(**{**keys, **part}))).total


def parameters(model: torch.nn.Module) -> Parameters:
    """Counts a model's parameters, all and those in training; a shared one counts once."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return Parameters(sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained))


def count_flops(work: Callable[[], object]) -> int:
    """FLOPs of what `work` does, forward and backward; see the head of this file for what counts."""
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        work()
    return counter.get_total_flops()


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Scores and weighted values of (B, H, L, D/H) queries, (B, H, S, D/H) keys and values: two products."""
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[2] * (width + value[3])


def _attention_backward_flops(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Gradients of both factors of both products; torch's own formula adds the scores that are computed anew."""
    return 2 * _attention_flops(query, key, value)


_aten = torch.ops.aten
FORMULAS = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,  # without a formula it would count 0
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    _aten._scaled_dot_product_flash_attention_backward: _attention_backward_flops,
    _aten._scaled_dot_product_efficient_attention_backward: _attention_backward_flops,
    _aten._scaled_dot_product_cudnn_attention_backward: _attention_backward_flops,
}
"""Formulas of fused attention besides torch's own; they hold in `count_flops` only."""


def flops_per_step(model: HeadedModel, batches: Iterable[Batch]) -> float:
    """FLOPs of a training step, mean over `batches`: text lengths and masked words differ between them.

    A step is one batch; where gradients are accumulated, an optimizer step is several of these. Frozen parts are
    charged no backward pass. Gradients, weights and torch's random states stay as they are.

    Args:
        model: As it is trained, frozen where it is frozen, in training mode.
        batches: One or more, images normalised; see `first_batches`.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step(batch: Batch) -> None:
        # `forward` itself, so that a compiled model is counted as it is written.
        loss = model.forward(batch, generator=torch_generator(0, "flops")).loss
        assert loss is not None
        torch.autograd.grad(loss, trained, allow_unused=True)

    with _unchanged(model), torch.enable_grad():
        return statistics.fmean([count_flops(functools.partial(step, batch)) for batch in batches])


def flops_per_pair(model: HeadedModel, batch: Batch) -> float:
    """FLOPs of encoding, fusing and judging one text with its image, mean over a batch (padding counts)."""
    with _unchanged(model), _evaluating(model):
        return count_flops(lambda: _judge(model, batch)) / len(batch["input_ids"])


def milliseconds_per_pair(model: HeadedModel, batch: Batch, *, repeats: int = 10) -> float:
    """Milliseconds of encoding, fusing and judging one text with its image: median over `repeats` of a whole batch.

    One more batch goes before them, unmeasured: first calls allocate and choose kernels.
    """
    device = batch["input_ids"].device
    seconds = []
    with _unchanged(model), _evaluating(model):
        for _ in range(1 + repeats):
            start = time.perf_counter()
            _judge(model, batch)
            synchronize(device)
            seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds[1:]) / len(batch["input_ids"])


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has done what it was told; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _judge(model: HeadedModel, batch: Batch) -> Tensor:
    """What the model says of pairs: the task's logits, else the matching score, else the joint vector."""
    core = model.mmbert
    text = core.encode_text(batch["input_ids"], batch["attention_mask"])
    if isinstance(model, MMBertForTask):
        image = core.encode_image(batch["pixel_values"]) if model.task.num_images else None
        return model.task.logits(model.task.pooled(core, text, image))
    pooled = core.fuse(text, core.encode_image(batch["pixel_values"])).pooled
    itm: Any = model.objectives["itm"] if "itm" in model.objectives else None
    return pooled if itm is None else itm.score(pooled)


@contextmanager
def _unchanged(model: HeadedModel) -> Iterator[None]:
    """Counts without activation checkpointing, and puts it and torch's random states back."""
    devices = [p.device for p in itertools.islice(model.parameters(), 1) if p.device.type == "cuda"]
    on = [(m, name) for m in model.modules() for name in CHECKPOINTING if getattr(m, name, False) is True]
    for module, name in on:
        setattr(module, name, False)
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, name in on:
            setattr(module, name, True)


@contextmanager
def _evaluating(model: HeadedModel) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode it was in."""
    asked, modes = model.training, [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(asked)
        for module, training in modes:
            module.training = training


def first_batches(data: SplitsDataModule, count: int) -> Iterator[Batch]:
    """The first training batches of a run in their order, images normalised.

    No loader is iterated: it would draw from torch's random state.
    """
    sampler: Any = data.train_dataloader().batch_sampler
    for number in range(count):
        epoch, step = divmod(number, len(sampler))
        sampler.position = (epoch, step)
        batch = data.collate([data.train_samples[index] for index in next(iter(sampler))])
        yield data.on_after_batch_transfer(batch, 0)
