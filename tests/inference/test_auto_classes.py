"""A saved folder with transformers' Auto classes, its processor, the hub, and `mmbert.pipeline`."""

import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiers import FULL
from tiny import SPECIAL, WORDS, randomize, tiny_config, tiny_processor
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining, AutoProcessor, ProcessorMixin

import mmbert
from mmbert.data.processor import MMBertProcessor
from mmbert.errors import UsageError
from mmbert.inference.loaded import LoadedModel
from mmbert.inference.pipeline import TASKS, pipeline
from mmbert.model import hub
from mmbert.model.auto_classes import MMBertForQuestionAnswering
from mmbert.model.auto_map import AUTO_MAP, CLASSES
from mmbert.model.configuration import MMBertConfig
from mmbert.model.modeling import MMBertForPreTraining, MMBertModel

IMAGE = Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3))


def built(cls: Any, **overrides: Any) -> Any:
    torch.manual_seed(0)
    model = cls(tiny_config(vocab_size=len(SPECIAL) + len(WORDS), **overrides)).eval()
    randomize(model)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained model with its processor."""
    path = tmp_path_factory.mktemp("saved")
    built(MMBertForPreTraining).save_pretrained(path)
    tiny_processor().save_pretrained(path)
    return path


def test_auto_classes_load_a_saved_folder(folder: Path) -> None:
    mmbert.register()
    assert isinstance(AutoConfig.from_pretrained(folder), MMBertConfig)
    assert isinstance(AutoModel.from_pretrained(folder), MMBertModel)
    model = AutoModelForPreTraining.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    assert isinstance(processor, MMBertProcessor) and isinstance(processor, ProcessorMixin)
    inputs = processor(text=["a red cat", "two dogs on the street"], images=[IMAGE, IMAGE], return_tensors="pt")
    assert [*inputs] == processor.model_input_names
    assert model(**inputs).itm_logits.shape == (2, 2)
    assert "16 tokens" in repr(processor)


def test_processor_pads_as_requested() -> None:
    processor = tiny_processor()
    texts = ["a red cat", "two"]  # 5 and 3 tokens with [CLS] and [SEP]
    longest = processor(text=texts, padding=True)
    assert longest["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    full = processor(text=texts, padding="max_length", max_length=7)
    assert full["attention_mask"].sum(dim=1).tolist() == [5, 3] and full["input_ids"].shape == (2, 7)
    assert full["input_ids"][:, 5:].eq(processor.pad_token_id).all()
    assert processor(text=texts, max_length=4)["input_ids"].shape == (2, 4)
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"padding": False}, "texts of 3 to 5 tokens make no tensor"),
        ({"padding": "left"}, "padding='left'; allowed are True"),
        ({"max_length": 17}, "max_length=17; allowed are 2 to 16 tokens"),
        ({"max_length": 4, "truncation": False}, "a text has 5 tokens, more than 4"),
        ({"return_tensors": "np"}, "return_tensors='np'; only 'pt'"),
    )
    for options, message in wrong:
        with pytest.raises(UsageError, match=message):
            processor(text=texts, **options)


def test_image_processor_prepares_what_the_processor_does() -> None:
    processor = tiny_processor()
    expected = processor(images=IMAGE)["pixel_values"]
    assert torch.equal(processor.image_processor(IMAGE)["pixel_values"], expected)
    assert torch.equal(processor(IMAGE, "a cat")["pixel_values"], expected)  # images come first in transformers


def test_hub_names_are_fetched_without_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []

    def snapshot(name: str, *, allow_patterns: list[str], **options: Any) -> str:
        fetched.append((name, options))
        assert not any(pattern.endswith((".py", ".bin", "*")) for pattern in allow_patterns)
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    assert isinstance(mmbert.load("owner/model").model, MMBertForPreTraining)
    MMBertProcessor.from_pretrained("owner/model", revision="v1", _from_auto=True)
    assert fetched == [("owner/model", {}), ("owner/model", {"revision": "v1"})]

    def unreachable(*args: Any, **options: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr(hub, "snapshot_download", unreachable)
    with pytest.raises(
        UsageError, match="'owner/model' is neither a folder nor a model that the hub gives: no network"
    ):
        mmbert.load("owner/model")


def test_push_to_hub_uploads_a_folder_that_loads(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The endpoint is mocked: what would be uploaded is copied."""
    uploaded: list[str] = []

    class Endpoint:
        def create_repo(self, repo_id: str, **options: Any) -> Any:
            return SimpleNamespace(repo_id=repo_id)

        def create_commit(self, *, operations: Any, **options: Any) -> None:
            for operation in operations:
                uploaded.append(operation.path_in_repo)
                (tmp_path / operation.path_in_repo).write_bytes(Path(operation.path_or_fileobj).read_bytes())

    monkeypatch.setattr("transformers.utils.hub.hf_api", Endpoint)
    card = SimpleNamespace(save=lambda path: Path(path).write_text("# model"))
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *args, **options: card)
    loaded = mmbert.load(folder)
    model: Any = loaded.model
    model.push_to_hub("owner/model")
    loaded.processor.push_to_hub("owner/model")
    assert {"config.json", "model.safetensors", "image_settings.json", "tokenizer.json"} <= {*uploaded}
    again = mmbert.load(tmp_path)
    assert again.match(IMAGE, "a red cat") == loaded.match(IMAGE, "a red cat")


def test_pipelines_return_what_the_methods_of_a_loaded_model_do(folder: Path) -> None:
    loaded = mmbert.load(folder)
    matching = pipeline("image-text-matching", loaded)(IMAGE, ["a cat", "a dog"])
    assert [row["score"] for row in matching] == loaded.match(IMAGE, ["a cat", "a dog"]).scores
    words = pipeline("fill-mask", loaded)("a [MASK] cat", image=IMAGE, top_k=2)
    assert [row["token_str"] for row in words] == [w.token for w in loaded.fill_mask(IMAGE, "a [MASK] cat", 2)[0]]
    assert len(pipeline("fill-mask", loaded)("[MASK] and [MASK]")) == 2
    features = pipeline("feature-extraction", loaded)(text=["a cat", "a dog"])
    assert [*features] == ["text_embeds"] and features["text_embeds"].shape == (2, 16)
    classes = pipeline("zero-shot-image-classification", folder, device="cpu")(IMAGE, candidate_labels=["cat", "dog"])
    assert sum(row["score"] for row in classes) == pytest.approx(1)
    named = pipeline("zero-shot-image-classification", loaded)(IMAGE, candidate_labels="cat, dog,")
    assert {row["label"] for row in named} == {"cat", "dog"}
    texts = [f"This is a photo of {row['label']}." for row in classes]
    logits = torch.tensor(loaded.match(IMAGE, texts).scores, dtype=torch.float64).logit()
    assert [row["score"] for row in classes] == pytest.approx(logits.softmax(0).tolist())


def test_question_answering_pipeline_and_unknown_tasks() -> None:
    model = built(MMBertForQuestionAnswering, labels=["no", "yes"])
    loaded = LoadedModel(model, tiny_processor())
    rows = pipeline("visual-question-answering", loaded)(image=IMAGE, question="a cat")
    assert [(row["answer"], row["score"]) for row in rows] == [*map(tuple, loaded.answer(IMAGE, "a cat", 2))]
    with pytest.raises(UsageError, match=r"task='fill-masks'; allowed are .*Did you mean 'fill-mask'"):
        pipeline("fill-masks", loaded)
    assert len(TASKS) == 5


def test_folder_in_the_home_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert hub.model_folder("~/model") == tmp_path / "model"


@pytest.mark.skipif(not FULL, reason="a fresh process imports transformers and timm: 5 s; full tier")
def test_auto_classes_find_a_folder_where_nothing_imported_mmbert(folder: Path, tmp_path: Path) -> None:
    """In a fresh process: transformers runs the module in the folder, whose classes are those of the package."""
    program = f"""
import sys
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining, AutoProcessor

assert "mmbert" not in sys.modules
try:
    AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code" in str(error), error
else:
    raise AssertionError("the module in the folder was run")
model = AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True)
processor = AutoProcessor.from_pretrained({str(folder)!r}, trust_remote_code=True)
import mmbert

assert type(model) is mmbert.MMBertModel and type(processor) is mmbert.MMBertProcessor
loaded = AutoModelForPreTraining.from_pretrained({str(folder)!r}, trust_remote_code=True)
assert type(loaded) is mmbert.MMBertForPreTraining
loaded.save_pretrained({str(tmp_path / "again")!r})
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = {"config.json", "mmbert_auto.py", "model.safetensors"}
    assert {path.name for path in (tmp_path / "again").iterdir()} == files, "no source of mmbert is copied"
    assert (tmp_path / "again/config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_module_in_a_folder_names_existing_classes(folder: Path) -> None:
    names = runpy.run_path(str(folder / "mmbert_auto.py"))
    assert [names[name.removeprefix("mmbert_auto.")] for name in AUTO_MAP.values()] == [
        getattr(mmbert, name) for name in CLASSES.values()
    ]


def test_torch_hub_loads_a_folder(folder: Path) -> None:
    root = Path(__file__).parents[2]
    loaded: Any = torch.hub.load(str(root), "mmbert", str(folder), source="local")
    assert isinstance(loaded, LoadedModel) and len(loaded.match(IMAGE, ["a red cat", "two dogs"]).scores) == 2
