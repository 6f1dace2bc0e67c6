"""Cost of a model: parameters, FLOPs per training step and per pair, milliseconds per pair.

FLOPs are those of the mathematical operations: 2 m n k for a matrix product (m, k) x (k, n), and a convolution as a
matrix product. Embedding look-ups, norms, softmax, GELU, losses and the optimizer count 0. Recomputation is not
counted, so the number does not depend on the kernel: attention is two products forward and four backward, whether a
kernel keeps `q k^T` or recomputes it, and activation checkpointing is off while counting.
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
from mmbert.model.tokens import Reads
from mmbert.runtime.randomness import torch_generator
from mmbert.training.momentum import MomentumDistillation

Batch = dict[str, Tensor]

CHECKPOINTING = ("gradient_checkpointing", "grad_checkpointing", "checkpointing")
"""Flags of modules of transformers, timm and `mmbert.model.layers.FusionLayer` that enable activation checkpointing."""


class Parameters(NamedTuple):
    """Number of parameters of a model."""

    total: int
    trained: int


def count_parameters(config: MMBertConfig, strategy: str, fusion_layers: int, intermediate_size: int) -> int:
    """Count the parameters of a model with another fusion module, without initializing weights.

    Args:
        config: Configuration of a built model, which has the widths of pretrained encoders.
        strategy: Fusion strategy.
        fusion_layers: Depth of the fusion module.
        intermediate_size: Width of its feed-forward blocks.

    Raises:
        UsageError: There is no such model.
    """
    keys = {key: getattr(config, key) for key in (*KEYS, "labels", "num_images")}
    part = {"fusion": strategy, "fusion_layers": fusion_layers, "intermediate_size": intermediate_size}
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return parameters(new_model(MMBertConfig(**{**keys, **part}))).total


def parameters(model: torch.nn.Module) -> Parameters:
    """Count a model's parameters, all and trained ones; a shared parameter counts once."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return Parameters(sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained))


def count_flops(work: Callable[[], object]) -> int:
    """Count the FLOPs of `work`, forward and backward, as this module's docstring defines them."""
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        work()
    return counter.get_total_flops()


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Scores and weighted values of (B, H, L, D/H) queries, (B, H, S, D/H) keys and values: two products."""
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[2] * (width + value[3])


def _attention_backward_flops(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Gradients of both factors of both products; torch's own formula adds the recomputed scores."""
    return 2 * _attention_flops(query, key, value)


_aten = torch.ops.aten
FORMULAS = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,  # without a formula torch counts 0
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    _aten._scaled_dot_product_flash_attention_backward: _attention_backward_flops,
    _aten._scaled_dot_product_efficient_attention_backward: _attention_backward_flops,
    _aten._scaled_dot_product_cudnn_attention_backward: _attention_backward_flops,
}
"""FLOP formulas of fused attention that replace or extend torch's, used by `count_flops` only."""


def flops_per_step(
    model: HeadedModel, batches: Iterable[Batch], *, momentum: MomentumDistillation | None = None, **stage: str
) -> float:
    """FLOPs of a training step, mean over `batches`, which differ in text lengths and masked tokens.

    A step is one batch; with gradient accumulation an optimizer step is several of them. Frozen parts have no backward
    pass. Gradients, weights and torch's random states are unchanged afterwards.

    Args:
        model: Model in training mode, with the frozen parameters of the training.
        batches: One or more batches with normalized images; see `first_batches`.
        momentum: Momentum model, whose forward pass is counted too.
        stage: `only`, the objective of a first stage.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step(batch: Batch) -> None:
        # `forward` itself, so that a compiled model gets the count of its eager code.
        soft = {} if momentum is None else {"soft_targets": momentum.soft_targets(batch, step=0)}
        loss = model.forward(**batch, generator=torch_generator(0, "flops"), **stage, **soft).loss  # pyright: ignore
        assert loss is not None
        torch.autograd.grad(loss, trained, allow_unused=True)

    with _without_checkpointing(model), torch.enable_grad():
        return statistics.fmean([count_flops(functools.partial(step, batch)) for batch in batches])


def cached_batches(model: HeadedModel, batches: Iterable[Batch]) -> Iterator[Batch]:
    """Replace the images of batches by their hidden states, as an encoder cache returns them."""
    core = model.mmbert
    for batch in batches:
        images = batch.pop("pixel_values")
        with torch.no_grad():
            states = core.image_encoder.encode_frozen(
                images, core.image_encoder.frozen, layers=core.fusion.reads_image_layers
            )
        yield {**batch, "image_hidden_states": states}


def flops_per_cached_image(model: HeadedModel) -> int:
    """FLOPs of what an encoder cache computes once for each image."""
    core = model.mmbert
    side = core.config.image_size
    image = torch.zeros(1, 3, side, side, device=core.word_embeddings.device)  # pyright: ignore
    encoder, layers = core.image_encoder, core.fusion.reads_image_layers
    with torch.no_grad():
        return count_flops(lambda: encoder.encode_frozen(image, encoder.frozen, layers=layers))


def flops_per_pair(model: HeadedModel, batch: Batch) -> float:
    """FLOPs of encoding, fusing and scoring one pair, mean over a batch (padding counts)."""
    with _without_checkpointing(model), _evaluating(model):
        return count_flops(lambda: _output(model, batch)) / len(batch["input_ids"])


def milliseconds_per_pair(model: HeadedModel, batch: Batch, *, repeats: int = 10) -> float:
    """Milliseconds of encoding, fusing and scoring one pair: median over `repeats` of a batch, by its size.

    One batch before them is not measured: first calls allocate memory and choose kernels.
    """
    device = batch["input_ids"].device
    seconds = []
    with _without_checkpointing(model), _evaluating(model):
        for _ in range(1 + repeats):
            start = time.perf_counter()
            _output(model, batch)
            synchronize(device)
            seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds[1:]) / len(batch["input_ids"])


def synchronize(device: torch.device) -> None:
    """Wait for the kernels of a GPU; a CPU runs none asynchronously."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _output(model: HeadedModel, batch: Batch) -> Tensor:
    """Compute the output for a batch of pairs: task logits, otherwise ITM score, otherwise joint vector."""
    core = model.mmbert
    text = core.encode_text(batch["input_ids"], batch["attention_mask"])
    if isinstance(model, MMBertForTask):
        image = core.encode_image(batch["pixel_values"]) if model.task.num_images else None
        return model.task.logits(model.task.pooled(core, text, image))
    image = core.encode_image(batch["pixel_values"])
    if "itm" in model.objectives:
        return model.match_scores(text, image)
    return core.fuse(text, image, reads=Reads(pooled=True)).pooled


@contextmanager
def _without_checkpointing(model: HeadedModel) -> Iterator[None]:
    """Disable activation checkpointing, and restore it and torch's random states afterwards."""
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
    """Evaluation mode without gradients; restores the mode of every module afterwards."""
    training, modes = model.training, [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
        for module, mode in modes:
            module.training = mode


def first_batches(data: SplitsDataModule, count: int) -> Iterator[Batch]:
    """First training batches of a run, in order, with normalized images.

    The data loader is not iterated, as that would draw from torch's random state.
    """
    sampler: Any = data.train_dataloader().batch_sampler
    for number in range(count):
        epoch, step = divmod(number, len(sampler))
        sampler.position = (epoch, step)
        batch = data.collate([data.train_samples[index] for index in next(iter(sampler))])
        yield data.on_after_batch_transfer(batch, 0)
