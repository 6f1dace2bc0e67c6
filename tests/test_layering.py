"""Imports inside mmbert go down one list, so that every file can be read knowing only what stands above it."""

import ast
from pathlib import Path

import pytest

import mmbert

ROOT = Path(mmbert.__file__).parent
# From the bottom up; folders in one row are equals and may import each other.
LAYERS: list[tuple[str, ...]] = [
    ("errors",),
    ("metrics", "runtime"),
    ("model",),
    ("data",),
    ("evaluation",),
    ("training", "inference"),
    ("compare",),
    ("cli",),
    ("__init__", "__main__"),
]
MAY_IMPORT_ONLY = {"metrics": {"errors", "metrics"}, "runtime": {"errors", "runtime"}}


def level(module: str) -> int | None:
    """The row of the folder that a module, "a.b" without "mmbert.", is in."""
    top = module.split(".")[0]
    return next((number for number, row in enumerate(LAYERS) if top in row), None)


def modules() -> dict[str, Path]:
    """Every file of the package by its dotted name."""
    found = {}
    for file in sorted(ROOT.rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        if parts[-1] == "__init__" and len(parts) > 1:
            parts = parts[:-1]
        found[".".join(parts)] = file
    return found


MODULES = modules()


def imports(tree: ast.AST, module: str) -> list[tuple[int, str]]:
    """(line, imported mmbert module) at any depth, besides those under `if TYPE_CHECKING:`."""
    found = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for other in node.orelse:
                found += imports(other, module)
        elif isinstance(node, ast.Import):
            found += [(node.lineno, a.name.removeprefix("mmbert.")) for a in node.names if a.name.startswith("mmbert.")]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"mmbert/{module}:{node.lineno}: write imports in full, from mmbert..."
            source = node.module or ""
            for alias in node.names if source.split(".")[0] == "mmbert" else ():
                inner = f"{source}.{alias.name}".removeprefix("mmbert.")
                outer = source.removeprefix("mmbert").removeprefix(".") or "__init__"
                found.append((node.lineno, inner if inner in MODULES else outer))
        else:
            found += imports(node, module)
    return found


def test_layering_finds_imports() -> None:
    code = "from mmbert.data.pairs import Pairs\nimport os\nif TYPE_CHECKING:\n    from mmbert.cli.main import main\n"
    code += "def f():\n    import mmbert.training.run_folder\n    from mmbert import errors\n"
    assert imports(ast.parse(code), "x") == [(1, "data.pairs"), (6, "training.run_folder"), (7, "errors")]
    assert level("model.fusion.early") == level("model") < level("data.readers.coco") == level("data.images")
    assert level("training.fit") == level("inference.loaded") and level("nowhere") is None


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_what_is_below_it(module: str) -> None:
    own = level(module)
    assert own is not None, f"mmbert/{module} is new: say in LAYERS of tests/test_layering.py where it stands"
    for line, other in imports(ast.parse(MODULES[module].read_text()), module):
        below = level(other)
        place = f"{MODULES[module].relative_to(ROOT.parent)}:{line}"
        assert below is not None, f"{place} imports mmbert.{other}, which LAYERS does not know"
        assert below <= own, f"{place} imports mmbert.{other}, which stands above it in LAYERS"
        top = module.split(".")[0]
        allowed = MAY_IMPORT_ONLY.get(top)
        assert allowed is None or other.split(".")[0] in allowed, f"{place}: {top} may import only {allowed}"
