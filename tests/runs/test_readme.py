"""The README's commands and examples are run, or at least parsed, as they stand."""

import re
import shlex
from pathlib import Path

import pytest

from mmbert.cli import main
from mmbert.commands import _parser

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


@pytest.mark.parametrize("command", [c for c in COMMANDS if "train.py" in c])
def test_training_command_runs_on_tiny_data(
    command: str, tiny: list[str], tiny_tasks: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    arguments = shlex.split(command, comments=True)
    assert arguments[:2] == ["python", "train.py"]
    small = tiny_tasks["vqa"] if "finetune/vqa" in command else tiny
    start = ["--model.pretrained=null"] if "--model.pretrained" in command else []  # there is no such run here
    main([*arguments[2:], *small, *start, "--data.split_key=null", "--trainer.fast_dev_run=1"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", [c.split()[1] for c in COMMANDS if c.startswith("make ")])
def test_make_target_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", [c for c in COMMANDS if re.match("mmbert (ask|match|predict|score|data)", c)])
def test_small_command_is_parsed(command: str) -> None:
    options = vars(_parser().parse_args(shlex.split(command, comments=True)[1:]))
    assert callable(options["run"])


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)", README):
        assert link.startswith("http") or (ROOT / link).exists(), link
