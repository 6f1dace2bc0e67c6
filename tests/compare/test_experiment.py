"""`mmbert.compare` from Python: options, errors as exceptions, and the result object."""

import importlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import mmbert
from mmbert.compare import experiment, runner
from mmbert.compare.experiment import ComparisonResult
from mmbert.compare.plan import Comparison, load_comparison
from mmbert.compare.rows import read_rows
from mmbert.compare.runner import ArmStoppedError
from mmbert.compare.specs import Settings, overridden_options
from mmbert.errors import DataError, UsageError

ROOT = Path(__file__).parents[2]
CONTENT: dict[str, Any] = {
    "strategies": ["early", "late"],
    "seeds": [0, 1],
    "pretrain": {"run": "pretrain/shapes_plain", "steps": 10},
    "primary": ["pretrain/itm_accuracy"],
}


def test_package_can_be_called_and_imported_from() -> None:
    assert callable(mmbert.compare) and mmbert.compare is importlib.import_module("mmbert.compare")
    with pytest.raises(UsageError, match="expected two or more strategies"):
        mmbert.compare({**CONTENT, "strategies": ["early"]})


def test_mapping_and_file_give_the_same_comparison(tmp_path: Path) -> None:
    (tmp_path / "comparison.yaml").write_text(yaml.safe_dump(CONTENT), encoding="utf-8")
    found = load_comparison(CONTENT, ["pretrain.steps=20"])
    assert found == load_comparison(str(tmp_path / "comparison.yaml"), ["pretrain.steps=20"])
    assert found.pretrain.steps == 20 and CONTENT["pretrain"]["steps"] == 10, "the mapping is not changed"


def test_arguments_become_settings_and_the_equivalent_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Comparison, Settings]] = []

    def run_arms(comparison: Comparison, settings: Settings) -> dict[str, Any]:
        seen.append((comparison, settings))
        return {
            "early-seed0": {"status": "done", "results": {"pretrain/itm_accuracy": 0.75}},
            "b": {"status": "failed"},
        }

    monkeypatch.setattr(experiment, "run_arms", run_arms)
    monkeypatch.setattr(experiment, "write_report_again", lambda out: out / "report.html")
    config = tmp_path / "my comparison.yaml"
    config.write_text(yaml.safe_dump(CONTENT), encoding="utf-8")
    found = experiment.run_comparison(config, out=tmp_path / "out", jobs=2, changes={"seeds": [3, 4], "name": "x"})
    comparison, settings = seen[0]
    assert comparison.seeds == [3, 4] and settings.out == found.folder == tmp_path / "out" and settings.jobs == 2
    command = f"mmbert compare -c '{config}' --out {tmp_path}/out --jobs 2 --set 'seeds=[3, 4]' --set 'name=\"x\"'"
    assert settings.command == command
    assert found.failed == ["b"] and found.report == tmp_path / "out/report.html"
    experiment.run_comparison(CONTENT, changes=["name=mine"], exploratory=True)
    assert seen[1][1].out == Path("runs/compare/mine") and seen[1][1].exploratory and seen[1][1].command == ""


def test_result_is_a_table_in_text_and_html() -> None:
    rows = {
        "early-seed0": {"status": "done", "results": {"pretrain/itm_accuracy": 0.75}},
        "<b>-seed0": {"status": "failed"},
        "late-seed0": {"status": "done", "results": {"pretrain/itm_accuracy": None}},  # not a number in training
    }
    found = ComparisonResult(Path("out"), load_comparison(CONTENT), rows, Path("out/report.html"))
    assert repr(found).splitlines() == [
        "ComparisonResult: out",
        "arm          status  pretrain itm accuracy",
        "early-seed0  done    0.750",
        "<b>-seed0    failed  –",
        "late-seed0   done    –",
    ]
    page = found._repr_html_()
    assert "<td>early-seed0</td><td>done</td><td>0.750</td>" in page and "<td>&lt;b&gt;-seed0</td>" in page
    assert 'href="out/report.html"' in page and "<b>" not in page


def test_report_only_keeps_the_command_that_trained_the_arms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(experiment, "write_report_again", lambda out: out / "report.html")
    out = tmp_path / "ucm"
    shutil.copytree("docs/study/ucm", out, ignore=shutil.ignore_patterns("plots", "items"))
    before = (out / "comparison.json").read_text(encoding="utf-8")
    found = experiment.run_comparison("compare/ucm", out=out, report_only=True)
    assert len(found.rows) == 9 and not found.failed
    assert sorted((out / "comparison.json").read_text(encoding="utf-8")) == sorted(before)
    (out / "comparison.json").write_text(before[: len(before) // 2])
    with pytest.raises(DataError, match=r"comparison\.json: not JSON; expected .* made again if removed"):
        experiment.run_comparison("compare/ucm", out=out, report_only=True)
    with pytest.raises(UsageError, match="has no rows"):
        experiment.run_comparison("compare/ucm", out=tmp_path, report_only=True)


def test_arm_that_is_stopped_by_a_signal_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys; sys.exit(143)"  # as an arm exits after SIGTERM
    monkeypatch.setattr(runner, "_start_arm", lambda spec: subprocess.Popen([sys.executable, "-c", code]))
    settings = Settings(tmp_path, 1, False, [], "")
    arms = runner._finished_rows([{"arm": "early-seed0"}], {}, settings, {"early-seed0": {"pretrain": 1.0}})
    monkeypatch.setattr(runner, "_progress", lambda spec, weights: 0.0)
    with pytest.raises(ArmStoppedError, match="early-seed0 was stopped by a signal") as error:
        next(arms)
    assert error.value.exit_code == 143


def test_options_of_a_run_that_the_comparison_replaces_are_named(tmp_path: Path) -> None:
    run = {
        "name": "mine",
        "seed_everything": 7,
        "threads": None,
        "data": {"train_fraction": 0.5, "eval_seed": 3, "batch_size": 8},
        "model": {"pretrained": "folder", "fusion": "late"},
        "trainer": {"max_epochs": 4},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
    stage = {"run": str(tmp_path / "run.yaml"), "steps": 10}
    found = overridden_options(
        load_comparison({**CONTENT, "pretrain": stage, "finetune": {"vqa": stage}, "primary": []})
    )
    replaced = {"seed_everything": 7, "data.train_fraction": 0.5, "data.eval_seed": 3, "trainer.max_epochs": 4}
    assert found == {"pretrain": replaced, "vqa": {**replaced, "model.pretrained": "folder"}}


def test_finished_comparison_needs_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data of the stored study is not in the repository, and no process is started."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    out = tmp_path / "shapes"
    shutil.copytree("docs/study/shapes", out, ignore=shutil.ignore_patterns("plots"))
    comparison = load_comparison("compare/shapes", ["foils.images=/gone"])
    rows = read_rows(out)
    for row in rows.values():
        row["config"]["foils"]["images"] = "/gone"
    runner.write_rows(out, rows.values())
    assert len(runner.run_arms(comparison, Settings(out, 1, False, [], ""))) == 27
