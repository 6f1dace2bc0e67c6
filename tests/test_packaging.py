"""The wheel: what it holds, and that it trains outside the repository."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy of the repository, so that nothing of an earlier build gets into it."""
    folder = tmp_path_factory.mktemp("wheel")
    skip = shutil.ignore_patterns(
        ".*", "runs", "build", "*.egg-info", "images", "annotations", "tokenizer", "__pycache__", "docs", "tests"
    )
    shutil.copytree(ROOT, folder / "tree", ignore=skip)
    (folder / "tree/data/shapes/images").mkdir()
    (folder / "tree/data/shapes/images/000001.png").touch()
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(folder / "tree")]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_wheel_holds_package_presets_and_generators_only(wheel: zipfile.ZipFile) -> None:
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    package = {str(f.relative_to(ROOT)) for f in (ROOT / "mmbert").rglob("*") if f.is_file() and f.suffix != ".pyc"}
    presets = {f"mmbert/presets/{file.relative_to(ROOT / 'configs')}" for file in (ROOT / "configs").rglob("*.yaml")}
    scripts = {f"mmbert/generators/{file.relative_to(ROOT / 'data')}" for file in (ROOT / "data").glob("*/*.py")}
    assert held == package | presets | scripts


def test_installed_wheel_trains_the_quickstart_by_name(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """In an environment of its own, outside the repository, with a data set that it generates itself."""
    installed, work = tmp_path / "site-packages", tmp_path / "work"
    wheel.extractall(installed)
    work.mkdir()
    # The editable install of the repository is found by a finder of its own, after what stands in PYTHONPATH.
    path = os.pathsep.join([str(installed), os.environ["PYTHONPATH"]])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "mmbert", *arguments]
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    where = "import mmbert.cli.main as m; print(m.__file__)"
    found = subprocess.run([sys.executable, "-c", where], cwd=work, env=environment, capture_output=True, text=True)
    assert found.stdout.startswith(str(installed)), found

    listed = [line.split()[0] for line in run("configs").splitlines()]
    assert {"quickstart", "pretrain/ucm", "compare/quick"} <= set(listed)
    assert len(listed) == len(list((ROOT / "configs").rglob("*.yaml")))
    assert run("configs", "show", "quickstart") == (ROOT / "configs/quickstart.yaml").read_text()

    (work / "own.yaml").write_text("base: presets/fusion/late")
    assert "fusion: late" in run("configs", "show", "own.yaml", "--resolved")

    run("data", "prepare", "shapes", "--train=16", "--val=4", "--test=8", "--jobs=1")
    tiny = ["--model.text_layers=1", "--model.image_layers=1", "--model.fusion_layers=1", "--data.batch_size=8"]
    tiny += ["--data.num_workers=0", "--evaluation.val_images=0", "--evaluation.test_images=0"]
    run("fit", "--config", "quickstart", *tiny, "--trainer.max_steps=2", "--trainer.accelerator=cpu")
    assert json.loads((work / "runs/quickstart/metrics.json").read_text())["run/steps"] == 2
    assert (work / "runs/quickstart/model/config.json").is_file()


def test_top_level_is_as_agreed() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:
        top = {name.split("/")[0] for name in listed.stdout.splitlines()}
    else:
        top = {path.name for path in ROOT.iterdir()}
    assert {"mmbert", "data", "configs", "tests", "train.py", "pyproject.toml"} <= top
    assert not (ROOT / "data/__init__.py").exists()
