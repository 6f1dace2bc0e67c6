"""`mmbert export`: files that compute the model's outputs and ranks, and errors in one sentence."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ranking import CAPTIONS, tiny_model
from tiers import FULL
from tiny import randomize, tiny_config, tiny_processor
from torch import Tensor

from mmbert.cli.main import main
from mmbert.data.processor import MMBertProcessor
from mmbert.errors import DataError, UsageError
from mmbert.evaluation.encoding import encode, pair_scores
from mmbert.inference import export
from mmbert.model.fusion import FUSIONS
from mmbert.model.modeling import MMBertForPreTraining, MMBertForTask, MMBertModel, MMBertPreTrainedModel

slow = pytest.mark.skipif(not FULL, reason="torch's exporter takes 10 s and more for a tiny model: MMBERT_FULL=1")
onnx = pytest.mark.skipif(
    any(find_spec(name) is None for name in export.ONNX_PACKAGES), reason="needs pip install 'mmbert[onnx]'"
)
DEPTHS = {"text_layers": 2, "image_layers": 2}
"""With which every strategy can be built."""


def saved(folder: Path, model: MMBertPreTrainedModel | None = None) -> str:
    (tiny_model() if model is None else model).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return str(folder)


def task_model(task: str, num_images: int) -> MMBertForTask:
    model = MMBertForTask(tiny_config(objectives={}, task=task, labels=["no", "yes"], num_images=num_images)).eval()
    randomize(model)
    return model


def images(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)) for _ in range(count)]


def score_with_files(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and matching scores of all images (rows) with all captions, by the three ONNX files alone."""
    import onnxruntime

    sessions = {name: onnxruntime.InferenceSession(folder / f"{name}.onnx") for name in ("text", "image", "fusion")}
    names = {name: [output.name for output in session.get_outputs()] for name, session in sessions.items()}

    def run(name: str, **inputs: Any) -> dict[str, np.ndarray]:
        found = sessions[name].run(names[name], {key: np.asarray(value) for key, value in inputs.items()})
        return dict(zip(names[name], found, strict=True))

    processor = MMBertProcessor.from_pretrained(folder)
    texts = [caption for captions in CAPTIONS for caption in captions]
    prepared = processor(images=images(len(CAPTIONS)), text=texts)
    text = run("text", input_ids=prepared["input_ids"], attention_mask=prepared["attention_mask"])
    image = run("image", pixel_values=prepared["pixel_values"])
    matching = np.zeros((len(CAPTIONS), len(texts)))
    for row in range(len(CAPTIONS)):
        states = image["image_hidden_states"][row : row + 1].repeat(len(texts), axis=0)
        logits = run(
            "fusion", text_hidden_states=text["text_hidden_states"], attention_mask=prepared["attention_mask"],
            image_hidden_states=states,
        )["itm_logits"]  # fmt: skip
        matching[row] = logits[:, 1] - logits[:, 0]
    return image["image_embeds"] @ text["text_embeds"].T, matching


@slow
@onnx
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("fusion", [*FUSIONS])
def test_onnx_files_rank_as_the_model_does(fusion: str, tmp_path: Path) -> None:
    model = tiny_model(fusion, **DEPTHS)
    files = export.export_onnx(saved(tmp_path / "model", model), tmp_path / "out")
    assert [file.path.name for file in files] == ["text.onnx", "image.onnx", "fusion.onnx"]
    cosines, matching = score_with_files(tmp_path / "out")
    texts = [caption for captions in CAPTIONS for caption in captions]
    encoded = encode(model, tiny_processor(), images(len(CAPTIONS)), texts)
    assert encoded.images is not None and encoded.image_vectors is not None and encoded.text_vectors is not None
    pairs = torch.cartesian_prod(torch.arange(len(CAPTIONS)), torch.arange(len(encoded.texts)))
    scores = pair_scores(model, encoded.images, encoded.texts, pairs).reshape(len(CAPTIONS), -1)
    expected = (encoded.image_vectors @ encoded.text_vectors.T, scores)
    for found, of_distinct in zip((cosines, matching), expected, strict=True):
        of_texts = of_distinct[:, encoded.text_index].numpy()
        np.testing.assert_allclose(found, of_texts, atol=1e-4)
        assert (found.argmax(axis=0) == of_texts.argmax(axis=0)).all()


@slow
@onnx
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("task", "num_images"), [("vqa", 1), ("decision", 2)])
def test_onnx_file_of_a_task_answers_as_the_model_does(task: str, num_images: int, tmp_path: Path) -> None:
    import onnxruntime

    model = task_model(task, num_images)
    export.export_onnx(saved(tmp_path / "model", model), tmp_path / "out")
    session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx")
    names = ["input_ids", "attention_mask", "pixel_values"]
    assert [(x.name, x.shape[0]) for x in session.get_inputs()] == [(name, "batch") for name in names]
    assert [(x.name, x.shape) for x in session.get_outputs()] == [("logits", ["batch", 2])]
    inputs: dict[str, Tensor] = {**tiny_processor()(text=["a red cat", "two"])}
    pixels = tiny_processor()(images=images(2 * num_images))["pixel_values"]
    inputs["pixel_values"] = pixels if num_images == 1 else pixels.unflatten(0, (2, num_images))
    (found,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    with torch.no_grad():
        np.testing.assert_allclose(found, model(**inputs).logits, atol=1e-4)


@slow
@onnx
@pytest.mark.timeout(1200)
def test_int8_quantises_every_linear_layer(tmp_path: Path) -> None:
    import onnx as onnx_format

    files = export.export_onnx(saved(tmp_path / "model"), tmp_path / "out", int8=True)
    for file in files:
        assert file.int8_difference is not None and 1e-4 < file.int8_difference < 0.1
        graph = onnx_format.load(str(file.path)).graph
        weights = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
        products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
        assert not [node for node in products if weights & {*node.input}]
        assert sum(node.op_type == "MatMulInteger" for node in graph.node) >= 7


@slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("fusion", [*FUSIONS])
def test_programs_compute_the_outputs_of_the_model(fusion: str, tmp_path: Path) -> None:
    model = MMBertModel(tiny_config(fusion=fusion, objectives={}, **DEPTHS))
    randomize(model)
    export.export_program(saved(tmp_path / "model", model.eval()), tmp_path / "out")
    parts = {name: torch.export.load(tmp_path / f"out/{name}.pt2").module() for name in ("text", "image", "fusion")}
    for texts in (["two"], ["a red cat", "the dog sits on the street", "a"]):  # batch sizes 1 and 3
        inputs = tiny_processor()(text=texts, images=images(len(texts)))
        mask = inputs["attention_mask"]
        with torch.no_grad():
            text = parts["text"](input_ids=inputs["input_ids"], attention_mask=mask)
            image = parts["image"](pixel_values=inputs["pixel_values"])
            found = parts["fusion"](attention_mask=mask, **text, **image)
            expected = model(**inputs)
        for name in ("last_hidden_state", "image_last_hidden_state", "pooler_output"):
            torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=0)


Write = Callable[[Any, Path], Callable[[dict[str, Tensor]], dict[str, Tensor]]]


def writes(error: float) -> Write:
    """An exporter whose files compute outputs that are wrong by `error`."""

    def write(part: Any, file: Path) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
        file.write_bytes(b"some")
        return lambda inputs: {name: value + error for name, value in part.module(**inputs).items()}

    return write


def test_export_reports_each_file_and_adds_the_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                         capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setattr(export, "_write_program", writes(2e-5))
    main(["export", "program", saved(tmp_path / "model"), str(tmp_path / "a/out"), "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [Path(row["path"]).name for row in rows] == ["text.pt2", "image.pt2", "fusion.pt2"]
    assert all(row["bytes"] == 4 and abs(row["difference"] - 2e-5) < 1e-6 for row in rows)
    assert MMBertProcessor.from_pretrained(tmp_path / "a/out").max_text_length == 16
    assert json.loads((tmp_path / "a/out/config.json").read_text())["fusion"] == "hybrid"


def test_model_without_a_head_on_the_fusion_has_no_such_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_write_program", writes(0))
    torch.manual_seed(0)
    model = MMBertForPreTraining(tiny_config(objectives={"itc": 1.0}))
    files = export.export_program(saved(tmp_path / "model", model), tmp_path / "out")
    assert [file.path.name for file in files] == ["text.pt2", "image.pt2"]


def test_wrong_outputs_of_a_file_are_an_error_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "_write_program", writes(2e-4))
    model = saved(tmp_path / "model")
    with pytest.raises(DataError, match=r"text\.pt2.*differ from the model's by 2\.0e-04"):
        export.export_program(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_unexportable_fusion_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(part: Any, file: Path) -> Any:
        raise RuntimeError("data-dependent control flow\nmore lines")

    monkeypatch.setattr(export, "_write_program", fail)
    with pytest.raises(UsageError, match=r"the part text can't be exported: data-dependent control flow$"):
        export.export_program(saved(tmp_path / "model"), tmp_path / "out")


def test_model_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="reads no image"):
        export.export_program(saved(tmp_path / "model", task_model("decision", 0)), tmp_path / "out")


def test_folder_with_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not an empty folder"):
        export.export_program(saved(tmp_path / "model"), tmp_path / "model")


def test_missing_packages_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxruntime" else find_spec(name))
    with pytest.raises(SystemExit) as stopped:
        main(["export", "onnx", "any", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    assert "needs onnxruntime: pip install 'mmbert[onnx]'" in error
