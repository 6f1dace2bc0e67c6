"""Measure samples/s on UCM captions with and without the encoder cache, in alternating runs.

    python benchmarks/encoder_cache.py --shared ../shared --fusion late hybrid --rounds 5

Every run is a process of its own and trains on a quarter of the images. `--baseline DIR` adds runs of another checkout
of mmbert, without a cache.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def samples_per_second(checkout: Path, shared: Path, out: Path, options: list[str], steps: int) -> float:
    """Train on UCM captions and return the samples/s of training, without validation and checkpoints."""
    data, weights = shared / "data/ucm_captions", shared / "weights"
    command = [
        sys.executable, "-m", "mmbert", "fit", "--config", str(checkout / "configs/pretrain/ucm.yaml"),
        f"--model.text_pretrained={weights}/minilm-l6-h384", f"--data.annotations={data}/dataset_ucm.json",
        f"--model.image_pretrained={weights}/vit_small_patch14_dinov2", f"--data.images={data}/images",
        f"--trainer.default_root_dir={out}", "--name=run", f"--trainer.max_steps={steps}", "--data.val_size=16",
        "--trainer.limit_test_batches=1", "--data.test_captions=1", "--evaluation.test_images=0",
        "--evaluation.val_images=0", "--data.train_fraction=0.25", f"--checkpoint.every_n_steps={10 * steps}", *options,
    ]  # fmt: skip
    # `python -m` imports from the working directory first.
    subprocess.run(command, check=True, cwd=checkout, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: S603
    newest = max(out.glob("run*/metrics.json"), key=lambda file: file.stat().st_mtime)
    return json.loads(newest.read_text(encoding="utf-8"))["run/samples_per_second"]


def main() -> None:
    """Print samples/s of every run, the medians, and the medians of the ratios to the first arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with data/ucm_captions and weights")
    parser.add_argument("--baseline", type=Path, help="another checkout of mmbert, to compare with")
    parser.add_argument("--cache", type=Path, help="keep the cache in this folder; default: fill it anew")
    parser.add_argument("--fusion", nargs="+", default=["late", "hybrid"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of a run")
    arguments, more = parser.parse_known_args()
    shared = arguments.shared.resolve()
    with tempfile.TemporaryDirectory() as folder:
        cache = (arguments.cache or Path(folder) / "cache").resolve()
        arms = {"no cache": (ROOT, ["--data.cache=null"]), "cache": (ROOT, [f"--data.cache={cache}"])}
        if arguments.baseline is not None:
            arms = {"baseline": (arguments.baseline.resolve(), []), **arms}
        for fusion in arguments.fusion:
            speeds: dict[str, list[float]] = {name: [] for name in arms}
            for _ in range(arguments.rounds):
                for name, (checkout, options) in arms.items():
                    options = [*options, f"--model.fusion={fusion}", *more]
                    out = Path(folder) / fusion / name.replace(" ", "_")
                    speeds[name].append(samples_per_second(checkout, shared, out, options, arguments.steps))
            first = next(iter(speeds.values()))
            for name, found in speeds.items():
                ratio = statistics.median(a / b for a, b in zip(found, first, strict=True))
                shown = " ".join(f"{x:.1f}" for x in found)
                print(f"{fusion:8} {name:9} {statistics.median(found):6.1f} samples/s, {ratio:.2f} times | {shown}")


if __name__ == "__main__":
    main()
