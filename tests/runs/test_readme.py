"""The README's commands and Python examples run, or at least parse, as they stand."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import yaml

import mmbert
from mmbert.cli.main import COMMANDS as CLI_COMMANDS
from mmbert.cli.main import Parser, main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]


def test_readme_is_a_front_page_that_names_the_other_mmbert() -> None:
    assert len(README.splitlines()) <= 150
    assert "jhu-clsp" in README.split("\n\n")[1]


def test_examples_run_one_after_the_other(
    tiny: list[str], shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Quickstart model, notebook and Lightning trainer share variables, as in a Python session."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/shapes").symlink_to(shapes)
    main(["fit", "--config", "quickstart", *tiny, "--trainer.max_steps=1"])
    capsys.readouterr()
    inference, notebook, trainer = (block for block in PYTHON if "(Fusion)" not in block)
    session: dict[str, object] = {}
    exec(inference, session)  # noqa: S102
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("Matches(scores=[0.") and printed[0].endswith("kind='probability')")
    assert printed[1].count("Word(") == 2 and printed[2].startswith("torch.Size([2, ")
    outputs = [line.removeprefix("# ") for line in inference.splitlines() if line.startswith("# ")]
    for line, output in zip(printed, outputs, strict=True):
        assert re.sub(r"[\d.e-]+|'[^']*'", "", line) == re.sub(r"[\d.e-]+|'[^']*'", "", output)

    fit = mmbert.fit
    sections = options_of(tiny)
    monkeypatch.setattr(mmbert, "fit", lambda config, model, trainer, name: fit(
        config, model={**sections["model"], **model}, data=sections["data"], trainer={**sections["trainer"], **trainer},
        name=name,
    ))  # fmt: skip
    exec(notebook, session)  # noqa: S102
    run = session["run"]
    assert (
        isinstance(run, mmbert.RunResult) and run.folder == Path("runs/first") and run.metrics["run/fusion"] == "late"
    )

    small = trainer.replace('images="data', 'batch_size=16, max_text_length=40, images="data')
    exec(small, session)  # noqa: S102
    assert (tmp_path / "lightning_logs").is_dir() and not (tmp_path / "trace.csv").exists()


def options_of(arguments: list[str]) -> dict[str, dict[str, object]]:
    """Options of the command line as sections of `mmbert.fit`."""
    sections: dict[str, dict[str, object]] = {}
    for argument in arguments:
        key, _, value = argument.removeprefix("--").partition("=")
        section, name = key.split(".", 1)
        sections.setdefault(section, {})[name] = yaml.safe_load(value)
    return sections


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("mmbert fit ") and "--allow-import" not in c])
def test_training_command_runs_on_tiny_data(
    command: str, tiny: list[str], tiny_tasks: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    arguments = shlex.split(command, comments=True)
    small = tiny_tasks["vqa"] if "finetune/vqa" in command else tiny
    start = ["--model.pretrained=null"] if "--model.pretrained" in command else []  # there is no such run here
    main([*arguments[1:], *small, *start, "--trainer.fast_dev_run=1"])
    assert list(tmp_path.iterdir()) == []


def test_custom_fusion_trains_and_matches(
    tiny: list[str], shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The README's file and commands, and the class named in a YAML; nothing of mmbert is changed for it."""
    monkeypatch.setattr("mmbert.runtime.allowed_imports._ALLOWED", [])
    monkeypatch.chdir(tmp_path)
    code = next(block for block in PYTHON if "(Fusion)" in block)
    assert len(code.strip().splitlines()) <= 15
    (tmp_path / "my_fusion.py").write_text(code)
    train, match = (shlex.split(c) for c in COMMANDS if "--allow-import" in c)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/shapes").symlink_to(shapes)
    of_class = train.index("--model.fusion")
    (tmp_path / "own.yaml").write_text(f"model: {{fusion: {train[of_class + 1]}}}\n")
    for arguments in (train, [*train[:of_class], "--config", "own.yaml", *train[of_class + 2 :], "--name", "yaml"]):
        main([*arguments[1:], *tiny, "--trainer.max_steps=3"])
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


@pytest.mark.parametrize("command", [c for c in COMMANDS if re.match("mmbert (?!fit )", c)])
def test_command_parses(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmbert.runtime.allowed_imports._ALLOWED", [])
    name, *arguments = shlex.split(command, comments=True)[1:]
    assert name in CLI_COMMANDS
    parser = Parser(prog=f"mmbert {name}")
    importlib.import_module(f"mmbert.cli.commands.{name}").add_options(parser)
    assert callable(vars(parser.parse_args(arguments))["run"])
