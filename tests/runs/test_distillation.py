"""Distillation from a frozen teacher: its vectors, resume, and what is refused."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from interrupted import ROOT, fit, killed, trace, weights
from oracles.import_parity import import_model
from oracles.test_import_clip import clip_tokenizer, theirs
from safetensors.torch import load_file, save_file
from tiny import randomize, tiny_config, tiny_examples, tiny_processor

from mmbert.compare.calibration import measure_step
from mmbert.data.datamodule import PairsDataModule
from mmbert.data.options import DataOptions
from mmbert.data.processor import MMBertProcessor
from mmbert.errors import UsageError
from mmbert.evaluation.model_cache import Computation
from mmbert.model.configuration import MMBertConfig
from mmbert.model.modeling import MMBertForPreTraining
from mmbert.model.options import ModelOptions
from mmbert.training.distillation import find_teacher, use_teacher
from mmbert.training.run import TrainingRun
from mmbert.training.run_options import parse_run

ITC = {"embedding_size": 8, "temperature": 0.2}


def save_model(folder: Path, **overrides: Any) -> MMBertForPreTraining:
    """A random model of images of 24 pixels with a tokenizer of its own."""
    torch.manual_seed(0)
    model = MMBertForPreTraining(tiny_config(image_size=24, **overrides)).eval()
    randomize(model)
    model.save_pretrained(folder)
    tiny_processor(image_size=24).save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    save_model(folder, fusion="late", objectives={"itc": ITC})
    return folder


def options(teacher: Path, **more: Any) -> list[str]:
    distill = json.dumps({"teacher": str(teacher), **more})
    objectives = f"{{itm: {{negatives: hard}}, itc: 1, distill: {distill}}}"
    return [
        "--name=run",
        "--trainer.max_epochs=2",
        "--trainer.limit_test_batches=1",
        f"--model.objectives={objectives}",
    ]


def test_run_is_resumed_bit_identically_and_saves_no_teacher(teacher: Path, tiny: list[str], tmp_path: Path) -> None:
    fit(tiny, tmp_path / "whole", *options(teacher))
    killed(lambda: fit(tiny, tmp_path / "killed", *options(teacher)), after_batch=3)
    fit(tiny, tmp_path / "killed", *options(teacher), "--resume=auto")
    assert trace(tmp_path / "killed") == trace(tmp_path / "whole") and len(trace(tmp_path / "whole")) == 9
    own = weights(tmp_path / "whole")
    assert all(torch.equal(value, weights(tmp_path / "killed")[name]) for name, value in own.items())
    assert not any("distill" in name or "teacher" in name for name in own)
    saved = json.loads((tmp_path / "whole/run/model/config.json").read_text())
    assert saved["objectives"]["distill"] == {}


def test_resume_refuses_a_changed_teacher(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "teacher"
    save_model(folder, fusion="late", objectives={"itc": ITC})
    killed(lambda: fit(tiny, tmp_path, *options(folder)), after_batch=2)
    state = load_file(folder / "model.safetensors")
    state["objectives.itc.log_scale"] += 1
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit):
        fit(tiny, tmp_path, *options(folder), "--resume=auto")
    assert "teacher (SHA-256) was" in capsys.readouterr().err


def test_dry_run_writes_no_vectors(teacher: Path, tiny: list[str], tmp_path: Path) -> None:
    fit(tiny, tmp_path, *options(teacher), "--trainer.fast_dev_run=true")
    assert not [*tmp_path.rglob("rows.bin")]


def test_flops_of_a_step_are_counted_without_the_teacher(
    teacher: Path, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmbert.compare.calibration.COUNTED_BATCHES", 1)
    config = str(ROOT / "configs/pretrain/shapes_plain.yaml")
    arguments = ["--config", config, *tiny, *options(teacher), f"--trainer.default_root_dir={tmp_path}"]
    comparison: Any = SimpleNamespace(cached_encoder=False, match="flops")
    assert measure_step(TrainingRun(parse_run(arguments), dry=True), comparison).flops > 1e6


CAPTIONS = [("a red cat", "the cat runs"), ("a blue bird", "two small birds on the street"), ("a dog",), ("a red cat",)]


def taught(folder: Path, teacher: Path, temperature: float | None, captions: Any = CAPTIONS) -> PairsDataModule:
    """Training data of the images in a folder with the vectors of a teacher."""
    rows = [{"image": f"{i}.png", "caption": [*texts], "split": "train"} for i, texts in enumerate(captions)]
    (folder / "captions.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    options = DataOptions(
        format="jsonl", annotations=str(folder / "captions.jsonl"), images=str(folder), split_key="split",
        batch_size=3, num_workers=0, crop=0.5,
    )  # fmt: skip
    distill = {"teacher": str(teacher), "temperature": temperature}
    config = tiny_config(objectives={"itc": 1.0, "distill": distill})
    computation = Computation("32-true", torch.device("cpu"), lambda: torch.autocast("cpu", enabled=False))
    data = PairsDataModule(options, tiny_processor(), seed=0)
    use_teacher(teacher, config, data, root=folder, computation=computation, dry=False)
    return data


@pytest.mark.parametrize("temperature", [None, 0.5])
def test_samples_have_the_vectors_of_the_teacher(
    temperature: float | None, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that the teacher gives for one image and one caption alone; read from the store by a second run."""
    tiny_examples(tmp_path, CAPTIONS, side=40)
    data = taught(tmp_path, teacher, temperature)
    model, processor = MMBertForPreTraining.from_pretrained(teacher).eval(), tiny_processor(image_size=24)
    itc: Any = model.objectives["itc"]
    scale = float(itc.scale.detach()) if temperature is None else 2.0
    for epoch in range(2):
        batch = data.collate([data.train_samples[epoch, i] for i in range(4)])
        for i, (image, captions) in enumerate((e.image, e.captions) for e in data.train_samples.examples):
            caption = captions[int(data.train_samples.caption_numbers(epoch)[i])]
            inputs = processor(images=image, text=caption)
            with torch.no_grad():
                of_text = itc.embed_text(model.mmbert.encode_text(inputs["input_ids"], inputs["attention_mask"]))
                of_image = itc.embed_image(model.mmbert.encode_image(inputs["pixel_values"]))
            torch.testing.assert_close(batch["teacher_image"][i], of_image[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(batch["teacher_text"][i], scale * of_text[0], rtol=1e-4, atol=1e-5)
    for name in ("encode_text", "encode_image"):
        monkeypatch.setattr(f"mmbert.model.modeling.MMBertModel.{name}", None)
    again = taught(tmp_path, teacher, temperature)
    again = again.collate([again.train_samples[1, i] for i in range(4)])
    assert all(torch.equal(batch[name], again[name]) for name in ("teacher_image", "teacher_text"))


@torch.no_grad()
def test_an_imported_clip_is_a_teacher_with_its_own_tokenizer(tmp_path: Path) -> None:
    """Its logits are those of transformers' CLIPModel on the captions of the first epoch."""
    tokenizer = clip_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    clip = theirs(end=len(tokenizer) - 1, vocabulary=len(tokenizer))
    import_model(clip, tmp_path, tokenizer=str(tmp_path / "tokenizer"))
    captions = [("a red cat", "a cat"), ("red",), ("a red cat " * 4,), ("a red cat",)]
    examples = tiny_examples(tmp_path, captions, side=40)
    data = taught(tmp_path, tmp_path / "own", None, captions)
    batch = data.collate([data.train_samples[0, i] for i in range(4)])
    words = tokenizer(data.training_texts(range(4)), padding=True, truncation=True, max_length=12, return_tensors="pt")
    processor = MMBertProcessor.from_pretrained(tmp_path / "own")
    pixels = processor(images=[example.image for example in examples])["pixel_values"]
    expected = clip(**words, pixel_values=pixels).logits_per_text
    torch.testing.assert_close(batch["teacher_text"] @ batch["teacher_image"].T, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("distill", "message"),
    [
        ({}, "objectives.distill.teacher is missing: name the folder"),
        ({"teacher": "./nowhere"}, "'nowhere' is no folder of a saved mmbert model"),
        ({"teacher": "headless"}, "teacher='headless' has no head of the objective itc; name a model that has one"),
        ({"teacher": "without"}, "teacher='without' has no head of the objective itc; name a model that has one"),
        ({"temperature": -1}, "objectives.distill.temperature=-1: must be a number above 0, or null"),
    ],
)
def test_wrong_teachers_are_errors(
    distill: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if distill.get("teacher") == "without":
        save_model(tmp_path / "without", objectives={"itm": 1.0})
    if distill.get("teacher") == "headless":
        save_model(tmp_path / "headless").mmbert.save_pretrained(tmp_path / "headless")
    with pytest.raises(UsageError) as error:
        find_teacher(ModelOptions(objectives={"itc": 1.0, "distill": distill}))
    assert message in str(error.value)


def test_other_runs_have_no_teacher() -> None:
    for objectives in ({"itc": 1.0}, {"itc": 1.0, "distill": 0}):
        assert find_teacher(ModelOptions(objectives=objectives)) is None
    assert MMBertConfig(objectives={"itc": 1.0, "distill": 1.0}).objectives["distill"] == 1.0
