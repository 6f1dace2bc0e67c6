"""`mmbert import`: the table, and one sentence with nothing written for what can't be imported."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.test_import_vilt import theirs
from safetensors.torch import load_file, save_file
from tiny import tiny_config, tiny_tokenizer
from transformers import AutoModelForVisualQuestionAnswering, BertConfig, BertModel, ViltForQuestionAnswering

import mmbert
from mmbert.cli.main import main
from mmbert.inference.importing import import_checkpoint
from mmbert.model.modeling import MMBertForPreTraining


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A ViLT for VQA with its tokenizer."""
    theirs(ViltForQuestionAnswering, num_labels=3).save_pretrained(tmp_path / "vilt")
    tiny_tokenizer().save_pretrained(tmp_path / "vilt")
    return tmp_path / "vilt"


def change(source: Path, edit: Any) -> None:
    """Change the tensors of a checkpoint."""
    state = load_file(source / "model.safetensors")
    edit(state)
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})


def fails(source: str | Path, out: Path, capsys: pytest.CaptureFixture[str], *options: str, code: int = 2) -> str:
    """What is said; nothing is written."""
    with pytest.raises(SystemExit) as stopped:
        main(["import", str(source), str(out), *options])
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert stopped.value.code == code and "Traceback" not in captured.err, captured.err
    assert not [*out.parent.glob("*own*")], "nothing is written"
    return lines[-1]


def test_table_counts_every_tensor(source: Path, tmp_path: Path) -> None:
    change(source, lambda state: state.update({"vilt.embeddings.text_embeddings.position_ids": torch.arange(16)}))
    account = import_checkpoint(str(source), tmp_path / "own")
    own = load_file(tmp_path / "own/model.safetensors")
    assert sorted([*account.matched, *account.new]) == sorted(own)
    assert [*account.unused] == ["vilt.embeddings.text_embeddings.position_ids"]
    assert account.table().splitlines()[-2:] == [
        "unused, constant: vilt.embeddings",
        "new, used only where a text or an image is absent: mmbert.fusion.absent_text",
    ]
    record = json.loads((tmp_path / "own/import.json").read_text())
    assert record["source"] == str(source) and record["matched"] == account.matched


def test_transformers_auto_classes_read_the_folder(source: Path, tmp_path: Path) -> None:
    import_checkpoint(str(source), tmp_path / "own")
    mmbert.register()
    model = AutoModelForVisualQuestionAnswering.from_pretrained(tmp_path / "own")
    assert model.config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}


def test_labels_of_a_checkpoint_that_only_numbers_them(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "labels.txt").write_text("yes\nno\n")
    said = fails(source, tmp_path / "own", capsys, "--labels", str(tmp_path / "labels.txt"))
    assert "has a head of 3 labels; 2 were given" in said
    (tmp_path / "labels.txt").write_text("yes\nno\nred\n")
    main(["import", str(source), str(tmp_path / "own"), "--labels", str(tmp_path / "labels.txt")])
    assert json.loads((tmp_path / "own/config.json").read_text())["labels"] == ["yes", "no", "red"]


def test_partial_loads_need_consent(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def edit(state: dict[str, torch.Tensor]) -> None:
        del state["vilt.pooler.dense.bias"]
        state["vilt.surprise"] = torch.zeros(1)

    change(source, edit)
    said = fails(source, tmp_path / "own", capsys)
    assert "it lacks 'mmbert.fusion.pooler.dense.bias'; there is no place for 'vilt.surprise'" in said
    main(["import", str(source), str(tmp_path / "own"), "--partial"])
    out = capsys.readouterr().out
    assert "missing: mmbert.fusion.pooler.dense.bias" in out and "no place for it: vilt.surprise" in out


def test_other_models_are_refused(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bert = BertConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    BertModel(bert).save_pretrained(tmp_path / "bert")
    assert "is a bert; mmbert imports visual_bert, albef" in fails(tmp_path / "bert", tmp_path / "own", capsys)
    MMBertForPreTraining(tiny_config()).save_pretrained(tmp_path / "mm")
    assert "is a model of mmbert already" in fails(tmp_path / "mm", tmp_path / "own", capsys)


def test_names_that_match_nothing_are_refused(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"encoder.x": torch.zeros(2)}, tmp_path / "some.pth")
    said = fails(tmp_path / "some.pth", tmp_path / "own", capsys)
    assert "the names of its 1 tensors, such as 'encoder.x', match no model" in said
    save_file({"encoder.x": torch.zeros(2)}, source / "model.safetensors")
    assert "lacks 'embeddings.text_embeddings.word_embeddings.weight'" in fails(source, tmp_path / "own", capsys)


def test_code_in_a_pickle_is_not_executed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "executed",)

    (tmp_path / "some.pth").write_bytes(pickle.dumps({"state_dict": Hostile()}))
    assert "was not executed" in fails(tmp_path / "some.pth", tmp_path / "own", capsys)
    torch.save({"state_dict": {"x": torch.zeros(1)}, "args": Hostile()}, tmp_path / "other.pth")
    assert "was not executed" in fails(tmp_path / "other.pth", tmp_path / "own", capsys)
    assert not (tmp_path / "executed").exists()


def test_broken_and_missing_files(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 cut")
    assert "no readable checkpoint" in fails(tmp_path / "cut.pth", tmp_path / "own", capsys, code=1)
    assert "is no folder, no file, and no name" in fails(tmp_path / "nowhere", tmp_path / "own", capsys)
    (tmp_path / "empty").mkdir()
    assert "expected model.safetensors or one file" in fails(tmp_path / "empty", tmp_path / "own", capsys)
    (source / "tokenizer.json").unlink()
    assert "has no tokenizer; name one by --tokenizer" in fails(source, tmp_path / "own", capsys)
    config = source / "config.json"
    config.write_text(config.read_text().replace('"gelu"', '"relu"'))
    assert "config.json has hidden_act='relu'; mmbert has 'gelu' only" in fails(source, tmp_path / "own", capsys)
    config.write_text("{")
    assert "no readable JSON object" in fails(source, tmp_path / "own", capsys, code=1)


def test_a_name_on_the_hub_without_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    said = fails("dandelin/vilt-b32-finetuned-vqa", tmp_path / "own", capsys)
    assert "is no folder, and the hub does not give it" in said


def test_an_existing_folder_is_not_overwritten(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "here").mkdir()
    assert "exists; give a new folder" in fails(source, tmp_path / "here", capsys)
