"""Compare exported ONNX files, in fp32 and int8, with the model: ranks, R@1, size and CPU time.

    python benchmarks/export.py RUN/model [RUN/model ...] --annotations F.json --images DIR [--k 8] [--limit N]

Every image of a COCO file is ranked against the first caption of each: by the contrastive vectors, and with the
matching head on the `--k` nearest texts of each image and images of each text (the model's, so that all fuse the same
pairs). Times are CPU seconds of one thread, so other processes on the machine hardly change them. Without `--limit`
nothing is left out.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import onnxruntime
import torch
from torch import Tensor

from mmbert.data.examples import read_examples
from mmbert.data.processor import MMBertProcessor, pad
from mmbert.inference.export import export_onnx, model_parts
from mmbert.inference.loading import load_folder
from mmbert.metrics.retrieval import ranks

BATCH = 64


class Engine(NamedTuple):
    """The three parts of a model, in torch or as ONNX files: named tensors to named tensors."""

    text: Callable[..., dict[str, Tensor]]
    image: Callable[..., dict[str, Tensor]]
    fusion: Callable[..., dict[str, Tensor]]


class Run(NamedTuple):
    """Scores of all images with all texts, and CPU seconds."""

    cosines: Tensor  # (N, N)
    matching: Tensor  # (N, N); 0 where a pair was not fused
    image_seconds: float
    text_seconds: float
    fusion_seconds: float


def torch_engine(model: Any) -> Engine:
    """Call the model's own methods."""
    parts: dict[str, Any] = {name: part.module for name, part in model_parts(model).items()}
    return Engine(parts["text"], parts["image"], parts["fusion"])


def onnx_engine(folder: Path) -> Engine:
    """Call ONNX files with one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1

    def load(name: str) -> Callable[..., dict[str, Tensor]]:
        session = onnxruntime.InferenceSession(folder / f"{name}.onnx", options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]

        def run(**inputs: Tensor) -> dict[str, Tensor]:
            found = session.run(names, {key: value.numpy() for key, value in inputs.items()})
            return {key: torch.from_numpy(value) for key, value in zip(names, found, strict=True)}

        return run

    return Engine(load("text"), load("image"), load("fusion"))


@torch.no_grad()
def score(
    engine: Engine, processor: MMBertProcessor, pixels: Tensor, ids: list[list[int]], chosen: Tensor | None, k: int
) -> tuple[Run, Tensor]:
    """Encode all images and texts, and fuse the chosen pairs: None chooses the `k` nearest of either side.

    Args:
        engine: Computes.
        processor: The model's.
        pixels: (N, 3, S, S) uint8.
        ids: Token ids of the U texts.
        chosen: (N, U) bool.
        k: Length of the shortlists.
    """
    seconds = [time.process_time()]
    found = [engine.image(pixel_values=processor.image_settings.normalize(part)) for part in pixels.split(BATCH)]
    images, image_vectors = (torch.cat([x[name] for x in found]) for name in ("image_hidden_states", "image_embeds"))
    seconds.append(time.process_time())
    by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    texts: list[Tensor] = [torch.empty(0)] * len(ids)
    text_vectors = torch.empty(len(ids), image_vectors.shape[1])
    for first in range(0, len(ids), BATCH):
        rows = by_length[first : first + BATCH]
        input_ids, mask = pad([ids[i] for i in rows], processor.pad_token_id)
        output = engine.text(input_ids=input_ids, attention_mask=mask)
        text_vectors[rows] = output["text_embeds"]
        for i, states in zip(rows, output["text_hidden_states"], strict=True):
            texts[i] = states[: len(ids[i])]
    seconds.append(time.process_time())
    cosines = image_vectors @ text_vectors.T
    if chosen is None:
        chosen = torch.zeros_like(cosines, dtype=torch.bool)
        chosen.scatter_(1, cosines.topk(k, dim=1).indices, True)
        chosen.scatter_(0, cosines.topk(k, dim=0).indices, True)
    pairs = chosen.nonzero()
    lengths = torch.tensor([len(row) for row in ids])
    matching = torch.zeros_like(cosines)
    for part in pairs[lengths[pairs[:, 1]].argsort(stable=True)].split(2 * BATCH):
        rows = [texts[i] for i in part[:, 1].tolist()]
        mask = (torch.arange(max(map(len, rows))) < lengths[part[:, 1], None]).long()
        states = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        logits = engine.fusion(
            text_hidden_states=states, attention_mask=mask, image_hidden_states=images[part[:, 0]]
        )["itm_logits"]  # fmt: skip
        matching[part[:, 0], part[:, 1]] = logits[:, 1] - logits[:, 0]
    seconds.append(time.process_time())
    spent = [after - before for before, after in pairwise(seconds)]
    return Run(cosines, matching, *spent), chosen


def rank_all(run: Run, chosen: Tensor, relevant: Tensor) -> list[Tensor]:
    """Ranks of all images and of all texts, by the vectors and by the matching head on the shortlist."""
    below = run.matching[chosen].min() - 3  # a cosine is 1 at most
    both = run.cosines, torch.where(chosen, run.matching, run.cosines + below)
    owner = relevant.int().argmax(dim=0)
    return [torch.from_numpy(found) for scores in both for found in ranks(scores, owner, relevant=relevant)]


def main() -> None:
    """Print a line for each model and engine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--annotations", required=True, type=Path)
    parser.add_argument("--images", required=True, type=Path)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--limit", type=int, help="first images only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    examples = read_examples("coco", {"test": options.annotations}, options.images)["test"][: options.limit]
    print("model engine MB | R@1 (I->T, T->I) by vectors, by matching | differing ranks | CPU s: images, texts, pairs")
    for name in options.models:
        model, processor = load_folder(name)
        pixels = torch.stack([processor.pixel_values(example.image) for example in examples])
        numbers: dict[tuple[int, ...], int] = {}
        text_of = [numbers.setdefault((*processor.encode(e.captions[0]),), len(numbers)) for e in examples]
        ids = [[*row] for row in numbers]
        relevant = torch.zeros(len(examples), len(ids), dtype=torch.bool)
        relevant[range(len(examples)), text_of] = True
        with tempfile.TemporaryDirectory() as folder:
            files = {kind: export_onnx(name, Path(folder) / kind, int8=kind == "int8") for kind in ("fp32", "int8")}
            engines = {"torch": torch_engine(model), **{kind: onnx_engine(Path(folder) / kind) for kind in files}}
            chosen, reference = None, []
            for kind, engine in engines.items():
                run, chosen = score(engine, processor, pixels, ids, chosen, options.k)
                found = rank_all(run, chosen, relevant)
                reference = reference or found
                recall = " ".join(f"{(x == 1).float().mean():.4f}" for x in found)
                others = " ".join(str(int((x != y).sum())) for x, y in zip(found, reference, strict=True))
                size = sum(x.bytes for x in files[kind]) if kind in files else 4 * model.num_parameters()
                times = f"{run.image_seconds:.1f} {run.text_seconds:.1f} {run.fusion_seconds:.1f}"
                print(f"{name} {kind} {size / 1e6:.1f} | {recall} | {others} | {times}", flush=True)


if __name__ == "__main__":
    main()
