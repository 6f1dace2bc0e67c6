"""Measure the time of one search in an index of random vectors.

    python benchmarks/search.py [--images 100000] [--size 256] [--queries 50] [--faiss]

Prints milliseconds from a text's vector to the 10 best images (median, 90th percentile, mean CPU time of the process),
once the vectors are in the page cache; with `--faiss` also those of the approximate index. OMP_NUM_THREADS sets the
number of threads.
"""

import argparse
import logging
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import BertTokenizer

from mmbert.data.image_processor import ImageSettings
from mmbert.data.processor import MMBertProcessor
from mmbert.inference.index import ImageIndex, write_approximate
from mmbert.inference.index_files import MANIFEST, Entry, IndexFacts, write_merged
from mmbert.inference.loaded import LoadedModel
from mmbert.model.configuration import MMBertConfig
from mmbert.model.modeling import MMBertModel


def random_index(folder: Path, num_images: int, size: int) -> ImageIndex:
    """Write an index of random unit vectors (N, E); its model is there in name only."""
    vectors = np.random.default_rng(0).standard_normal((num_images, size), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    entries = {f"{i:08d}.jpg": Entry(f"{i:08d}.jpg", 1, 1, "x", part=0, row=i) for i in range(num_images)}
    write_merged(folder / "000001-merged", entries, [vectors.astype(np.float16)])
    config = MMBertConfig(
        text_layers=0, image_layers=0, fusion_layers=1, hidden_size=32, num_attention_heads=2, vocab_size=9
    )
    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    (folder / "vocab.txt").write_text("\n".join(words))
    processor = MMBertProcessor(BertTokenizer(str(folder / "vocab.txt")), ImageSettings(32, (0, 0, 0), (1, 1, 1)))
    return ImageIndex(folder, IndexFacts("", "", size, "/"), LoadedModel(MMBertModel(config), processor))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--faiss", action="store_true")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    queries = torch.nn.functional.normalize(torch.randn(options.queries, options.size), dim=1)
    with tempfile.TemporaryDirectory() as name:
        index = random_index(Path(name), options.images, options.size)
        if options.faiss:
            started = time.perf_counter()
            write_approximate(index, Path(name) / f"000001-merged{MANIFEST}")
            print(f"approximate index: {time.perf_counter() - started:.0f} s")
            index = ImageIndex(Path(name), index.facts, index.model)
        for exact in (True, False)[: 1 + options.faiss]:
            index.nearest(queries[0], 10, exact=exact)
            milliseconds, cpu = [], time.process_time()
            for query in queries:
                started = time.perf_counter()
                index.nearest(query, 10, exact=exact)
                milliseconds.append(1000 * (time.perf_counter() - started))
            cpu = 1000 * (time.process_time() - cpu) / len(queries)
            median, high = np.percentile(milliseconds, (50, 90))
            kind = "exact" if exact else "faiss"
            print(f"{kind}: {options.images:,} vectors of {options.size}, {torch.get_num_threads()} threads: "
                  f"median {median:.1f} ms, 90th percentile {high:.1f} ms, CPU time {cpu:.1f} ms")  # fmt: skip


if __name__ == "__main__":
    main()
