"""Towers of a comparison: plan, identity of rows, order of the arms, failures, and the report, without training."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from compare.made import comparison as comparison_json
from compare.made import made
from tiny import tiny_config

from mmbert.compare import runner
from mmbert.compare.folder import check_same_comparison, import_rows, previous_primary, valid_rows
from mmbert.compare.plan import Comparison, comparison_from, list_arms, load_comparison
from mmbert.compare.report.document import build_document
from mmbert.compare.report.outcomes import Outcomes
from mmbert.compare.report_inputs import write_report_inputs
from mmbert.compare.rows import Row, write_rows
from mmbert.compare.specs import Settings, arm_spec, budget_inputs, overridden_options
from mmbert.compare.towers import check_start, restore_towers, tower_comparison, towers_in_use
from mmbert.errors import DataError, UsageError

TOWERS = {"run": "pretrain/shapes_plain", "steps": 7, "options": {"model.objectives": {"ngrams": 1.0}}}
CONTENT: dict[str, Any] = {
    "strategies": ["early", "late"],
    "seeds": [0, 1],
    "pretrain": {"run": "pretrain/shapes_plain", "steps": 10},
    "towers": TOWERS,
}


def plan(**changes: Any) -> Comparison:
    return load_comparison({**CONTENT, **changes})


def specs(found: Comparison, out: Path) -> dict[str, dict[str, Any]]:
    settings = Settings(out, 1, False, [], "")

    def steps(strategy: str) -> dict[str, Any]:
        length = found.towers.steps if strategy == "towers" else found.pretrain.steps
        return {"options": {}, "stages": {"pretrain": length}, "budget": {"steps": length}}

    return {arm.name: arm_spec(found, arm, steps(arm.strategy), settings) for arm in list_arms(found)}


def done(spec: Mapping[str, Any]) -> Row:
    return {**{key: spec[key] for key in ("arm", "strategy", "config")}, "status": "done", "cost": {}}


# --- plan ----------------------------------------------------------------------------------------------------------


def test_towers_come_before_the_strategies_of_their_seed_and_fraction() -> None:
    found = plan(strategies={"early": {}, "late": {"seeds": [5]}}, fractions=[0.5, 1.0])
    assert [arm.name for arm in list_arms(found)] == [
        *("towers-seed0", "early-seed0", "towers-seed5", "late-seed5"),
        *("towers-seed0-50pct", "early-seed0-50pct", "towers-seed5-50pct", "late-seed5-50pct"),
        *("towers-seed1", "early-seed1", "towers-seed1-50pct", "early-seed1-50pct"),
    ]
    assert comparison_from(json.loads(json.dumps(runner.asdict(found)))) == found
    older = {key: value for key, value in runner.asdict(found).items() if key != "towers"}
    assert not comparison_from(older).has_towers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"towers": {**TOWERS, "stepz": 3}}, "there is no option towers.stepz. Did you mean 'towers.steps'"),
        ({"towers": {"run": "pretrain/shapes_plain"}}, "towers.steps=0: expected the optimizer steps of the towers, 1"),
        ({"towers": {**TOWERS, "steps": -3}}, "towers.steps=-3: expected the optimizer steps of the towers, 1 or more"),
        ({"towers": {**TOWERS, "steps": "many"}}, "towers.steps: expected a int. Got value: many"),
        ({"towers": {"steps": 3}}, "towers.run is missing"),
        ({"towers": {**TOWERS, "steps": None}}, "towers.steps=0: expected"),
        (
            {"towers": "pretrain/shapes"},
            "towers: expected a mapping with run, steps and options. Got: 'pretrain",
        ),
        ({"towers": [3]}, "towers: expected a mapping with run, steps and options. Got: "),
        (
            {"finetune": {"vqa": {"run": "x.yaml", "steps": None}}},
            "finetune.vqa.steps=None: expected",
        ),
        ({"towers": {**TOWERS, "options": {"seed_everything": 3}}}, "towers.options.seed_everything.*use seeds"),
        ({"towers": {**TOWERS, "options": {"trainer.max_steps": 3}}}, "towers.options.trainer.max_steps.*use steps"),
        (
            {"pretrain": {**CONTENT["pretrain"], "options": {"model.pretrained": "x"}}},
            "pretrain.options.model.pretrained: set by the comparison: remove it",
        ),
        (
            {"strategies": {"early": {}, "late": {"model.pretrained_parts": "all"}}},
            "model.pretrained_parts: set by",
        ),
        ({"strategies": ["early", "towers"]}, "the name 'towers' is reserved"),
        ({"finetune": {"towers": {"run": "x.yaml", "steps": 1}}}, "finetune.towers: this name is reserved"),
    ],
)
def test_error_names_the_option(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        plan(**changes)
    assert "\n" not in str(error.value)


def test_fine_tuning_run_is_an_error_before_anything_is_written(tmp_path: Path) -> None:
    found = plan(towers={"run": "finetune/vqa_shapes", "steps": 3})
    with pytest.raises(UsageError, match=r"towers\.run=finetune/vqa_shapes fine-tunes for the task vqa: expected a"):
        runner.run_arms(found, Settings(tmp_path / "out", 1, False, [], ""))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (
            {"text_layers": 0},
            "'early' can't start from them, as its model.text_layers is 0 and theirs 1; set towers",
        ),
        ({"hidden_size": 16}, "model.hidden_size is 16 and theirs 32"),
        ({"image_layers": 2}, "model.image_layers is 2 and theirs 1"),
        ({"fusion": "early", "fusion_layers": 3, "intermediate_size": 8, "early_pool": "last"}, None),
        ({"objectives": {"itm": 1.0}, "hidden_dropout_prob": 0.5}, None),
    ],
)
def test_encoders_of_the_towers_must_be_those_of_the_strategy(own: dict[str, Any], message: str | None) -> None:
    def parts(words: list[str], **changes: Any) -> Any:
        tokenizer = SimpleNamespace(get_vocab=lambda: {word: i for i, word in enumerate(words)})
        return SimpleNamespace(
            model=SimpleNamespace(config=tiny_config(text_layers=1, image_layers=1, **changes)),
            processor=SimpleNamespace(tokenizer=tokenizer),
        )

    base = {"hidden_size": 32, "fusion": "late", "objectives": {"ngrams": 1.0}, "fusion_layers": 1}
    towers = parts(["a", "b"], **base)
    tiny = tiny_config(**{"text_layers": 1, "image_layers": 1, **base, **own})
    arm = SimpleNamespace(model=SimpleNamespace(config=tiny), processor=towers.processor)
    if message is None:
        check_start("early", arm, towers)  # pyright: ignore[reportArgumentType]
        arm.processor = parts(["b", "a"]).processor
        message = "'early' can't start from them, as they have another data.tokenizer"
    with pytest.raises(UsageError, match=message):
        check_start("early", arm, towers)  # pyright: ignore[reportArgumentType]


# --- specifications and rows ---------------------------------------------------------------------------------------


def test_arms_start_from_the_towers_of_their_seed_and_name_their_settings(tmp_path: Path) -> None:
    found = specs(plan(), tmp_path)
    towers, arm = found["towers-seed1"], found["early-seed1"]
    assert towers["stages"].keys() == {"pretrain"} and "towers" not in towers
    options = towers["stages"]["pretrain"]["options"]
    assert (options["seed_everything"], options["model.fusion"], options["model.objectives"]) == (
        1,
        "hybrid",
        {"ngrams": 1.0},
    )
    start = arm["stages"]["pretrain"]["options"]
    assert start["model.pretrained"] == f"{tmp_path}/arms/towers-seed1/pretrain/model"
    assert (start["model.pretrained_parts"], arm["towers"]) == ("encoders", "towers-seed1")
    config = arm["config"]
    assert config["towers.model.objectives.ngrams"] == 1.0 and config["towers.seed_everything"] == 1
    assert config["towers.trainer.max_steps"] == towers["config"]["pretrain.trainer.max_steps"] == 7
    assert not any(str(tmp_path) in str(value) for value in config.values()), "rows do not depend on the folder"


def test_comparison_without_towers_keeps_the_format_of_its_rows(tmp_path: Path) -> None:
    plain = load_comparison({key: value for key, value in CONTENT.items() if key != "towers"})
    for spec in specs(plain, tmp_path).values():
        assert "towers" not in json.dumps(spec).replace(str(tmp_path), "")
        assert not any("pretrained" in key for key in spec["config"])
    assert not any("towers" in key for key in budget_inputs(plain))
    write_report_inputs(plain, Settings(tmp_path, 1, False, [], ""), {})
    assert "towers" not in (tmp_path / "comparison.json").read_text()


@pytest.mark.parametrize(
    "other",
    [
        {**TOWERS, "steps": 8},
        {**TOWERS, "options": {"model.objectives": {"itc": 1.0}}},
        {**TOWERS, "options": {**TOWERS["options"], "model.pretrained": "another"}},
        {},
    ],
)
def test_rows_of_other_towers_are_told_apart(other: dict[str, Any], tmp_path: Path) -> None:
    before, now = specs(plan(seeds=[0]), tmp_path), specs(plan(seeds=[0], towers=other), tmp_path)
    rows = {name: done(spec) for name, spec in before.items()}
    for name in rows:
        (tmp_path / f"items/{name}.npz").parent.mkdir(exist_ok=True)
        (tmp_path / f"items/{name}.npz").touch()
    write_rows(tmp_path, rows.values())
    wanted = [{**spec, "items": str(tmp_path / f"copied/{name}.npz")} for name, spec in now.items()]
    assert import_rows(tmp_path, wanted) == {}
    same = [{**spec, "items": str(tmp_path / f"copied/{name}.npz")} for name, spec in before.items()]
    assert import_rows(tmp_path, same).keys() == before.keys()
    budgets = {"budget_inputs": budget_inputs(plan()), "strategies": {}}
    (tmp_path / "budgets.json").write_text(json.dumps(budgets))
    with pytest.raises(DataError, match=r"rows of another comparison \(towers\."):
        check_same_comparison(plan(towers=other), Settings(tmp_path, 1, False, [], ""), rows)


def test_options_of_the_runs_that_the_comparison_replaces_are_named(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model": {"pretrained": "folder"}, "seed_everything": 7}))
    stage = {"run": str(tmp_path / "run.yaml"), "steps": 10}
    found = overridden_options(plan(towers=stage, pretrain=stage))
    assert found == {"towers": {"seed_everything": 7}, "pretrain": {"seed_everything": 7, "model.pretrained": "folder"}}
    kept = specs(plan(towers=stage), tmp_path)["early-seed0"]["config"]
    assert kept["towers.model.pretrained"] == "folder", "towers may start from a model themselves"


def test_towers_alone_are_one_strategy_without_evaluations() -> None:
    foils = {"files": ["a.json"], "images": "b"}
    found = tower_comparison(plan(retrieval={"images": 5}, foils=foils, match="flops", primary=["foils/overall"]))
    assert found.names == ["towers"] and found.match == "steps" and not found.has_towers
    assert not (found.retrieval.images or found.foils.files or found.finetune) and found.pretrain.steps == 7


# --- the runner ----------------------------------------------------------------------------------------------------


class Finished:
    """A process that has ended."""

    returncode = 0

    def poll(self) -> int:
        return self.returncode


def run_rows(
    found: dict[str, dict[str, Any]], rows: dict[str, Row], jobs: int, failing: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Row], list[tuple[str, list[str]]]]:
    """Rows that the runner yields, and the arms that it starts, each with those that have finished before."""
    started: list[tuple[str, list[str]]] = []
    finished: list[str] = []

    def start(spec: Mapping[str, Any]) -> Finished:
        started.append((spec["arm"], [*finished]))
        return Finished()

    def read(spec: Mapping[str, Any], code: int) -> Row:
        finished.append(spec["arm"])
        if spec["arm"] == failing:
            return runner._failed_row(spec, stage="pretrain", step=3, message="the loss is nan", last_losses=[])
        return done(spec)

    monkeypatch.setattr(runner, "_start_arm", start)
    monkeypatch.setattr(runner, "_read_row", read)
    monkeypatch.setattr(runner, "_log_row", lambda row: None)
    monkeypatch.setattr(runner, "time", SimpleNamespace(sleep=lambda _: None, monotonic=lambda: 0.0))
    waiting = [spec for name, spec in found.items() if name not in rows]
    weights = {name: {"pretrain": 1.0} for name in found}
    return [*runner._finished_rows(waiting, rows, Settings(Path(), jobs, False, [], ""), weights)], started


@pytest.mark.parametrize("jobs", [1, 3])
def test_arms_are_started_after_the_towers_of_their_seed(
    jobs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = specs(plan(), tmp_path)
    rows, started = run_rows(found, {}, jobs, "", monkeypatch)
    assert sorted(row["arm"] for row in rows) == sorted(found) and len(started) == len(found)
    for name, before in started:
        assert "towers" not in found[name] or found[name]["towers"] in before
    if jobs == 3:
        assert [name for name, _ in started[:2]] == ["towers-seed0", "towers-seed1"], "the towers of two seeds at once"


@pytest.mark.parametrize("known", [False, True])
def test_failed_towers_fail_the_arms_of_their_seed(
    known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = specs(plan(), tmp_path)
    failure = runner._failed_row(found["towers-seed0"], stage="pretrain", step=3, message="the loss is nan")
    before = {"towers-seed0": failure} if known else {}
    rows, started = run_rows(found, before, 1, "towers-seed0", monkeypatch)
    by_name = {row["arm"]: row for row in rows}
    for name in ("early-seed0", "late-seed0"):
        assert by_name[name]["failure"]["message"] == (
            "the towers that it starts from failed: towers-seed0, the loss is nan"
        )
    assert [name for name, _ in started] == [*([] if known else ["towers-seed0"]), "towers-seed1", "early-seed1",
                                             "late-seed1"]  # fmt: skip
    # Started again, the arms get their rows anew; with --retry_failed the towers are trained again as well.
    write_rows(tmp_path, [failure, *rows] if known else rows)
    kept = {retry: {*valid_rows(Settings(tmp_path, 1, False, [], "", None, retry))} for retry in (False, True)}
    good = {"towers-seed1", "early-seed1", "late-seed1"}
    assert kept == {False: {"towers-seed0", *good}, True: good}


def test_towers_in_use_are_restored_or_trained_again(tmp_path: Path) -> None:
    found, source = specs(plan(), tmp_path / "out"), tmp_path / "source"
    rows = {name: done(spec) for name, spec in found.items() if name != "late-seed0"}
    assert towers_in_use(found, rows) == {"towers-seed0"}
    model = source / "arms/towers-seed0/pretrain/model/model.safetensors"
    model.parent.mkdir(parents=True)
    model.write_bytes(b"weights")
    restore_towers(found, rows, source)
    copy = tmp_path / "out/arms/towers-seed0/pretrain/model/model.safetensors"
    assert copy.read_bytes() == b"weights" and len(rows) == len(found) - 1
    assert not (tmp_path / "out/arms/towers-seed1").exists(), "no arm needs them"
    copy.unlink()
    for file in ("row.json", "pretrain/metrics.json"):
        (tmp_path / "out/arms/towers-seed0" / file).write_text("{}")
    restore_towers(found, rows, None)
    assert "towers-seed0" not in rows and "towers-seed1" in rows
    assert not [*(tmp_path / "out").rglob("*.json")], "so that its process trains it"


# --- the report ----------------------------------------------------------------------------------------------------


def report_of(towers: list[Row], weights: list[str]) -> Any:
    rows, items = made({"early": 0.6, "late": 0.5}, seeds=[0, 1])
    for row, sha256 in zip(rows, weights, strict=True):
        row["towers"] = {"arm": f"towers-seed{row['seed']}", "sha256": {"model.safetensors": sha256}}
    content = comparison_json(["early", "late"], [0, 1], arms=[row["arm"] for row in rows],
                              towers=[row["arm"] for row in towers])  # fmt: skip
    return build_document(Outcomes([*rows, *towers], items, content), [])


def test_report_has_the_cost_of_the_towers_apart_from_that_of_the_arms() -> None:
    cost = {"samples": 512, "train_seconds": 30.0, "wall_seconds": 90.0, "peak_memory_bytes": 1e9}
    towers: Row = {"arm": "towers-seed0", "strategy": "towers", "status": "done", "cost": cost, "results": {},
                   "budget": {"steps": 8, "training_flops": 1.54e8}}  # fmt: skip
    failure = {"stage": "pretrain", "step": 4, "message": "the loss is nan", "last_losses": [2.0]}
    broken: Row = {"arm": "towers-seed1", "strategy": "towers", "status": "failed", "failure": failure}
    found = report_of([towers, broken], ["a", "b", "a", "b"])
    assert found.strategies == ["early", "late"]
    tables = {table.title: table for section in found.sections for table in section.tables}
    table = tables["Cost of the towers"]
    assert dict(zip(table.head, table.rows[0], strict=True)) == {
        "towers": "towers-seed0", "steps": "8", "samples": "512", "training FLOPs": "1.54e08", "training time": "30 s",
        "wall time": "90 s", "peak memory": "1.00 GB",
    }  # fmt: skip
    assert len(table.rows) == 1 and {row[0] for row in tables["Cost"].rows} == {"early", "late"}
    assert tables["Failed arms"].rows == [["towers-seed1", "pretrain", "4", "the loss is nan", "2"]]
    assert not any("different weights" in warning for warning in found.warnings)
    mixed = report_of([towers], ["a", "b", "a", "c"]).warnings
    assert "Arms of towers-seed1 have started from different weights." in mixed


def test_towers_count_as_no_result_of_a_strategy(tmp_path: Path) -> None:
    found = plan(primary=["pretrain/itm_accuracy"])
    (tmp_path / "plan.json").write_text(json.dumps({"comparison": {"primary": ["pretrain/itm_auroc"]}}))
    rows = {name: done(spec) for name, spec in specs(found, tmp_path).items()}
    towers = {name: row for name, row in rows.items() if row["strategy"] == "towers"}
    assert previous_primary(found, tmp_path, towers) is None
    assert previous_primary(found, tmp_path, rows) == {"primary": ["pretrain/itm_auroc"], "arms": 4}
    write_report_inputs(found, Settings(tmp_path, 1, False, [], ""), {})
    content = json.loads((tmp_path / "comparison.json").read_text())
    assert content["towers"] == ["towers-seed0", "towers-seed1"] and "towers-seed0" not in content["arms"]
    assert "after 7 steps of common towers, which no budget contains" in content["budget_rule"]
