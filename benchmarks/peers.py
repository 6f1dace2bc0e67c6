"""Measure training steps of mmbert beside transformers' models of the same shape, alternately in one run.

    python benchmarks/peers.py --batch 16 --alternations 5 --threads 1

A step is forward, backward and a fused AdamW step, with random weights of base size, eager, and equal dropout on both
sides. Prints a table: median seconds of both, median of the ratios of neighbouring steps, and the share of the
machine's matrix-product rate that mmbert's step reaches.

Shapes: text of 40 tokens, 15 % of them predicted. VisualBERT gets 36 vectors of a detector, mmbert 36 patches with a
wider projection. With `--clock cpu` seconds are CPU seconds of the process, for a machine that other jobs share.
`--profile` prints where the time of mmbert's step goes instead, by kind of operation.
"""

import argparse
import gc
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable
from datetime import date
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BridgeTowerConfig,
    BridgeTowerForMaskedLM,
    ViltConfig,
    ViltForMaskedLM,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    VisualBertConfig,
    VisualBertForPreTraining,
    ViTConfig,
)  # fmt: skip

from mmbert.compare.cost import flops_per_step
from mmbert.model.configuration import MMBertConfig
from mmbert.model.modeling import MMBertForPreTraining
from mmbert.model.tokens import IGNORE_INDEX

Batch = dict[str, Tensor]
TOKENS, REGIONS = 40, 36
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Case(NamedTuple):
    """A model of transformers and mmbert's of the same shape."""

    peer: Callable[[int, float], nn.Module]  # (layers, dropout) -> model
    peer_inputs: Callable[[Batch], dict[str, Any]]
    own: Callable[[int], dict[str, Any]]  # layers -> keys of MMBertConfig
    image_size: int
    vocab_size: int = 30522


def dropouts(p: float) -> dict[str, Any]:
    """Both options of a configuration."""
    return {"hidden_dropout_prob": p, "attention_probs_dropout_prob": p}


def vilt(layers: int, p: float) -> nn.Module:
    """ViLT (arXiv:2102.03334) with its MLM head."""
    return ViltForMaskedLM(ViltConfig(num_hidden_layers=layers, **dropouts(p)))


def visual_bert(layers: int, p: float) -> nn.Module:
    """VisualBERT (arXiv:1908.03557) with its pretraining heads."""
    return VisualBertForPreTraining(
        VisualBertConfig(num_hidden_layers=layers, visual_embedding_dim=2048, **dropouts(p))
    )


def bridge_tower(layers: int, p: float) -> nn.Module:
    """BridgeTower (arXiv:2206.08657) with its MLM head."""
    text = {"num_hidden_layers": layers, **dropouts(p)}
    config = BridgeTowerConfig(
        text_config=text, vision_config={"num_hidden_layers": layers}, num_hidden_layers=(layers + 1) // 2
    )
    return BridgeTowerForMaskedLM(config)


def dual_encoder(layers: int, p: float) -> nn.Module:
    """BERT and ViT with a contrastive loss, as CLIP (arXiv:2103.00020). Its ViT and mmbert's have no dropout."""
    text, image = BertConfig(num_hidden_layers=layers, **dropouts(p)), ViTConfig(num_hidden_layers=layers)
    return VisionTextDualEncoderModel(VisionTextDualEncoderConfig.from_vision_text_configs(image, text))


def masked_inputs(batch: Batch) -> dict[str, Any]:
    """Inputs of a masked language model on pixels."""
    text = {"input_ids": batch["mlm_input_ids"], "attention_mask": batch["attention_mask"]}
    return {**text, "pixel_values": batch["pixel_values"], "labels": batch["mlm_labels"]}


def region_inputs(batch: Batch) -> dict[str, Any]:
    """Inputs of VisualBERT: vectors of regions instead of pixels, and labels for them that are ignored."""
    inputs = masked_inputs(batch)
    size = len(inputs.pop("pixel_values"))
    labels = torch.cat([inputs.pop("labels"), torch.full((size, REGIONS), IGNORE_INDEX)], dim=1)
    regions = {"visual_embeds": torch.randn(size, REGIONS, 2048), "visual_attention_mask": torch.ones(size, REGIONS)}
    return {**inputs, **regions, "labels": labels}


def pair_inputs(batch: Batch) -> dict[str, Any]:
    """Inputs of a dual encoder."""
    return {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")} | {"return_loss": True}


def early(layers: int, **keys: Any) -> dict[str, Any]:
    """Keys of a single stream on embeddings."""
    return {"fusion": "early", "text_layers": 0, "image_layers": 0, "fusion_layers": layers, **keys}


def two_towers(fusion: str, layers: int, **keys: Any) -> dict[str, Any]:
    """Keys of two deep encoders."""
    return {
        "fusion": fusion,
        "text_layers": layers,
        "image_layers": layers,
        "image_model": "vit_base_patch16_224",
        **keys,
    }


MLM = {"mlm": 1.0}
CASES = {
    "ViLT": Case(vilt, masked_inputs, lambda n: early(n, image_model="vit_base_patch32_384", objectives=MLM), 384),
    "VisualBERT": Case(
        visual_bert, region_inputs, lambda n: early(n, image_model="vit_base_patch32_384", objectives=MLM), 192
    ),
    "BridgeTower": Case(
        bridge_tower,
        masked_inputs,
        lambda n: two_towers("hybrid_bridge", n, fusion_layers=(n + 1) // 2, objectives=MLM),
        288,
        50265,
    ),
    "VisionTextDualEncoder": Case(
        dual_encoder,
        pair_inputs,
        lambda n: two_towers("late", n, fusion_layers=0, objectives={"itc": {"embedding_size": 512}}),
        224,
    ),
}


def make_batch(case: Case, size: int) -> Batch:
    """Random texts of 35 to 40 tokens with masked ones, and random images."""
    input_ids = torch.randint(1000, case.vocab_size, (size, TOKENS))
    attention_mask = (torch.arange(TOKENS) < torch.randint(35, TOKENS + 1, (size, 1))).long()
    labels = torch.where((torch.rand(size, TOKENS) < 0.15) & attention_mask.bool(), input_ids, IGNORE_INDEX)
    keys = torch.arange(size)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "mlm_input_ids": torch.where(labels == IGNORE_INDEX, input_ids, 103),
        "mlm_labels": labels,
        "pixel_values": torch.randn(size, 3, case.image_size, case.image_size),
        "image_key": keys,
        "text_key": keys + size,
        "image_text_keys": keys[:, None] + size,
    }


KINDS = {
    "matrix products": ("mm", "bmm", "addmm", "baddbmm", "mkldnn_linear", "convolution", "convolution_backward"),
    "attention": ("attention",),
    "softmax and losses": ("softmax", "nll_loss", "logsumexp"),
    "GELU": ("gelu",),
    "LayerNorm": ("layer_norm",),
    "dropout": ("dropout", "bernoulli", "random"),
    "copies and casts": ("copy_", "to_copy", "clone", "cat", "contiguous", "index", "gather", "scatter"),
    "sums, products, fills": ("add", "mul", "div", "sum", "fill", "zero", "masked", "where"),
    "optimizer": ("adamw",),
}
"""Kind of operation -> parts of the names of operators, the first that matches."""


def kind_of(name: str) -> str:
    """Name the kind of an operator of torch."""
    name = name.removeprefix("aten::")
    exact = next((kind for kind, parts in KINDS.items() if name.strip("_") in parts), None)
    return exact or next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")


def profile(case: Case, options: argparse.Namespace, *, half: bool) -> str:
    """Profile mmbert's step, and list the shares of the kinds of operations in its CPU time."""
    own, _ = build_own(case, options), torch.manual_seed(0)
    batch, shares = make_batch(case, options.batch), Counter[str]()
    optimizer = torch.optim.AdamW(own.parameters(), lr=1e-5, fused=True)
    for is_warm in (False, True):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = own(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if is_warm:
            for event in profiler.key_averages():
                shares[kind_of(event.key)] += event.self_cpu_time_total
    total = sum(shares.values())
    return ", ".join(f"{kind} {time / total:.0%}" for kind, time in shares.most_common())


def build_own(case: Case, options: argparse.Namespace) -> MMBertForPreTraining:
    """Build mmbert's model of a case, in training mode."""
    keys = {**case.own(options.layers), "hidden_size": 768, "num_attention_heads": 12, "vocab_size": case.vocab_size}
    return MMBertForPreTraining(MMBertConfig(image_size=case.image_size, **keys, **dropouts(options.dropout))).train()


def matrix_rate(dtype: torch.dtype, clock: Callable[[], float]) -> float:
    """FLOPs per second of products of the size of a feed-forward block, the best of some."""
    x, weights = torch.randn(2048, 768).to(dtype), torch.randn(768, 3072).to(dtype)
    best = 0.0
    for _ in range(8):
        start = clock()
        torch.matmul(x, weights)
        best = max(best, 2 * 2048 * 768 * 3072 / (clock() - start))
    return best


def measure(case: Case, options: argparse.Namespace, *, half: bool) -> str:
    """Alternate steps of both, and describe them as cells of a table."""
    torch.manual_seed(0)
    clock, batch = CLOCKS[options.clock], make_batch(case, options.batch)
    peer = case.peer(options.layers, options.dropout).train()
    own = build_own(case, options)
    inputs = case.peer_inputs(batch)
    losses = {"peer": lambda: peer(**inputs).loss, "own": lambda: own(**batch).loss}
    optimizers = {
        name: torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        for name, model in (("peer", peer), ("own", own))
    }
    seconds: dict[str, list[float]] = {"peer": [], "own": []}
    for number in range(1 + options.alternations):  # the first pair warms up
        for name, optimizer in optimizers.items():
            start = clock()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = losses[name]()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if number:
                seconds[name].append(clock() - start)
    ratios = [p / o for p, o in zip(seconds["peer"], seconds["own"], strict=True)]
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    rate = matrix_rate(torch.bfloat16 if half else torch.float32, clock)
    share = flops_per_step(own, [batch]) / medians["own"] / rate
    return (
        f"{medians['peer']:.2f} | {medians['own']:.2f} | {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f}) | {share:.0%} of {rate / 1e9:.0f} GFLOP/s"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peers", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--batch", type=int, default=16, help="samples of a step")
    parser.add_argument("--alternations", type=int, default=5, help="timed steps of each model")
    parser.add_argument("--dropout", type=float, default=0.1, help="of both models")
    parser.add_argument("--layers", type=int, default=12, help="of each stack; 12 is base size")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--profile", action="store_true", help="print where the time of mmbert's step goes instead")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    processor = platform.processor() or platform.machine()
    print(
        f"{date.today()}, {processor} ({torch.backends.cpu.get_cpu_capability()}), torch {torch.__version__}, "
        f"{options.threads} threads, {options.clock} seconds, batch {options.batch}, {options.layers} layers, dropout "
        f"{options.dropout}, medians of {options.alternations} alternating steps\n"
    )
    if options.profile:
        for name in options.peers:
            for precision in options.precisions:
                shares = profile(CASES[name], options, half=precision == "bf16")
                print(f"- {name}, {precision}: {shares}", flush=True)
        return
    print("| peer | precision | peer, s | mmbert, s | peer / mmbert | matrix-product rate |\n|---|---|---|---|---|---|")
    for name in options.peers:
        for precision in options.precisions:
            print(f"| {name} | {precision} | {measure(CASES[name], options, half=precision == 'bf16')} |", flush=True)
            gc.collect()


if __name__ == "__main__":
    main()
