"""A small data/shapes and a way to call the command line on it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory, worker_id: str = "master") -> Path:
    """A drawn data set of 64 training, 16 validation and 32 test scenes."""
    folder = tmp_path_factory.mktemp("shapes")
    script = [sys.executable, str(ROOT / "data/shapes/prepare.py"), "--out", str(folder)]
    subprocess.run([*script, "--train", "64", "--val", "16", "--test", "32", "--jobs", "1"], check=True)
    return folder


@pytest.fixture(scope="session")
def tiny(shapes: Path) -> list[str]:
    """Options that make any configuration tiny and point it at `shapes`."""
    splits = ("train", "val", "test", "test_seen", "test_unseen")
    files = ", ".join(f"{s}: {shapes}/annotations/captions_{s}.json" for s in splits)
    options = {
        "model.text_pretrained": "null",
        "model.image_pretrained": "null",
        "model.text_layers": 1,
        "model.image_layers": 1,
        "model.fusion_layers": 1,
        "model.hidden_size": 32,
        "model.num_attention_heads": 2,
        "model.image_model": "vit_tiny_patch16_224",
        "model.image_size": 32,
        "model.patch_size": 16,
        "model.image_hidden_size": 32,
        "model.image_num_attention_heads": 2,
        "model.max_position_embeddings": 64,
        "data.format": "coco",
        "data.annotations": "{" + files + "}",
        "data.images": shapes / "images",
        "data.tokenizer": shapes / "tokenizer",
        "data.batch_size": 16,
        "data.eval_batch_size": 16,
        "data.num_workers": 0,
        "trainer.accelerator": "cpu",
        "trainer.accumulate_grad_batches": 1,
        "trainer.enable_progress_bar": "false",
    }
    return [f"--{key}={value}" for key, value in options.items()]
