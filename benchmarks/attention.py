"""Measure the two attention paths that `mmbert.model.layers.fused_attention_is_faster` chooses between.

    python benchmarks/attention.py [--threads N] [--repeats N]

Prints milliseconds of one forward and backward pass for torch's fused kernel and for plain `softmax(q k^T) v`,
alternately in one run, and the ratio of their medians.
"""

import argparse
import statistics
import time

import torch

from mmbert.model import layers

SHAPES = [  # (batch, heads, tokens, features of a head): data/shapes, UCM at 112 px, ViT-B/16 at 224 px, long
    (128, 4, 34, 32),
    (48, 6, 85, 64),
    (16, 12, 236, 64),
    (4, 12, 613, 64),
]


def seconds(
    fused: bool, qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor], mask: torch.Tensor, *, backward: bool
) -> float:
    """Seconds of one call of `layers.attend` on the chosen path."""
    layers.fused_attention_is_faster = lambda device: fused
    started = time.perf_counter()
    with torch.set_grad_enabled(backward):
        out = layers.attend(*qkv, mask)
        if backward:
            out.float().square().mean().backward()
    return time.perf_counter() - started


def main() -> None:
    """Print one line per shape, dtype and direction."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--repeats", type=int, default=15, help="timed calls of each path, alternately")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads, {options.repeats} repeats, medians in ms")
    print(f"{'batch x heads x tokens x features':36}{'type':6}{'pass':12}{'fused':>8}{'plain':>8}{'fused/plain':>13}")
    for shape in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            query, key, value = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))
            mask = torch.ones(shape[0], shape[2], dtype=torch.bool)
            mask[:, -2:] = False
            for backward in (False, True):
                times: dict[bool, list[float]] = {True: [], False: []}
                for repeat in range(options.repeats + 2):
                    for fused in times:
                        spent = seconds(fused, (query, key, value), mask, backward=backward)
                        if repeat >= 2:  # the first two warm up
                            times[fused].append(spent)
                fused_ms, plain_ms = (1e3 * statistics.median(times[f]) for f in (True, False))
                name = " x ".join(map(str, shape))
                direction = "fwd + bwd" if backward else "forward"
                kind = str(dtype).removeprefix("torch.").replace("float", "f")
                print(f"{name:36}{kind:6}{direction:12}{fused_ms:8.2f}{plain_ms:8.2f}{fused_ms / plain_ms:13.2f}")


if __name__ == "__main__":
    main()
