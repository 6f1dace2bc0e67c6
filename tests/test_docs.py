"""Drawing, notebook, links and names of tests in the documentation are up to date."""

import json
import re
import runpy
from pathlib import Path

import pytest

import mmbert
from mmbert.model.importing import SOURCES

ROOT = Path(__file__).parents[1]
DOCS = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")] + sorted(ROOT.glob("docs/*.md"))


def test_fusion_drawing_is_what_the_strategies_give() -> None:
    script = runpy.run_path(str(ROOT / "docs/draw_fusion.py"))
    assert (ROOT / "docs/fusion.svg").read_text(encoding="utf-8") == script["draw"](), "run docs/draw_fusion.py"


def test_drawing_traces_the_layers_of_each_strategy() -> None:
    trace = runpy.run_path(str(ROOT / "docs/draw_fusion.py"))["trace"]
    text, image = [0, 1, 2], [3, 4, 5]
    assert trace("early") == ([(text + image, [])], [0])
    assert trace("late") == ([], [0, 3])
    assert trace("hybrid") == ([(text, image), (image, text)], [0, 3])
    assert trace("hybrid_cross") == ([(text, image)], [0])


def test_checkpoints_page_is_what_its_script_writes() -> None:
    script = runpy.run_path(str(ROOT / "docs/checkpoints.py"))
    text = (ROOT / "docs/checkpoints.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")][1:]
    numbers = {(family, head): float(value) for family, head, value, _ in rows if value != "-"}
    compared = [row for row in script["ROWS"] if row.test]
    assert {(row.family, row.head) for row in compared} == numbers.keys() and max(numbers.values()) < 1e-5
    assert text == script["page"]({row.test: numbers[row.family, row.head] for row in compared}), "run the script"
    for row in compared:
        file, _, name = row.test.partition("::")
        assert f"def {name}(" in (ROOT / "tests/oracles" / file).read_text(encoding="utf-8"), row.test
    families = {row.family.lower() for row in compared}
    assert families == {re.sub("[-_]", "", name) for name in SOURCES}, "every family has a row with its parity"


def test_notebook_runs(tmp_path: Path) -> None:
    pytest.importorskip("ipykernel", reason="needs ipykernel, which runs notebooks")
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient, which runs notebooks")
    nbformat = pytest.importorskip("nbformat", reason="needs nbformat, which reads notebooks")
    notebook = nbformat.read(ROOT / "docs/fit.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = [output["data"] for output in outputs if output["output_type"] == "execute_result"]
    assert "<td>itm_accuracy</td>" in shown[0]["text/html"]
    metrics = json.loads((tmp_path / "runs/first/metrics.json").read_text())
    assert float(shown[1]["text/plain"]) == metrics["test/itm_accuracy"]
    assert shown[2]["text/plain"].startswith("Matches(scores=[") and "image/png" in shown[3]


@pytest.mark.parametrize("file", DOCS, ids=lambda file: file.name)
def test_links_and_tests_in_docs_exist(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    for link, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", text):
        if link.startswith("http"):
            continue
        target = file.parent / link if link else file
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], anchor
    current = ""
    for path, name in re.findall(
        r"`((?:tests/)?[\w/]*(?:test_|fuzz_)\w+\.py)?(?:::(test_\w+))?(?:\.\.\.)?[^`\n]*`", text
    ):
        current = path.removeprefix("tests/") or current
        if path:
            assert (ROOT / "tests" / current).is_file(), path
        if name:
            assert f"def {name}" in (ROOT / "tests" / current).read_text(encoding="utf-8"), f"{current}::{name}"


@pytest.mark.parametrize("file", DOCS, ids=lambda file: file.name)
def test_python_names_in_docs_exist(file: Path) -> None:
    names = set(re.findall(r"\bmmbert\.([A-Za-z]\w*)\(", file.read_text(encoding="utf-8")))
    assert [name for name in names if not callable(getattr(mmbert, name, None))] == []


def test_architecture_has_at_most_90_lines() -> None:
    assert len((ROOT / "ARCHITECTURE.md").read_text().splitlines()) <= 90


@pytest.mark.parametrize("place", re.findall(r"`(\w+/[\w/]*\.py)`", (ROOT / "ARCHITECTURE.md").read_text()))
def test_files_in_the_architecture_exist(place: str) -> None:
    assert any((folder / place).is_file() for folder in (ROOT, ROOT / "mmbert")) or "NAME" in place
