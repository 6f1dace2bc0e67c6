"""Tiny comparisons run as commands: rows, resume after kills, failures, errors, and the same from Python."""

import fcntl
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tiers import FULL

import mmbert
from mmbert.errors import UsageError

ROOT = Path(__file__).parents[2]


def tiny_comparison(folder: Path, tiny: list[str], shapes: Path, **changes: Any) -> str:
    """A file that compares early and late fusion with 6 and about as many steps, two seeds."""
    options = dict(option.removeprefix("--").split("=", 1) for option in tiny)
    content = {
        "name": "tiny",
        "strategies": ["early", "late"],
        "seeds": [0, 1],
        "match": "flops",
        "pretrain": {
            "run": str(ROOT / "configs/pretrain/shapes_plain.yaml"),
            "steps": 6,
            "options": {
                **{key: yaml.safe_load(value) for key, value in options.items()},
                "checkpoint.every_n_steps": 1,
                "trainer.precision": "32-true",
            },
        },
        "retrieval": {"images": 6},
        "foils": {"files": [str(shapes / "annotations/foils_test.json")], "images": str(shapes / "images")},
        "shares": {"pairs": 3, "samples": 4},
        "primary": ["foils/overall"],
    }
    file = folder / "comparison.yaml"
    file.write_text(yaml.safe_dump({**content, **changes}))
    return str(file)


def start_command(file: str, out: Path, *more: str, where: Path = ROOT) -> subprocess.Popen[str]:
    """Start the command in a process group of its own."""
    command = [sys.executable, "-m", "mmbert", "compare", "-c", file, "--out", str(out), "--jobs", "2", *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=where
    )


def run_command(file: str, out: Path, *more: str, code: int = 0, where: Path = ROOT) -> str:
    """Standard error of a command that exits with `code`."""
    process = start_command(file, out, *more, where=where)
    errors = process.communicate(timeout=240)[1]
    assert process.returncode == code, errors
    return errors


def rows(out: Path, *, without: tuple[str, ...] = ("cost",)) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in without} for row in found]


def assert_equal_rows(found: Path, expected: Path) -> None:
    assert len(rows(found)) == len(rows(expected))
    for row, other in zip(rows(found), rows(expected), strict=True):
        differ = {key: (row.get(key), other.get(key)) for key in {*row, *other} if row.get(key) != other.get(key)}
        assert not differ, f"{row['arm']}: {differ}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny: list[str], shapes: Path) -> tuple[str, Path]:
    """File and folder of a comparison that was never killed."""
    folder = tmp_path_factory.mktemp("compare")
    file = tiny_comparison(folder, tiny, shapes)
    run_command(file, folder / "out")
    return file, folder / "out"


def test_rows_hold_results_that_are_the_means_of_their_items(finished: tuple[str, Path]) -> None:
    found = rows(finished[1], without=())
    assert [row["arm"] for row in found] == ["early-seed0", "late-seed0", "early-seed1", "late-seed1"]
    for row in found:
        assert row["status"] == "done"
        assert row["results"]["pretrain/mlm_image_gain"] == 0 or row["strategy"] == "early"
        assert {"wall_seconds", "peak_memory_bytes", "ms_per_pair", "search_seconds", "machine", "date"} <= row[
            "cost"
        ].keys()
        assert row["config"]["pretrain.model.fusion"] == row["strategy"]
        options = row["options"]["pretrain"]
        assert options["optim.final_lr"] == 0 and options["data.batch_size"] == 16  # a default and a choice
        assert options["model.fusion"] == row["strategy"] and "trainer.default_root_dir" not in options
        assert row["scorers"] == {"pretrain": "itc"} and "val/itm_accuracy" in row["curves"]
        with np.load(finished[1] / "items" / f"{row['arm']}.npz") as items:
            names = [name for name in items.files if not name.endswith(":image")]
            assert {"foils/overall", "retrieval/text_to_image/R@1", "pretrain/itm_accuracy", "shares/text"} <= {*names}
            assert items["shares/text"].shape == (3,) and 0 < row["results"]["shares/text"] < 1
            for name in names:
                assert items[name].mean() == pytest.approx(row["results"][name], abs=1e-12), name
                assert items[f"{name}:image"].shape == items[name].shape


def test_budgets_are_equal_and_arms_take_their_steps(finished: tuple[str, Path]) -> None:
    budgets = {row["strategy"]: row["budget"] for row in rows(finished[1])}
    assert budgets["early"]["steps"] == 6 and budgets["early"]["missed_by"] == 0
    assert budgets["late"]["training_flops"] == pytest.approx(budgets["early"]["training_flops"], rel=0.05)
    for strategy, budget in budgets.items():
        trace = (finished[1] / f"arms/{strategy}-seed0/pretrain/trace.csv").read_text().splitlines()[1:]
        assert len(trace) == budget["steps"]
    # One sequence of samples: the arm with fewer steps trains on a prefix of it.
    seen = [
        [line.split(",")[2] for line in (finished[1] / f"arms/{s}-seed1/pretrain/trace.csv").read_text().split()[1:]]
        for s in ("early", "late")
    ]
    short, long = sorted(seen, key=len)
    assert short == long[: len(short)]


def test_comparison_killed_twice_gives_the_same_rows_and_items(finished: tuple[str, Path], tmp_path: Path) -> None:
    file, expected = finished
    rng = random.Random(0)
    out = tmp_path / "out"
    for _ in range(2):
        process = start_command(file, out)
        time.sleep(rng.uniform(12, 25))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    run_command(file, out)
    assert_equal_rows(out, expected)
    for row in rows(out):
        name = f"items/{row['arm']}.npz"
        assert (out / name).read_bytes() == (expected / name).read_bytes()


@pytest.mark.parametrize("match", ["parameters", "time"])
def test_two_runs_give_the_same_rows_and_items(match: str, tiny: list[str], shapes: Path, tmp_path: Path) -> None:
    """For FLOPs see the test above. With `match: time` the steps are measured, and stored in budgets.json."""
    file, one, two = tiny_comparison(tmp_path, tiny, shapes, match=match, seeds=[0]), tmp_path / "one", tmp_path / "two"
    run_command(file, one, "--exploratory")
    if match == "time":
        two.mkdir()
        shutil.copy(one / "budgets.json", two)
    run_command(file, two, "--exploratory")
    assert len(rows(one)) == 2 and {row["budget"]["match"] for row in rows(one)} == {match}
    assert_equal_rows(two, one)
    for row in rows(one):
        name = f"items/{row['arm']}.npz"
        assert (two / name).read_bytes() == (one / name).read_bytes()


def test_finished_arms_are_not_trained_again(finished: tuple[str, Path]) -> None:
    file, out = finished
    before = (out / "results.jsonl").read_bytes()
    assert "4 of 4 arms are finished already" in run_command(file, out)
    assert (out / "results.jsonl").read_bytes() == before


def test_arms_with_equal_options_are_imported_from_another_comparison(
    finished: tuple[str, Path], tmp_path: Path
) -> None:
    """Three of four: the last has another learning rate in the other comparison, so it is trained."""
    file, out = finished
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(out / "items", elsewhere / "items")
    found = rows(out, without=())
    found[3]["config"]["pretrain.optim.lr"] = 0.5
    (elsewhere / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    errors = run_command(file, tmp_path / "out", "--rows_from", str(elsewhere))
    assert f"imported 3 of 4 missing arms from {elsewhere}" in errors and "3 of 4 arms are finished already" in errors
    assert sorted(p.name for p in (tmp_path / "out/arms").iterdir()) == ["late-seed1"]
    assert_equal_rows(tmp_path / "out", out)
    for row in rows(out):
        name = f"items/{row['arm']}.npz"
        assert (tmp_path / "out" / name).read_bytes() == (out / name).read_bytes()
    (tmp_path / "empty").mkdir()
    errors = run_command(file, tmp_path / "out2", "--rows_from", str(tmp_path / "empty"), code=2)
    assert "it has no results.jsonl with rows" in errors


def test_arm_whose_evaluation_failed_is_evaluated_again_without_training(
    finished: tuple[str, Path], tmp_path: Path
) -> None:
    file, expected = finished
    out = shutil.copytree(expected, tmp_path / "out")
    arm = out / "arms/early-seed0"
    spec = json.loads((arm / "arm.json").read_text().replace(str(expected), str(out)))
    (arm / "arm.json").write_text(json.dumps(spec))
    (arm / "row.json").unlink()
    found = rows(out, without=())
    failure = {"stage": "evaluation", "step": 6, "message": "no such folder", "last_losses": [], "exit_code": 1}
    found[0] = {**{k: v for k, v in found[0].items() if k != "results"}, "status": "failed", "failure": failure}
    (out / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    before = (arm / "pretrain/trace.csv").stat().st_mtime_ns
    assert "3 of 4 arms are finished already" in run_command(file, out)
    assert_equal_rows(out, expected)
    assert (arm / "pretrain/trace.csv").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ("primary=[foils/swap_atribute]", 2, "is not a category; allowed are foils/overall, foils/"),
        ("foils.files=[nothing.json]", 1, "nothing.json"),
        ("fractions=[0.1, 1]", 2, "0.1 of 64 training pairs are 6, fewer than data.batch_size=16"),
        ("retrieval.split=tset", 2, "retrieval.split='tset'; the data has"),
    ],
)
def test_impossible_evaluation_is_an_error_before_the_training(
    finished: tuple[str, Path], tmp_path: Path, change: str, code: int, message: str
) -> None:
    assert message in run_command(finished[0], tmp_path / "out", "--set", change, code=code)
    assert not (tmp_path / "out/arms").exists()


def test_report_is_written_again_without_the_foils(finished: tuple[str, Path], tmp_path: Path) -> None:
    file, expected = finished
    out = shutil.copytree(expected, tmp_path / "out", ignore=shutil.ignore_patterns("arms"))
    before = (out / "report.html").read_bytes()
    errors = run_command(file, out, "--report_only", "--set", "foils.images=/gone")
    assert "examples are not updated" in errors and "/gone" in errors
    after = (out / "report.html").read_bytes()
    assert after.count(b"<img") == before.count(b"<img") and (out / "examples.json").is_file()


def test_captions_are_the_examples_without_foils(finished: tuple[str, Path], tmp_path: Path) -> None:
    out = shutil.copytree(finished[1], tmp_path / "out")
    for arm in (out / "arms").iterdir():  # evaluated again by retrieval alone, without training
        (arm / "row.json").unlink()
        spec = json.loads((arm / "arm.json").read_text().replace(str(finished[1]), str(out)))
        (arm / "arm.json").write_text(json.dumps(spec))
    (out / "results.jsonl").unlink()
    run_command(finished[0], out, "--set", "foils=", "--set", "retrieval.images=32", "--set", "primary=")
    examples = json.loads((out / "examples.json").read_text())
    queries = [tuple(query) for query in json.loads((out / "arms/early-seed0/queries.json").read_text())]
    hits = {}
    for name in ("early", "late"):
        with np.load(out / f"items/{name}-seed0.npz") as items:
            hits[name] = dict(zip(queries, items["retrieval/text_to_image/R@1"] > 0, strict=True))
    differ = {caption: hit for (_, caption), hit in hits["early"].items() if hit != hits["late"][_, caption]}
    assert examples and {example["caption"] for example in examples} <= differ.keys()
    for example in examples:
        assert example["outcomes"]["early"] == differ[example["caption"]] != example["outcomes"]["late"]
    # Without the folders of the arms the examples are kept.
    shutil.rmtree(out / "arms")
    errors = run_command(
        finished[0], out, "--set", "foils=", "--set", "retrieval.images=32", "--set", "primary=", "--report_only"
    )
    assert "examples are not updated" in errors and json.loads((out / "examples.json").read_text()) == examples


def test_rows_of_another_comparison_are_an_error_and_nothing_is_written(finished: tuple[str, Path]) -> None:
    file, out = finished
    kept = {name: (out / name).read_bytes() for name in ("plan.json", "budgets.json", "comparison.json", "report.md")}
    errors = run_command(file, out, "--set", "pretrain.options.optim.lr=0.5", code=1)
    assert "rows of another comparison (pretrain.optim.lr was 0.001 and is 0.5); expected another --out" in errors
    errors = run_command(file, out, "--set", "retrieval.images=5", code=1)
    assert "early-seed0: a row of another comparison (retrieval was {" in errors
    errors = run_command(file, out, "--set", "retrieval.images=5", "--set", "name=other", "--report_only", code=1)
    assert "early-seed0: a row of another comparison (retrieval was {" in errors
    errors = run_command(file, out, "--set", "pretrain.steps=7", "--report_only", code=1)
    assert "rows of another comparison (pretrain.steps was 6 and is 7)" in errors
    for name, content in kept.items():
        assert (out / name).read_bytes() == content, name


def test_change_of_primary_measures_after_the_results_is_stored(finished: tuple[str, Path], tmp_path: Path) -> None:
    out = shutil.copytree(finished[1], tmp_path / "out", ignore=shutil.ignore_patterns("arms"))
    before = {"primary": ["foils/overall"], "arms": 4}
    for flags in (["--report_only"], [], ["--report_only"]):  # the second writes plan.json again
        run_command(finished[0], out, "--set", "primary=[retrieval/text_to_image/R@1]", *flags)
        assert json.loads((out / "comparison.json").read_text())["primary_before"] == before
    run_command(finished[0], out)
    assert "primary_before" not in json.loads((out / "comparison.json").read_text())


def test_arm_exits_with_its_parent_process(finished: tuple[str, Path], tmp_path: Path) -> None:
    arm = shutil.copytree(finished[1] / "arms/early-seed0", tmp_path / "arm", ignore=shutil.ignore_patterns("pretrain"))
    (arm / "row.json").unlink()
    spec = json.loads((arm / "arm.json").read_text())
    (arm / "arm.json").write_text(json.dumps({**spec, "folder": str(arm)}))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    command = [sys.executable, "-m", "mmbert.compare.arm", str(arm / "arm.json"), str(gone.pid)]
    with (arm / "lock").open("w") as lock:  # another process has the lock of the arm: this one waits
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert subprocess.run(command, cwd=ROOT, timeout=120).returncode == -signal.SIGTERM
    assert not (arm / "pretrain").exists()


def test_one_seed_is_an_error_unless_exploratory(finished: tuple[str, Path], tmp_path: Path) -> None:
    errors = run_command(finished[0], tmp_path / "out", "--set", "seeds=[0]", code=2)
    assert (
        "with one seed a difference between strategies can't be distinguished" in errors
        and "--exploratory" in errors
        and not (tmp_path / "out").exists()
    )


def test_tasks_are_fine_tuned_from_the_pretrained_model(
    tiny: list[str], tiny_tasks: dict[str, list[str]], shapes: Path, tmp_path: Path
) -> None:
    def options(given: list[str]) -> dict[str, Any]:
        pairs = (option.removeprefix("--").split("=", 1) for option in given)
        return {k: yaml.safe_load(v) if v else "" for k, v in pairs if k.startswith(("data.", "trainer."))}

    tasks = {
        name: {"run": str(ROOT / f"configs/finetune/{file}.yaml"), "steps": 3, "options": options(tiny_tasks[name])}
        for name, file in (("vqa", "vqa_shapes"), ("decision", "snli_ve"))
    }
    primary = ["vqa/accuracy", "decision/accuracy"]
    file = tiny_comparison(tmp_path, tiny, shapes, finetune=tasks, seeds=[0], foils={}, retrieval={}, primary=primary)
    errors = run_command(file, tmp_path / "out", "--exploratory")
    assert " | vqa: 3 steps; " in errors and errors.count(" | vqa: ") == errors.count(" | decision: ") == 2
    for row in rows(tmp_path / "out"):
        assert row["status"] == "done" and {*primary, "vqa/accuracy/no_text"} <= row["results"].keys()
        assert row["options"].keys() == {"pretrain", "vqa", "decision"} and "vqa/val/vqa_accuracy" in row["curves"]
        assert row["options"]["vqa"]["model.task"] == "vqa" and str(tmp_path) not in json.dumps(row["options"])
        for stage, steps in (("pretrain", "steps"), ("vqa", "vqa/steps"), ("decision", "decision/steps")):
            trace = tmp_path / f"out/arms/{row['arm']}/{stage}/trace.csv"
            assert len(trace.read_text().splitlines()) == 1 + row["budget"][steps]


CUSTOM_FUSION = """
import torch
from mmbert import Fused, Fusion

class Product(Fusion):
    def __init__(self, config):
        super().__init__(config)
        self.absent = torch.nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, text, image):
        return Fused(text, image, text.with_fallback(self.absent).first * image.with_fallback(self.absent).first)
"""


def test_diverging_arm_is_reported_and_a_custom_fusion_finishes(tiny: list[str], shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "my_fusion.py").write_text(CUSTOM_FUSION)
    strategies = {"late": {"optim.lr": 1e30}, "product": {"model.fusion": "my_fusion.Product"}}
    file = tiny_comparison(tmp_path, tiny, shapes, strategies=strategies, seeds=[0])
    errors = run_command(file, tmp_path / "out", "--exploratory", "--allow-import", "my_fusion", where=tmp_path)
    assert "late-seed0 failed in pretrain at step" in errors
    bad, good = rows(tmp_path / "out")
    assert (good["strategy"], good["status"], bad["status"]) == ("product", "done", "failed")
    failure = bad["failure"]
    assert failure["stage"] == "pretrain" and failure["step"] >= 1 and len(failure["last_losses"]) == failure["step"]
    assert "finite" in failure["message"]
    assert bad["versions"]["mmbert"] and bad["versions"] == good["versions"]
    again = run_command(file, tmp_path / "out", "--exploratory", "--allow-import", "my_fusion", where=tmp_path)
    assert "failed before, use --retry_failed to run again: late-seed0" in again
    again = run_command(
        file, tmp_path / "out", "--exploratory", "--allow-import", "my_fusion", "--retry_failed", where=tmp_path
    )
    assert "1 of 2 arms are finished already" in again and "late-seed0 failed in pretrain at step" in again
    report = (tmp_path / "out/report.md").read_text()
    assert "late-seed0" in report and "exploratory" in report.lower()


def test_comparison_from_python_in_a_thread(finished: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    file, out = finished
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(mmbert.compare, file, out=out).result()
        with pytest.raises(UsageError, match="with one seed"):
            pool.submit(mmbert.compare, file, out=out, changes={"seeds": [0]}).result()
    assert found.folder == out and found.report.is_file() and not found.failed
    assert {name: row["results"] for name, row in found.rows.items()} == {
        row["arm"]: row["results"] for row in rows(out)
    }
    assert found.summary.headline in (out / "report.md").read_text(encoding="utf-8")
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]


@pytest.fixture(scope="module")
def from_towers(tmp_path_factory: pytest.TempPathFactory, tiny: list[str], shapes: Path) -> tuple[str, Path]:
    """File and folder of a comparison with towers, one seed, that was never killed."""
    folder = tmp_path_factory.mktemp("towers")
    options = {key: yaml.safe_load(value) for key, value in (o.removeprefix("--").split("=", 1) for o in tiny)}
    options |= {"model.fusion": "late", "model.objectives": {"ngrams": 1.0}}
    options |= {"checkpoint.every_n_steps": 1, "trainer.precision": "32-true"}
    towers = {"run": "pretrain/shapes_plain", "steps": 20, "options": options}
    file = tiny_comparison(folder, tiny, shapes, towers=towers, seeds=[0])
    run_command(file, folder / "out", "--exploratory")
    return file, folder / "out"


@pytest.mark.timeout(600)
@pytest.mark.skipif(not FULL, reason="a minute of processes: the full tier only")
def test_arms_start_from_their_towers_also_after_kills(from_towers: tuple[str, Path], tmp_path: Path) -> None:
    (file, expected), out = from_towers, tmp_path / "out"
    found = rows(expected)
    assert [row["arm"] for row in found] == ["towers-seed0", "early-seed0", "late-seed0"]
    assert {row["status"] for row in found} == {"done"} and b"Cost of the towers" in (
        expected / "report.html"
    ).read_bytes()
    weights = hashlib.sha256((expected / "arms/towers-seed0/pretrain/model/model.safetensors").read_bytes())
    for row in found[1:]:
        assert row["towers"] == {"arm": "towers-seed0", "sha256": {"model.safetensors": weights.hexdigest()}}
        log = (expected / f"arms/{row['arm']}/log.txt").read_text()
        assert "newly initialized: fusion (" in log and "arms/towers-seed0/pretrain/model" in log
        assert str(expected) not in json.dumps(row["options"])
    for arm in ("towers-seed0", "late-seed0"):
        trace = out / "arms" / arm / "pretrain/trace.csv"
        process = start_command(file, out, "--exploratory")
        while process.poll() is None and (not trace.is_file() or len(trace.read_text().splitlines()) < 3):
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    run_command(file, out, "--exploratory")
    assert_equal_rows(out, expected)
    for row in found:
        assert (out / f"items/{row['arm']}.npz").read_bytes() == (expected / f"items/{row['arm']}.npz").read_bytes()


@pytest.mark.timeout(600)
@pytest.mark.skipif(not FULL, reason="a minute of processes: the full tier only")
def test_another_strategy_starts_from_the_same_towers(from_towers: tuple[str, Path], tmp_path: Path) -> None:
    """From imported ones, and from towers that are trained again because somebody has removed their model."""
    (file, expected), out = from_towers, tmp_path / "out"
    report = (expected / "report.html").read_bytes()
    found = mmbert.compare(file, out=expected, exploratory=True, report_only=True)
    assert [*found.rows] == ["early-seed0", "late-seed0"] and found.report.read_bytes() == report
    flags = ["--exploratory", "--set", "strategies=[early, late, hybrid]"]
    errors = run_command(file, out, *flags, "--rows_from", str(expected))
    assert "imported 3 of 4 missing arms" in errors and "towers-seed0: done" not in errors
    before = rows(out)
    assert before[3]["arm"] == "hybrid-seed0" and before[3]["towers"] == before[2]["towers"]
    (out / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(out, without=())[:3]))
    shutil.rmtree(out / "arms")
    errors = run_command(file, out, *flags)
    assert "towers-seed0 is trained again" in errors and "late-seed0: done" not in errors
    assert rows(out) == before


@pytest.mark.skipif(not FULL, reason="half a minute of processes: the full tier only")
def test_towers_that_diverge_fail_the_arms_of_their_seed(tiny: list[str], shapes: Path, tmp_path: Path) -> None:
    options = {key: yaml.safe_load(value) for key, value in (o.removeprefix("--").split("=", 1) for o in tiny)}
    towers = {"run": "pretrain/shapes_plain", "steps": 8, "options": {**options, "optim.lr": 1e30}}
    file = tiny_comparison(tmp_path, tiny, shapes, towers=towers, seeds=[0])
    errors = run_command(file, tmp_path / "out", "--exploratory", code=1)
    found = rows(tmp_path / "out")
    for flags in ([], ["--retry_failed"]):
        assert [row["failure"]["stage"] for row in found] == ["pretrain", "towers", "towers"]
        reason = f"the towers that it starts from failed: towers-seed0, {found[0]['failure']['message']}"
        assert (
            found[1]["failure"]["message"] == reason and f"early-seed0 failed in towers at step 0: {reason}" in errors
        )
        errors = run_command(file, tmp_path / "out", "--exploratory", *flags, code=1)
        assert rows(tmp_path / "out") == found
    assert not (tmp_path / "out/arms/early-seed0").exists()
