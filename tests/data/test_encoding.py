"""Text files are read and written as UTF-8 in any locale."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCANNED = ("mmbert/data", "mmbert/cli", "mmbert/inference/prediction.py", "data")
TEXT_CALLS = ("open", "read_text", "write_text")


def text_calls() -> Iterator[tuple[str, ast.Call]]:
    """Calls that open, read or write a text file, with their place."""
    for entry in SCANNED:
        path = ROOT / entry
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
                    name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
                    owner = getattr(getattr(node.func, "value", None), "id", "")
                    modes = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
                    is_binary = any("b" in mode for mode in modes) if name == "open" else False
                    if name in TEXT_CALLS and owner not in ("os", "Image") and not is_binary:
                        yield f"{file.relative_to(ROOT)}:{node.lineno}", node


def test_text_files_have_an_encoding() -> None:
    calls = [
        (place, call) for place, call in text_calls() if ast.unparse(call.func) != "read_text"
    ]  # the strict reader
    assert len(calls) >= 5
    assert not [p for p, call in calls if not any(k.arg == "encoding" for k in call.keywords)]
