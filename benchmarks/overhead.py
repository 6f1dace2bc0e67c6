"""Measure the overhead of exact resume: training steps with and without trace, signal checks and reseeding.

Within one quickstart run, blocks of steps with all of it alternate with blocks without: no trace, no sample counts, no
check for signals or due checkpoints, no reseeding, no check for finite losses. Saves are left out.

    python benchmarks/overhead.py --pairs 10 --steps 15
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmbert.cli.main import main
from mmbert.training.checkpoints import RunCheckpoints
from mmbert.training.module import TrainingModule
from mmbert.training.trace import Trace

ROOT = Path(__file__).parents[1]
TOGGLED = (
    (Trace, "on_train_batch_end"),
    (RunCheckpoints, "on_train_batch_end"),
    (TrainingModule, "on_train_batch_start"),
    (TrainingModule, "_stop_if_not_finite"),
)


class Blocks:
    """Blocks of steps in which the measured methods are alternately on and off, with the seconds of each step.

    Args:
        steps: Optimizer steps of a block.
    """

    def __init__(self, steps: int):
        self.steps, self.count, self.started = steps, 0, 0.0
        self.seconds: list[list[float]] = []
        for owner, name in TOGGLED:
            setattr(owner, name, self._toggled(getattr(owner, name)))
        original = TrainingModule.training_step

        def training_step(module: TrainingModule, *arguments: Any) -> Any:
            self.tick()
            return original(module, *arguments)

        setattr(TrainingModule, "training_step", training_step)  # noqa: B010 - other signature

    def _toggled(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def method(*arguments: Any) -> Any:
            if self.on:
                return original(*arguments)
            for owner in arguments:
                if isinstance(owner, TrainingModule) and original.__name__ == "_stop_if_not_finite":
                    owner._since_step = []
            return None

        return method

    @property
    def on(self) -> bool:
        """Whether the measured methods are enabled in this block."""
        return (self.count // self.steps) % 2 == 0

    def tick(self) -> None:
        """Record that a step begins."""
        now = time.perf_counter()
        if self.count % self.steps == 0:
            self.seconds.append([])
        elif self.started:  # the first step of a block includes work of the one before
            self.seconds[-1].append(now - self.started)
        self.started = now
        self.count += 1


def measure(pairs: int, steps: int) -> list[float]:
    """Ratios of the median step time with the methods to that without, one per pair of blocks."""
    blocks = Blocks(steps)
    with tempfile.TemporaryDirectory() as folder:
        main(
            [
                "fit", "--config", "pretrain/shapes_plain", f"--trainer.default_root_dir={folder}",
                f"--trainer.max_steps={2 * (pairs + 1) * steps + 1}", "--trainer.limit_val_batches=0",
                "--checkpoint.every_n_steps=1000000", "--trainer.enable_progress_bar=false",
                "--data.annotations={train: data/shapes/annotations/captions_train.json}",
            ]
        )  # fmt: skip
    medians = [statistics.median(block) for block in blocks.seconds[: 2 * (pairs + 1)]]
    print(f"median step with tracing and checks {statistics.median(medians[2::2]) * 1000:.1f} ms")
    return [on / off for on, off in zip(medians[2::2], medians[3::2], strict=True)]  # the first pair warms up


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=15)
    options = parser.parse_args()
    ratios = measure(options.pairs, options.steps)
    print("ratios: " + " ".join(f"{ratio:.3f}" for ratio in ratios))
    print(f"median overhead: {(statistics.median(ratios) - 1) * 100:+.2f} % over {len(ratios)} interleaved pairs")
