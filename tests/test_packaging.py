"""What ends up on a user's machine."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import mmbert

ROOT = Path(__file__).parents[1]


def test_wheel_holds_mmbert_only(tmp_path: Path) -> None:
    tree = tmp_path / "tree"  # a copy: what an earlier build left behind must not leak in
    skip = shutil.ignore_patterns(".*", "runs", "build", "*.egg-info", "images", "annotations", "__pycache__")
    shutil.copytree(ROOT, tree, ignore=skip)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(tree)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {name.split("/")[0] for name in names} == {"mmbert", f"mmbert-{mmbert.__version__}.dist-info"}
    needed = {"mmbert/data/readers/coco.py", "mmbert/py.typed", "mmbert/model/fusion/hybrid.py"}
    assert {*needed, "mmbert/compare/report/page.css"} <= set(names)


def test_top_level_is_as_agreed() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:
        top = {name.split("/")[0] for name in listed.stdout.splitlines()}
    else:
        top = {path.name for path in ROOT.iterdir()}
    assert {"mmbert", "data", "configs", "tests", "train.py", "pyproject.toml"} <= top
    assert not (ROOT / "data/__init__.py").exists()
