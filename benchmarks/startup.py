"""Measure start-up: import time, help pages and option errors of the command line, and the modules that they import.

    python benchmarks/startup.py --runs 5 [--other PATH_OF_ANOTHER_CHECKOUT]

Every measurement is a new Python process. Commands and checkouts alternate within one run; printed are Markdown tables
with medians of the wall-clock seconds and with the number of imported modules per top-level package.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

COMMANDS = {
    "import torch": ["-c", "import torch"],
    "import mmbert": ["-c", "import mmbert"],
    "mmbert --help": ["-m", "mmbert", "--help"],
    "mmbert fit --help": ["-m", "mmbert", "fit", "--help"],
    "option error": ["-m", "mmbert", "fit", "--config", "CONFIG", "--model.fusoin", "late"],
}
"""Name -> arguments of Python; CONFIG is the quickstart's file."""
EXIT_CODES = {"option error": 2}
TOP = 8
"""Packages that are listed; others are summed."""


def run(arguments: list[str], checkout: Path, *options: str) -> tuple[float, int, str]:
    """Run Python with a checkout on its path.

    Returns:
        Wall-clock seconds, exit code, and standard error.
    """
    arguments = [str(checkout / "configs/pretrain/shapes_plain.yaml") if a == "CONFIG" else a for a in arguments]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        done = subprocess.run(  # noqa: S603 - the commands above
            [sys.executable, *options, *arguments], env=environment, cwd=folder, capture_output=True, text=True
        )
        return time.perf_counter() - started, done.returncode, done.stderr


def imported_modules(arguments: list[str], checkout: Path) -> Counter[str]:
    """Number of imported modules of each top-level package."""
    lines = run(arguments, checkout, "-X", "importtime")[2].splitlines()
    names = [line.rsplit("|", 1)[1].strip() for line in lines if line.startswith("import time:") and "|" in line]
    return Counter(name.split(".")[0] for name in names if name != "imported package")


def measure(checkouts: list[Path], runs: int) -> dict[tuple[str, Path], list[float]]:
    """Seconds of every command and checkout, alternately; the first round warms up the file cache and is dropped."""
    seconds: dict[tuple[str, Path], list[float]] = {(n, c): [] for n in COMMANDS for c in checkouts}
    for number in range(runs + 1):
        for name, arguments in COMMANDS.items():
            for checkout in checkouts:
                spent, code, errors = run(arguments, checkout)
                if code != EXIT_CODES.get(name, 0):
                    raise SystemExit(f"{name} in {checkout} ended with {code}:\n{errors}")
                if number:
                    seconds[name, checkout].append(spent)
    return seconds


def print_table(head: list[str], rows: list[list[str]]) -> None:
    """A Markdown table."""
    for row in [head, ["---"] * len(head), *rows]:
        print("| " + " | ".join(row) + " |")


def main() -> None:
    """Print both tables; see the top of the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="timed runs of every command")
    parser.add_argument("--other", type=Path, help="another checkout, measured alternately")
    options = parser.parse_args()
    own = Path(__file__).resolve().parents[1]
    checkouts = [own] if options.other is None else [options.other.resolve(), own]
    titles = ["this checkout"] if options.other is None else ["other checkout", "this checkout"]
    print(f"{options.runs} runs, load {os.getloadavg()[0]:.1f} at the start", end="", flush=True)
    seconds = measure(checkouts, options.runs)
    print(f" and {os.getloadavg()[0]:.1f} at the end\n")
    print_table(
        ["median seconds (fastest)", *titles],
        [
            [name, *(f"{statistics.median(s):.2f} ({min(s):.2f})" for s in (seconds[name, c] for c in checkouts))]
            for name in COMMANDS
        ],
    )
    for checkout, title in zip(checkouts, titles, strict=True):
        print(f"\nImported modules, {title}:\n")
        counts = {name: imported_modules(arguments, checkout) for name, arguments in COMMANDS.items()}
        total = sum(counts.values(), Counter())
        packages = [name for name, _ in total.most_common(TOP)]
        print_table(
            ["command", *packages, "others", "together"],
            [
                [
                    name,
                    *(str(found[package]) for package in packages),
                    str(found.total() - sum(found[package] for package in packages)),
                    str(found.total()),
                ]
                for name, found in counts.items()
            ],
        )


if __name__ == "__main__":
    main()
