"""Measure how time and memory of a training step, of evaluation and of retrieval grow, four sizes each.

    OMP_NUM_THREADS=1 python benchmarks/growth.py --write docs/results.md

Prints a table of CPU seconds, of the memory that the work took beyond the model, and of their exponents: the slope of
log seconds, or log bytes, over log size, by least squares. `--write` puts it between two comments of a Markdown file.
The model is a random hybrid (2 text, 4 image and 2 fusion layers, 128 wide); a CPU is needed, which may be shared with
other jobs, as CPU time is measured.
"""

import argparse
import ctypes
import functools
import gc
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmbert.data.sampling import TrainBatches
from mmbert.evaluation.encoding import EncodedCandidates
from mmbert.evaluation.pairs import PairEvaluation
from mmbert.evaluation.retrieval import SCORERS
from mmbert.model.configuration import MMBertConfig
from mmbert.model.modeling import MMBertForPreTraining
from mmbert.model.tokens import IGNORE_INDEX, NO_TEXT
from mmbert.runtime.memory import peak_memory, reset_peak_memory

BATCH, TEXT, SIDE = 16, 32, 128
"""Pairs of a batch, tokens of a text and pixels of an image's side, where another size is varied."""
PATCH, WIDTH, VOCABULARY = 16, 128, 2000
BEGIN, END = "<!-- growth: begin -->", "<!-- growth: end -->"

Work = Callable[[], object]


class Growth(NamedTuple):
    """Cost of one kind of work at several sizes."""

    work: str
    size: str
    sizes: list[int]
    seconds: list[float]
    bytes: list[int]

    def row(self) -> str:
        """Format a row of the table."""
        seconds, memory = (
            " ".join(f"{x:.3g}" for x in values) for values in (self.seconds, [x / 1e6 for x in self.bytes])
        )
        slopes = [exponent(self.sizes, self.seconds), exponent(self.sizes, [max(1, x) for x in self.bytes])]
        sizes = " ".join(f"{size:,}" for size in self.sizes)
        return f"| {self.work} | {self.size}: {sizes} | {seconds} | {slopes[0]:.2f} | {memory} | {slopes[1]:.2f} |"


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Slope of log value over log size, by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def build(side: int = SIDE, text: int = TEXT) -> MMBertForPreTraining:
    """Build a random hybrid model with all objectives."""
    torch.manual_seed(0)
    return MMBertForPreTraining(
        MMBertConfig(
            fusion="hybrid", text_layers=2, image_layers=4, fusion_layers=2, hidden_size=WIDTH, num_attention_heads=4,
            intermediate_size=4 * WIDTH, vocab_size=VOCABULARY, max_position_embeddings=text, image_size=side,
            image_model="vit_tiny_patch16_224", patch_size=PATCH, image_hidden_size=WIDTH, image_num_attention_heads=4,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, objectives={"mlm": 1.0, "itm": 1.0, "itc": 1.0},
        )
    )  # fmt: skip


def batch_of(pairs: int, text: int, side: int, *, first: int = 0) -> dict[str, Tensor]:
    """Build a batch of random pairs, with wrong images."""
    generator = torch.Generator().manual_seed(first)
    index = torch.arange(first, first + pairs)
    input_ids = torch.randint(5, VOCABULARY, (pairs, text), generator=generator)
    labels = torch.full((pairs, text), IGNORE_INDEX)
    labels[:, 1 :: max(1, text // 4)] = 7
    images = torch.randn(pairs, 3, side, side, generator=generator)
    return {
        "index": index,
        "requested_index": index,
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "mlm_input_ids": input_ids,
        "mlm_labels": labels,
        "pixel_values": images,
        "wrong_pixel_values": images.roll(1, dims=0),
        "image_key": index,
        "text_key": index,
        "image_text_keys": torch.stack([index, torch.full_like(index, NO_TEXT)], dim=1),
    }


def step_of(model: MMBertForPreTraining, pairs: int, text: int, side: int) -> Work:
    """Return a training step without its optimizer."""
    batch = batch_of(pairs, text, side)
    batch = {name: value for name, value in batch.items() if not name.startswith("wrong_")}
    model.train()

    def work() -> None:
        model.zero_grad()
        loss = model(**batch, generator=torch.Generator().manual_seed(0)).loss
        loss.backward()

    return work


def evaluation_of(model: MMBertForPreTraining, pairs: int, text: int, side: int, batch_size: int = BATCH) -> Work:
    """Return an evaluation of pairs by MLM, ITM and contrastive retrieval; its batches are made as it goes."""
    model.eval()

    def work() -> None:
        evaluation = PairEvaluation(model, frozenset(range(pairs)))
        for first in range(0, pairs, batch_size):
            evaluation.step(batch_of(min(batch_size, pairs - first), text, side, first=first))
        evaluation.metrics()

    return work


def retrieval_of(model: MMBertForPreTraining, images: int, text: int, tokens: int, scorer: str, k: int = 4) -> Work:
    """Return the ranking of encoded images with as many texts."""
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.nn.functional.normalize(torch.randn(images, 256, generator=generator), dim=1) for _ in range(2)]
    encoded = EncodedCandidates(
        torch.randn(images, tokens, WIDTH, generator=generator),
        [torch.randn(text, WIDTH, generator=generator) for _ in range(images)],
        vectors[0], vectors[1], torch.arange(images), images, images,
    )  # fmt: skip
    model.eval()

    @torch.no_grad()
    def work() -> None:
        SCORERS[scorer](model, encoded, k, 0.0)

    return work


def epoch_of(pairs: int) -> Work:
    """Return the order of an epoch: which pairs are in which batch."""
    lengths = np.random.default_rng(0).integers(20, 100, pairs)

    def work() -> None:
        list(TrainBatches(lambda epoch: lengths, pairs, batch_size=64, seed=0, rank=0, world_size=1, pool=50))

    return work


def measure(work: Work) -> tuple[float, int]:
    """CPU seconds of the faster of two calls, and the peak memory of a call beyond what there was before."""
    work()  # allocates, and compiles matrix products
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # gives what was freed back to the system
    reset_peak_memory()
    before, seconds = peak_memory(), math.inf
    for _ in range(2):
        started = time.process_time()
        work()
        seconds = min(seconds, time.process_time() - started)
    return seconds, peak_memory() - before


def measurements(only: str) -> Iterator[Growth]:
    """Measure all work whose name contains `only`, cheap work first."""

    def grow(work: str, size: str, sizes: list[int], make: Callable[[int], Work]) -> Iterator[Growth]:
        if only in work:
            found = [measure(make(n)) for n in sizes]
            yield Growth(work, size, sizes, [seconds for seconds, _ in found], [peak for _, peak in found])

    def side_of(image_tokens: int) -> int:
        return round(math.sqrt(image_tokens - 1)) * PATCH

    model, image_tokens = build(), (SIDE // PATCH) ** 2 + 1
    yield from grow("order of an epoch", "pairs", [20_000, 40_000, 80_000, 160_000], epoch_of)
    yield from grow("training step", "batch", [8, 16, 32, 64], lambda n: step_of(model, n, TEXT, SIDE))
    longest = 256
    long = build(text=longest)
    yield from grow("training step", "text tokens", [32, 64, 128, longest], lambda n: step_of(long, BATCH, n, SIDE))
    tokens = [(side // PATCH) ** 2 + 1 for side in (64, 128, 192, 256)]
    yield from grow(
        "training step", "image tokens", tokens, lambda n: step_of(build(side_of(n)), BATCH, TEXT, side_of(n))
    )
    yield from grow("evaluation", "pairs", [32, 64, 128, 256], lambda n: evaluation_of(model, n, TEXT, SIDE))
    yield from grow("evaluation of 64", "batch", [8, 16, 32, 64], lambda n: evaluation_of(model, 64, TEXT, SIDE, n))
    yield from grow(
        "evaluation of 32", "text tokens", [32, 64, 128, longest], lambda n: evaluation_of(long, 32, n, SIDE)
    )
    yield from grow(
        "evaluation of 32", "image tokens", tokens, lambda n: evaluation_of(build(side_of(n)), 32, TEXT, side_of(n))
    )
    few = 5  # image tokens, which scoring vectors does not read
    yield from grow(
        "retrieval, itc", "images", [500, 1000, 2000, 4000], lambda n: retrieval_of(model, n, TEXT, few, "itc")
    )
    for scorer, sizes in {"two_stage": [64, 128, 256, 512], "itm": [8, 16, 32, 64]}.items():
        work = functools.partial(retrieval_of, model, text=TEXT, tokens=image_tokens, scorer=scorer)
        yield from grow(f"retrieval, {scorer}" + ", k=4" * (scorer == "two_stage"), "images", sizes, work)
    yield from grow(
        "two_stage of 64, k=4", "text tokens", [32, 64, 128, longest],
        lambda n: retrieval_of(long, 64, n, image_tokens, "two_stage"),
    )  # fmt: skip
    yield from grow(
        "two_stage of 64, k=4", "image tokens", tokens, lambda n: retrieval_of(model, 64, TEXT, n, "two_stage")
    )


def main() -> None:
    """Print the table, and write it where requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE.md", help=f"replace what is between {BEGIN} and {END}")
    parser.add_argument("--only", default="", metavar="TEXT", help="measure work whose name contains this text only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = ["| work | size | CPU seconds | exponent | memory, MB | exponent |", "|---|---|---|---|---|---|"]
    print(*lines, sep="\n", flush=True)
    for growth in measurements(arguments.only):
        lines.append(growth.row())
        print(lines[-1], flush=True)
    if arguments.write is not None:
        before, rest = arguments.write.read_text(encoding="utf-8").split(BEGIN)
        after = rest.split(END)[1]
        arguments.write.write_text("\n".join([before + BEGIN, "", *lines, "", END + after]), encoding="utf-8")


if __name__ == "__main__":
    main()
