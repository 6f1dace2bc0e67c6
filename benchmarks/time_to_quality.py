"""Measure the CPU seconds until a dual encoder ranks well: late fusion beside transformers' VisionTextDualEncoder.

    OMP_NUM_THREADS=1 python benchmarks/time_to_quality.py --shared ../shared --targets 0.2 0.3 0.4

Both train on UCM captions from the same pretrained encoders, the image encoder frozen: transformers' model with its
Trainer, mmbert's by `mmbert.fit` with the encoder cache and the closed form of ITC. R@1 from text to image is measured
the same way for both, among the validation images with their first captions, an equal caption of another image counting
as correct. Prints the CPU seconds of the whole process, imports, decoding and the cache included but not the measuring,
until R@1 first reaches each target. Each side is a process of its own; the peer's learning rate is an option, as it
decides how fast the peer is.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

SIZE, TOKENS = 112, 40
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Curve = list[tuple[float, float]]  # CPU seconds, R@1


class Clock:
    """CPU seconds of the process, without those of measuring, and R@1 whenever it is measured."""

    def __init__(self) -> None:
        self.curve: Curve = []
        self._measuring = 0.0

    def measure(self, recall: Callable[[], float]) -> float:
        """Append a point to the curve and return R@1."""
        start = time.process_time()
        self.curve.append((start - self._measuring, recall()))
        self._measuring += time.process_time() - start
        return self.curve[-1][1]


def read_split(shared: Path, split: str) -> list[tuple[Path, list[str]]]:
    """Read image files and captions of a split of the Karpathy JSON."""
    folder = shared / "data/ucm_captions"
    rows = json.loads((folder / "dataset_ucm.json").read_text(encoding="utf-8"))["images"]
    return [
        (folder / "images" / row["filename"], [sentence["raw"] for sentence in row["sentences"]])
        for row in rows
        if row["split"] == split
    ]


def text_to_image(text: Tensor, images: Tensor, captions: list[list[str]]) -> float:
    """R@1 of each row's first caption among all images; an image that has an equal caption is correct.

    Args:
        text: (N, E) unit vectors.
        images: (N, E) unit vectors.
        captions: Of each image.
    """
    best = (text @ images.T).argmax(dim=1).tolist()
    return sum(captions[row][0] in captions[image] for row, image in enumerate(best)) / len(best)


def pixels(files: list[Path]) -> Tensor:
    """Decode images to (N, 3, SIZE, SIZE) fp32."""
    from PIL import Image
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.PILToTensor(),
            v2.Resize((SIZE, SIZE), antialias=True),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    return torch.stack([transform(Image.open(file).convert("RGB")) for file in files])


def dinov2(folder: Path) -> Any:
    """Build a Dinov2Model of transformers with the weights of a folder of timm."""
    from safetensors.torch import load_file
    from transformers import Dinov2Config, Dinov2Model

    model = Dinov2Model(Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14))
    names = {
        "cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.": "embeddings.patch_embeddings.projection.", "norm.": "layernorm.",
    }  # fmt: skip
    inner = {
        "attn.proj": "attention.o_proj", "ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1",
    }  # fmt: skip
    state: dict[str, Tensor] = {}
    for name, value in load_file(folder / "model.safetensors").items():
        if not name.startswith("blocks."):
            old = next(prefix for prefix in names if name.startswith(prefix))
            state[name.replace(old, names[old])] = value
            continue
        name = name.replace("blocks.", "encoder.layer.")
        for old, new in inner.items():
            name = name.replace(old, new)
        if "attn.qkv" in name:
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                state[name.replace("attn.qkv", f"attention.{part}_proj")] = piece
        else:
            state[name] = value
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or missing != ["embeddings.mask_token"]:
        raise RuntimeError(f"{folder}: missing {missing[:3]}, unexpected {unexpected[:3]}")
    return model


def run_peer(shared: Path, options: argparse.Namespace, out: Path) -> Curve:
    """Train VisionTextDualEncoder with transformers' Trainer until the last target or the limit is reached."""
    from transformers import (
        AutoTokenizer,
        BertModel,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        VisionTextDualEncoderModel,
    )

    clock = Clock()
    text_folder = shared / "weights/minilm-l6-h384"
    tokenizer = AutoTokenizer.from_pretrained(text_folder)
    vision, text = (
        dinov2(shared / "weights/vit_small_patch14_dinov2"),
        BertModel.from_pretrained(text_folder, dtype=torch.float32),
    )
    before = [p.detach().clone() for m in (vision, text) for p in m.parameters()]
    model = VisionTextDualEncoderModel(vision_model=vision, text_model=text)
    if not all(map(torch.equal, before, (p for m in (vision, text) for p in m.parameters()))):
        raise RuntimeError("VisionTextDualEncoderModel changed the pretrained weights")
    vision.requires_grad_(False)
    train, val = read_split(shared, "train"), read_split(shared, "val")
    images = pixels([file for file, _ in train])  # decoded once, to the peer's advantage
    rows = [(i, caption) for i, (_, captions) in enumerate(train) for caption in captions[:1]]

    def collate(batch: list[tuple[int, str]]) -> dict[str, Any]:
        tokens = tokenizer(
            [caption for _, caption in batch], padding=True, truncation=True, max_length=TOKENS, return_tensors="pt"
        )
        return {**tokens, "pixel_values": images[[i for i, _ in batch]], "return_loss": True}

    val_images = pixels([file for file, _ in val])
    val_texts = tokenizer([c[0] for _, c in val], padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")

    @torch.no_grad()
    def recall() -> float:
        model.eval()
        seen: Any = model.get_image_features(val_images)
        read: Any = model.get_text_features(**val_texts)
        model.train()
        text, images = (normalize(x.pooler_output, dim=-1) for x in (read, seen))
        return text_to_image(text, images, [captions for _, captions in val])

    class Measure(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % options.every == 0:
                found = clock.measure(recall)
                print(f"  peer, step {state.global_step}: {clock.curve[-1][0]:.0f} CPU s, R@1 {found:.3f}", flush=True)
                if found >= max(options.targets) or clock.curve[-1][0] > options.limit:
                    control.should_training_stop = True

    arguments = TrainingArguments(
        output_dir=str(out), per_device_train_batch_size=options.batch, learning_rate=options.peer_lr, use_cpu=True,
        num_train_epochs=1000, lr_scheduler_type="constant_with_warmup", warmup_steps=20, bf16=options.bf16,
        remove_unused_columns=False, save_strategy="no", report_to=[], disable_tqdm=True, logging_strategy="no", seed=0,
    )  # fmt: skip
    # The Trainer calls len() and [] only.
    Trainer(
        model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[Measure()]  # pyright: ignore
    ).train()  # fmt: skip
    return clock.curve


def run_own(shared: Path, options: argparse.Namespace, out: Path) -> Curve:
    """Train mmbert's late fusion from the closed form until the last target or the limit is reached."""
    import lightning

    import mmbert

    clock, val = Clock(), read_split(shared, "val")

    class Measure(lightning.Callback):
        @torch.no_grad()
        def measure(self, trainer: lightning.Trainer, module: Any) -> None:
            model, processor = module.model, trainer.datamodule.processor  # pyright: ignore
            itc, training = model.objectives["itc"], model.training

            def recall() -> float:
                model.eval()
                tokens = processor(text=[c[0] for _, c in val], return_tensors="pt", padding=True)
                inputs = processor(images=[str(file) for file, _ in val], return_tensors="pt")
                text = itc.embed_text(model.mmbert.encode_text(tokens["input_ids"], tokens["attention_mask"]))
                images = itc.embed_image(model.mmbert.encode_image(inputs["pixel_values"]))
                model.train(training)
                return text_to_image(text, images, [captions for _, captions in val])

            with trainer.precision_plugin.forward_context():
                found, step = clock.measure(recall), trainer.global_step
            print(f"  mmbert, step {step}: {clock.curve[-1][0]:.0f} CPU s, R@1 {found:.3f}", flush=True)
            trainer.should_stop = found >= max(options.targets) or clock.curve[-1][0] > options.limit

        def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
            self.measure(trainer, pl_module)

        def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.global_step % options.every == 0:
                self.measure(trainer, pl_module)

    data, weights = shared / "data/ucm_captions", shared / "weights"
    mmbert.fit(
        "pretrain/ucm",
        model={
            "fusion": "late", "text_pretrained": str(weights / "minilm-l6-h384"),
            "image_pretrained": str(weights / "vit_small_patch14_dinov2"),
            "objectives": {"itc": {"init": "closed_form", "pool": "first_and_mean", "embedding_size": 128}},
        },
        data={
            "annotations": str(data / "dataset_ucm.json"), "images": str(data / "images"), "cache": str(out / "cache"),
            "batch_size": options.batch, "views": None, "crop": 1.0, "flip": False, "num_workers": 0,
            "max_text_length": TOKENS, "test_captions": 1,
        },
        evaluation={"val_images": 0, "test_images": 0, "test_scorer": "itc"},
        trainer={
            "default_root_dir": str(out), "callbacks": [Measure()], "max_epochs": 100, "limit_test_batches": 1,
            "precision": "bf16-mixed" if options.bf16 else "32-true", "limit_val_batches": 0,
        },
        seed=0,
        threads=1,
    )  # fmt: skip
    return clock.curve


def work(name: str, options: argparse.Namespace) -> Curve:
    """Train one side."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        return {"mmbert": run_own, "VisionTextDualEncoder": run_peer}[name](options.shared, options, Path(folder))


def main() -> None:
    """Print a table of CPU seconds until each target."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shared", type=Path, required=True, help="folder with data/ucm_captions and weights")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.2, 0.3, 0.4], help="R@1 from text to image")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--peer_lr", type=float, default=1e-4, help="learning rate of the peer")
    parser.add_argument("--every", type=int, default=10, help="steps between two measurements")
    parser.add_argument("--limit", type=float, default=1800, help="CPU seconds after which a side stops")
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    options.shared = options.shared.resolve()
    curves: dict[str, Curve] = {}
    for name in ("mmbert", "VisionTextDualEncoder"):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            curves[name] = process.submit(work, name, options).result()
    print("| R@1 text to image | mmbert, CPU s | VisionTextDualEncoder, CPU s | ratio |\n|---|---|---|---|")
    for target in options.targets:
        own, peer = (next((s for s, r in curve if r >= target), None) for curve in curves.values())
        cells = ["not reached" if s is None else f"{s:.0f}" for s in (own, peer)]
        ratio = (
            f"{peer / own:.1f}"
            if own and peer
            else f"> {curves['VisionTextDualEncoder'][-1][0] / own:.1f}"
            if own
            else ""
        )
        print(f"| {target:.2f} | {cells[0]} | {cells[1]} | {ratio} |")


if __name__ == "__main__":
    main()
