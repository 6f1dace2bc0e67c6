"""The README's commands and examples are run, or at least parsed, as they stand."""

import re
import shlex
from pathlib import Path

import pytest

import mmbert
from mmbert.cli.commands import _parser
from mmbert.cli.main import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]


def test_readme_says_in_line_two_that_it_is_the_other_mmbert() -> None:
    lines = [line for line in README.splitlines() if line]
    assert "jhu-clsp" in lines[1]


def test_python_example_asks_the_quickstart_model(
    tiny: list[str], shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/shapes").symlink_to(shapes)
    main(["fit", "--config", str(ROOT / "configs/quickstart.yaml"), *tiny, "--trainer.max_steps=1"])
    capsys.readouterr()
    exec(PYTHON[0], {})  # noqa: S102
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("Matches(scores=[0.") and printed[0].endswith("kind='probability')")
    assert printed[1].count("Word(") == 2 and printed[2].startswith("torch.Size([1, ")


def test_python_example_builds_every_strategy(capsys: pytest.CaptureFixture[str]) -> None:
    exec(PYTHON[1], {})  # noqa: S102
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split()[0] for line in lines] == ["early", "late", "hybrid"]
    assert all("(1, 5, 384) (1, 197, 384)" in line for line in lines)


@pytest.mark.parametrize("command", [c for c in COMMANDS if "train.py" in c and "--allow-import" not in c])
def test_training_command_runs_on_tiny_data(
    command: str, tiny: list[str], tiny_tasks: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    arguments = shlex.split(command, comments=True)
    assert arguments[:2] == ["python", "train.py"]
    small = tiny_tasks["vqa"] if "finetune/vqa" in command else tiny
    start = ["--model.pretrained=null"] if "--model.pretrained" in command else []  # there is no such run here
    main([*arguments[2:], *small, *start, "--trainer.fast_dev_run=1"])
    assert list(tmp_path.iterdir()) == []


def test_fusion_of_ones_own_trains_and_matches(
    tiny: list[str], shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The README's file and commands, and the class named in a YAML; nothing of mmbert is changed for it."""
    monkeypatch.setattr("mmbert.runtime.allowed_imports._ALLOWED", [])
    monkeypatch.chdir(tmp_path)
    code = next(block for block in PYTHON if "(Fusion)" in block)
    assert len(code.strip().splitlines()) <= 15
    (tmp_path / "my_fusion.py").write_text(code)
    train, match = (shlex.split(c) for c in COMMANDS if "--allow-import" in c)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/shapes").symlink_to(shapes)
    of_class = train.index("--model.fusion")
    (tmp_path / "own.yaml").write_text(f"model: {{fusion: {train[of_class + 1]}}}\n")
    for arguments in (train, [*train[:of_class], "--config", "own.yaml", *train[of_class + 2 :], "--name", "yaml"]):
        main([*arguments[2:], *tiny, "--trainer.max_steps=3"])
    curves = [(tmp_path / "runs" / name / "trace.csv").read_text() for name in ("gated", "yaml")]
    assert curves[0] == curves[1] and curves[0].count("\n") == 4

    capsys.readouterr()
    main(match[1:])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "probability" and printed[1].endswith("a red circle")

    monkeypatch.setattr("mmbert.runtime.allowed_imports._ALLOWED", [])
    with pytest.raises(ValueError, match="--allow-import my_fusion"):
        mmbert.load("runs/gated/model")
    loaded = mmbert.load("runs/gated/model", allow_import=["my_fusion"])
    assert type(loaded.core.fusion).__module__ == "my_fusion" and loaded.core.config.fusion == "my_fusion.GatedFusion"
    (score,) = loaded.match("data/shapes/images/test/000002.png", "a red circle").scores
    assert f"{score:.4f}" == printed[1].split()[0]
    again = tmp_path / "again"
    loaded.model.save_pretrained(again)
    loaded.processor.save_pretrained(again)
    assert mmbert.load(again).match("data/shapes/images/test/000002.png", "a red circle").scores == [score]


@pytest.mark.parametrize("target", [c.split()[1] for c in COMMANDS if c.startswith("make ")])
def test_make_target_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


SMALL = re.compile(r"mmbert (ask|compare|match|predict|score|data)")


@pytest.mark.parametrize("command", [c for c in COMMANDS if SMALL.match(c)])
def test_small_command_is_parsed(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmbert.runtime.allowed_imports._ALLOWED", [])
    options = vars(_parser().parse_args(shlex.split(command, comments=True)[1:]))
    assert callable(options["run"])


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)", README):
        assert link.startswith("http") or (ROOT / link).exists(), link
