"""Measure the cost of exhaustive cross-encoding and of two-stage retrieval in one run.

    python benchmarks/retrieval.py [--model RUN/model --annotations F --images DIR] [--k 32] [--plot FILE.png]

With `--model` it ranks the test split of a Karpathy file (UCM: 210 images, 1,050 texts) with both, and prints seconds
and R@1. Without it a random hybrid (6 + 6 + 2 layers, 384 wide) runs on as many random images and as many random
texts as UCM has distinct ones, which gives times only. Then come the passes that 1,000 images with 5,000 texts need:
those of two_stage are counted on a shortlist, those of itm follow from the definition. `--plot` draws passes and
seconds against the number of images, the seconds with a small random hybrid.
"""

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch

from mmbert.data.examples import read_examples
from mmbert.evaluation import encoding, retrieval
from mmbert.evaluation.encoding import EncodedCandidates, encode
from mmbert.evaluation.retrieval import Candidates, ScoreMatrix, rank_candidates
from mmbert.inference.loading import load_folder
from mmbert.model.configuration import MMBertConfig
from mmbert.model.modeling import MMBertForPreTraining

TEXTS_EACH = 5


UCM = {"hidden_size": 384, "num_attention_heads": 6, "image_size": 112, "patch_size": 14}
SHAPES = {"hidden_size": 128, "num_attention_heads": 4, "image_size": 64, "patch_size": 16}


def random_hybrid(layers: int, **sizes: Any) -> MMBertForPreTraining:
    """Build a hybrid model with `layers` in each encoder, 2 fusion layers, and random weights."""
    torch.manual_seed(0)
    config = MMBertConfig(
        fusion="hybrid",
        text_layers=layers,
        image_layers=layers,
        fusion_layers=2,
        vocab_size=2000,
        image_model="vit_small_patch16_224",
        image_hidden_size=sizes["hidden_size"],
        image_num_attention_heads=sizes["num_attention_heads"],
        objectives={"itm": 1.0, "itc": 1.0},
        **sizes,
    )
    return MMBertForPreTraining(config).eval()


@torch.no_grad()
def random_encoded(
    model: MMBertForPreTraining, num_images: int, num_texts: int
) -> tuple[EncodedCandidates, Candidates, float]:
    """Encode random images and texts of 8 to 19 tokens, and measure the CPU seconds."""
    generator = torch.Generator().manual_seed(0)
    side, contrast = model.config.image_size or 112, model.objectives["itc"]
    started = time.process_time()
    images, texts, image_vectors, text_vectors = [], [], [], []
    for first in range(0, num_images, 64):
        pixels = torch.randn(min(64, num_images - first), 3, side, side, generator=generator)
        tokens = model.mmbert.encode_image(pixels)
        images.append(tokens.hidden_states)
        image_vectors.append(contrast.embed_image(tokens))  # pyright: ignore[reportCallIssue]
    for first in range(0, num_texts, 64):
        length = 8 + first // 64 % 12
        tokens = model.mmbert.encode_text(
            torch.randint(5, 2000, (min(64, num_texts - first), length), generator=generator)
        )
        texts += [*tokens.hidden_states]
        text_vectors.append(contrast.embed_text(tokens))  # pyright: ignore[reportCallIssue]
    vectors = torch.cat(image_vectors), torch.cat(text_vectors)
    encoded = EncodedCandidates(torch.cat(images), texts, *vectors, torch.arange(num_texts), num_images, num_texts)
    owners = [i * num_images // num_texts for i in range(num_texts)]
    candidates = Candidates([""] * num_images, [str(i) for i in range(num_texts)], owners)
    return encoded, candidates, time.process_time() - started


def compare(
    model: MMBertForPreTraining, encoded: EncodedCandidates, candidates: Candidates, seconds: float, k: int
) -> None:
    """Print the cost and recall of both scorers on the same encoder outputs."""
    names = ["scorer", "fusion passes", "seconds", "with encoding", "I->T R@1", "T->I R@1", "rsum", "peak memory"]
    print("".join(f"{name:>16}" for name in names))
    reports: list[dict[str, Any]] = []
    for scorer in ("itm", "two_stage"):
        r = rank_candidates(model, encoded, candidates, scorer, k=k, equal_texts=True).metrics
        reports.append(r)
        spent = r["scoring_seconds"]
        print(
            f"{scorer:>16}{r['fusion_passes']:>16,}{spent:>16.1f}{spent + seconds:>16.1f}"
            f"{r['image_to_text/R@1']:>16.4f}{r['text_to_image/R@1']:>16.4f}{r['rsum']:>16.2f}"
            f"{r['peak_memory'] / 1e9:>13.2f} GB",
            flush=True,
        )
    slow, fast = (r["scoring_seconds"] + seconds for r in reports)
    lost = [100 * (reports[0][f"{way}/R@1"] - reports[1][f"{way}/R@1"]) for way in ("image_to_text", "text_to_image")]
    print(
        f"two_stage is {slow / fast:.1f} times faster; R@1 lost: {lost[0]:+.2f} and {lost[1]:+.2f} points", flush=True
    )


def shortlist_passes(image_vectors: torch.Tensor, text_vectors: torch.Tensor, k: int) -> int:
    """Count the fusion passes of two_stage for these vectors without computing them."""
    done = retrieval.fuse_selected
    retrieval.fuse_selected = lambda model, encoded, selected, name: ScoreMatrix(
        torch.zeros(selected.shape), int(selected.sum())
    )
    try:
        texts = torch.arange(len(text_vectors))
        encoded = EncodedCandidates(None, [], image_vectors, text_vectors, texts, len(image_vectors), len(texts))
        return retrieval.two_stage(None, encoded, k, 0.0).fusion_passes  # pyright: ignore[reportArgumentType]
    finally:
        retrieval.fuse_selected = done


def random_passes(num_images: int, k: int) -> int:
    """Count the same for random vectors of width 256 in which a text is near its image, as after training."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(num_images, 256, generator=generator)
    texts = images.repeat_interleave(TEXTS_EACH, dim=0) + torch.randn(num_images * TEXTS_EACH, 256, generator=generator)
    normalize = torch.nn.functional.normalize
    return shortlist_passes(normalize(images, dim=1), normalize(texts, dim=1), k)


def passes(num_images: int, k: int) -> None:
    """Print the passes of both scorers, encoders included."""
    texts = num_images * TEXTS_EACH
    encoders = num_images + texts
    exhaustive, two_stage = num_images * texts, random_passes(num_images, k)
    bound = k * encoders
    print(f"{num_images:,} images x {texts:,} texts, k = {k}: passes")
    print(f"{'':>12}{'encoders':>12}{'fusion':>14}{'together':>14}")
    for name, fused in (("itm", exhaustive), ("two_stage", two_stage), ("its bound", bound)):
        print(f"{name:>12}{encoders:>12,}{fused:>14,}{encoders + fused:>14,}")
    print(f"itm / two_stage = {(encoders + exhaustive) / (encoders + two_stage):.1f}", flush=True)


def plot(file: str, k: int, measured: Sequence[int]) -> None:
    """Draw passes (counted) and CPU seconds (measured for small N) against N."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    counted = [50, 100, 200, 500, 1000, 2000, 5000]
    shortlists = [random_passes(n, k) for n in counted]
    model = random_hybrid(2, **SHAPES)
    seconds: dict[str, list[float]] = {"itm": [], "two_stage": []}
    for n in measured:
        encoded, candidates, encoding_seconds = random_encoded(model, n, TEXTS_EACH * n)
        for scorer, spent in seconds.items():
            started = time.process_time()
            report = rank_candidates(model, encoded, candidates, scorer, k=k).metrics
            spent.append(time.process_time() - started + encoding_seconds)
            print(f"{scorer} {n}: {report['fusion_passes']:,} fusions, {spent[-1]:.1f} s", flush=True)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    encoders = [(1 + TEXTS_EACH) * n for n in counted]
    styles = {"itm": ("C3", "o", "itm: every pair"), "two_stage": ("C0", "s", f"two_stage, k = {k}")}
    fused = {"itm": [TEXTS_EACH * n * n for n in counted], "two_stage": shortlists}
    for name, (color, marker, label) in styles.items():
        total = [e + f for e, f in zip(encoders, fused[name], strict=True)]
        left.plot(counted, total, color=color, marker=marker, markersize=4, label=label)
        right.plot(measured, seconds[name], color=color, marker=marker, markersize=4, label=label)
    left.plot(counted, [(k + 1) * e for e in encoders], color="C0", linestyle=":", label="N + M + k(N + M)")
    left.plot(counted, encoders, color="C7", linestyle="--", label="encoders alone: N + M")
    left.set(title="passes", xlabel="images N, with M = 5N texts", xscale="log", yscale="log")
    right.set(title="CPU seconds, 128-wide hybrid", xlabel="images N, with M = 5N texts")
    right.set_ylim(bottom=0)
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, frameon=False)
    figure.savefig(file, dpi=120)
    print(f"wrote {file}")


def main() -> None:
    """Print both tables; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore
    parser.add_argument("--model", help="folder of a saved model with itm and itc; random without it")
    parser.add_argument("--annotations", help="Karpathy file whose split test is ranked with --model")
    parser.add_argument("--images", help="its images")
    parser.add_argument("--num_images", type=int, default=210, help="random images")
    parser.add_argument("--num_texts", type=int, default=377, help="random texts, all different")
    parser.add_argument("--k", type=int, default=32, help="shortlist of two_stage")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--passes_only", action="store_true", help="leave the timed comparison out")
    parser.add_argument("--plot", metavar="FILE", help="draw the cost against the number of images")
    parser.add_argument("--plot_images", type=int, nargs="+", default=[25, 50, 75, 100], help="N of the timed points")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads, fp32, {encoding.PAIRS_PER_BATCH} pairs at once")
    if not options.passes_only:
        if options.model:
            model, processor = load_folder(options.model)
            assert isinstance(model, MMBertForPreTraining)
            test = read_examples("karpathy", options.annotations, options.images, only="test")["test"]
            candidates = Candidates.from_examples(test)
            started = time.perf_counter()
            encoded = encode(model, processor, candidates.images, candidates.texts)
            seconds = time.perf_counter() - started
        else:
            model = random_hybrid(6, **UCM)
            encoded, candidates, seconds = random_encoded(model, options.num_images, options.num_texts)
        print(
            f"{encoded.image_passes:,} images x {len(candidates.texts):,} texts ({encoded.text_passes:,} distinct), "
            f"k = {options.k}, encoded in {seconds:.1f} s; equal texts count as correct"
        )
        compare(model, encoded, candidates, seconds, options.k)
    passes(1000, options.k)
    if options.plot:
        plot(options.plot, options.k, options.plot_images)


if __name__ == "__main__":
    main()
