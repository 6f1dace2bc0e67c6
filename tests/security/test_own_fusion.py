"""A custom fusion is imported only where the user allowed its module."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import tiny_config, tiny_processor

import mmbert
from mmbert.cli.main import main
from mmbert.errors import UsageError
from mmbert.model.fusion import build_fusion
from mmbert.model.modeling import MMBertForPreTraining
from mmbert.runtime import allowed_imports

ROOT = Path(__file__).parents[2]
MODULE = """from pathlib import Path
import torch
from mmbert import Fused, Fusion
Path(__file__).with_name("IMPORTED").touch()

class Own(Fusion):
    def __init__(self, config):
        super().__init__(config)
        self.absent = torch.nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, text, image):
        return Fused(text, image, text.with_fallback(self.absent).first + image.with_fallback(self.absent).first)

class NoFusion(torch.nn.Module):
    pass

def function(config):
    raise SystemError("called")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the Python path with a module that leaves the file IMPORTED; nothing is allowed yet."""
    (tmp_path / "stranger_fusion.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(allowed_imports, "_ALLOWED", [])
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("stranger_fusion", None)


@pytest.fixture
def saved(folder: Path) -> Path:
    """A model whose config.json names the module."""
    path = folder / "model"
    MMBertForPreTraining(tiny_config(fusion="late")).save_pretrained(path)
    tiny_processor().save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "fusion": "stranger_fusion.Own"}))
    return path


def error_message(work: object, *arguments: object, **named: object) -> str:
    with pytest.raises(UsageError) as error:
        work(*arguments, **named)  # type: ignore
    return str(error.value)


def test_saved_model_that_names_a_class_imports_nothing(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for load in (mmbert.load, MMBertForPreTraining.from_pretrained, mmbert.MMBertModel.from_pretrained):
        message = error_message(load, saved)
        assert "fusion='stranger_fusion.Own' is a class outside of mmbert" in message
        assert "--allow-import stranger_fusion" in message and "allow_import=['stranger_fusion']" in message
    error_message(mmbert.load, saved, allow_import=["another"])
    commands = (
        ["match", str(saved), "x.png", "a"], ["ask", str(saved), "x.png", "a"],
        ["evaluate", "foils", str(saved), "--images", ".", "--foils", "f.json"],
        ["evaluate", "retrieval", str(saved), "--images", ".", "--annotations", "a.json", "--format", "coco"],
        ["predict", "vqa", str(saved), "--questions", "q", "--images", ".", "--image_names", "{}", "--out", "o"],
    )  # fmt: skip
    for command in commands:
        with pytest.raises(SystemExit) as stopped:
            main(command)
        assert stopped.value.code == 2
        assert "--allow-import stranger_fusion" in capsys.readouterr().err
    assert not (saved.parent / "IMPORTED").exists() and "stranger_fusion" not in sys.modules


def test_configuration_that_names_a_class_imports_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a file, with the option in the file too, and as a model to start from."""
    (folder / "c.yaml").write_text("model: {fusion: stranger_fusion.Own}\n")
    (folder / "d.yaml").write_text("allow-import: stranger_fusion\nmodel: {fusion: stranger_fusion.Own}\n")
    quickstart = [
        "fit",
        "--config",
        str(ROOT / "configs/pretrain/shapes_plain.yaml"),
        f"--data.tokenizer={folder}/tokenizer",
    ]
    tiny_processor().tokenizer.save_pretrained(folder / "tokenizer")  # pyright: ignore
    for arguments, message in (
        (["--config", "c.yaml"], "--allow-import stranger_fusion on the command line"),
        (["--config", "d.yaml"], "allow-import"),
        (["--model.fusion=stranger_fusion.Own"], "--allow-import stranger_fusion on the command line"),
        (["--model.fusion=stranger_fusion.Own", "--allow-import", "another"], "--allow-import stranger_fusion"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*quickstart, *arguments])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    assert not (folder / "IMPORTED").exists() and "stranger_fusion" not in sys.modules


def test_allowed_module_is_imported(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for allowed in (["stranger_fusion"], "stranger_fusion"):
        monkeypatch.setattr(allowed_imports, "_ALLOWED", [])
        with pytest.raises(ValueError, match=r"unexpected keys|missing keys"):  # its weights are those of late
            mmbert.load(saved, allow_import=allowed)
        assert (saved.parent / "IMPORTED").exists()
    assert type(build_fusion(tiny_config(fusion="stranger_fusion.Own"))).__name__ == "Own"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stranger_fusion.Onw", "stranger_fusion has no 'Onw'; expected a subclass of mmbert.Fusion, of which "
                                "stranger_fusion has Own. Did you mean 'Own'?"),
        ("stranger_fusion.NoFusion", "it is <class 'stranger_fusion.NoFusion'>; expected a subclass of mmbert.Fusion"),
        ("stranger_fusion.function", "it is <function function"),
        ("stranger_fusion.Fusion", "it is <class 'mmbert.model.fusion.base.Fusion'>; expected a subclass"),
        ("stranger_fusion.torch", "it is <module 'torch'"),
        ("stranger_fusion.torch.load", "there is no module 'stranger_fusion.torch'"),
        ("nowhere.Own", "there is no module 'nowhere' on the Python path"),
        ("nowhere.inner.Own", "there is no module 'nowhere' on the Python path"),
        ("stranger_fusio.Own", "is a class outside of mmbert"),  # allowed is stranger_fusion, and not its beginning
        ("stranger_fusion_2.Own", "is a class outside of mmbert"),
        ("os.system", "is a class outside of mmbert"),
        ("torch.nn.Linear", "is a class outside of mmbert"),
        ("mmbert.model.fusion.late.LateFusion", "is a class outside of mmbert"),
        ("../x.Own", "is no fusion strategy"),
        (".Own", "is no fusion strategy"),
        ("stranger_fusion.", "is no fusion strategy"),
    ],
)  # fmt: skip
def test_class_that_is_not_a_fusion_is_an_error(name: str, message: str, folder: Path) -> None:
    mmbert.allow_import("stranger_fusion", "nowhere")
    assert message in error_message(lambda: build_fusion(tiny_config(fusion=name)))


def test_error_inside_the_module_is_not_hidden(folder: Path) -> None:
    (folder / "broken_fusion.py").write_text("import nothing_of_that_name\n")
    mmbert.allow_import("broken_fusion")
    with pytest.raises(ModuleNotFoundError, match="nothing_of_that_name"):
        build_fusion(tiny_config(fusion="broken_fusion.Own"))


@pytest.mark.parametrize("module", ["", "a b", "../x", "jsonargparse"])
def test_only_modules_can_be_allowed(module: str, folder: Path) -> None:
    assert "expected a module" in error_message(mmbert.allow_import, module)
    assert allowed_imports.allowed_imports() == []


def test_small_command_takes_the_option_and_looks_where_the_user_stands(saved: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "mmbert", "match", "model", "x.png", "a", "--allow-import", "stranger_fusion"]
    done = subprocess.run(command, cwd=saved.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "keys, first" in done.stderr, done.stderr
    assert (saved.parent / "IMPORTED").exists()
