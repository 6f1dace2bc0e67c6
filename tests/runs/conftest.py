"""A small data/shapes and a way to call the command line on it."""

import json
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
        "data.image_key": "image",
        "data.caption_key": "caption",
        "data.split_key": "null",
        "data.split_values": "null",
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


@pytest.fixture(scope="session")
def tiny_tasks(shapes: Path, tiny: list[str]) -> dict[str, list[str]]:
    """Task -> options that make its configurations tiny: questions about `shapes`, and statements cut out of them."""
    splits = ("train", "val", "test")
    of_model = [option for option in tiny if not option.startswith("--data.")]
    of_data = [f"--data.{k}={v}" for k, v in {
        "batch_size": 16, "eval_batch_size": 16, "num_workers": 0, "tokenizer": shapes / "tokenizer",
        "images": shapes / "images", "min_answer_count": 3, "max_text_length": 40,
    }.items()]  # fmt: skip

    def files(pattern: str) -> str:
        return "{" + ", ".join(f"{s}: {shapes}/annotations/{pattern.format(s)}" for s in splits) + "}"

    for split in splits:
        write_statements(shapes / "annotations", split)
    vqa = [
        "--data.format=vqav2", f"--data.questions={files('questions_{}.json')}",
        f"--data.annotations={files('answers_{}.json')}", f"--data.image_names={files('captions_{}.json')}",
    ]  # fmt: skip
    decision = [
        "--data.format=jsonl", f"--data.annotations={files('statements_{}.jsonl')}", "--data.image_names=",
        "--data.image_key=image", "--data.text_key=text", "--data.label_key=label", "--data.id_key=id",
    ]  # fmt: skip
    return {"vqa": of_model + of_data + vqa, "decision": of_model + of_data + decision}


def write_statements(folder: Path, split: str) -> None:
    """Makes captions of a split into true and false statements: the false ones are another scene's."""
    captions = json.loads((folder / f"captions_{split}.json").read_text())
    names = {image["id"]: image["file_name"] for image in captions["images"]}
    first = {record["image_id"]: record["caption"] for record in captions["annotations"]}
    ids, rows = list(first), []
    for i, image_id in enumerate(ids):
        for right in (True, False):
            text = first[image_id if right else ids[i - 1]]
            row = {"id": f"{split}-{i}-{right}", "image": names[image_id], "text": text, "label": int(right)}
            rows.append(json.dumps(row))
    (folder / f"statements_{split}.jsonl").write_text("\n".join(rows) + "\n")
