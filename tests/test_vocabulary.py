"""One concept has one word, the field's: identifiers that were replaced by standard terms do not come back."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

INSTEAD = {
    "told|told_of|told_by_\\w+|tell_report": "describe, format_*, summary",
    "refuse|refuse_\\w+": "validate_*, check_*",
    "asked|is_asked": "requested, is_set",
    "leave_results|leave|leave_together": "write_results, exit_gracefully, exit_together",
    "guess|guess_\\w+": "detect_format, sniff_file_type",
    "everywhere|summed|united|in_turn|own_share|share_out": "all_gather_list, all_reduce_sum, broadcast, shard_jobs",
    "one_sentence_for_mistakes": "report_user_errors",
    "take_over": "reuse_rows, import_rows",
    "or_learned": "with_fallback",
    "only_one": "single_process_lock",
    "close_imports": "restrict_imports",
    "is_whole|newest_whole|write_whole|load_whole|whole_weights": "is_complete, latest_complete_checkpoint",
    "sum_path": "checksum_path",
    "abilities": "capabilities",
    "(\\w+_)?pictures?(_\\w+)?": "image",
    "skipped_why": "skip_reasons",
}
"""Banned identifiers, as a regular expression -> standard terms to use instead."""

PICTURE = re.compile(r"\bpictures?\b", re.IGNORECASE)
ALLOWED = (
    '"picture", "photo"',  # usual names of a field in other people's data
    '"bootstrap over pictures"',  # the name of a random stream is part of the seed
)
"""Quotations that may have the word."""


def identifiers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of functions, classes, arguments, attributes, variables and imported names."""
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield line, name
            case ast.arg(arg=name) | ast.Attribute(attr=name) | ast.Name(id=name):
                yield line, name
            case ast.keyword(arg=str(name)):
                yield line, name
            case ast.alias(name=name, asname=other):
                yield from ((line, part) for part in [*name.split("."), *([other] if other else [])])


def banned(code: str) -> list[str]:
    """Banned identifiers in Python code, each with its line and what to use instead."""
    return [
        f"line {line}: {name}; use {better}"
        for line, name in sorted(set(identifiers(ast.parse(code))))
        for pattern, better in INSTEAD.items()
        if re.fullmatch(pattern, name.strip("_"))
    ]


def test_every_kind_of_identifier_is_checked() -> None:
    code = "import told\nclass asked: pass\ndef refuse_all(picture, *, image):\n    guess = self.summed\n"
    code += "f(in_turn=1)\nfrom x import y as only_one\n"
    assert len(banned(code)) == 8
    assert banned("def describe(image, depicture=1, requested=2): ...") == []


def test_identifiers_are_standard_terms() -> None:
    files = [*sorted(ROOT.glob("mmbert/**/*.py")), *sorted(ROOT.glob("benchmarks/*.py")), ROOT / "train.py"]
    found = [
        f"{file.relative_to(ROOT)} {place}" for file in files for place in banned(file.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


def test_images_are_called_images() -> None:
    files = [*sorted(ROOT.glob("mmbert/**/*.py")), *ROOT.glob("*.md"), *sorted(ROOT.glob("docs/**/*.md"))]
    found = [
        f"{file.relative_to(ROOT)}:{number}"
        for file in files
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if PICTURE.search(line) and not any(quotation in line for quotation in ALLOWED)
    ]
    assert not found, "\n".join(found)
