"""Make the tokenizer for easy-VQA from its training questions; the package `easy-vqa` has the images and questions."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "shapes"))

from wordpiece import write_tokenizer  # noqa: E402


def main() -> None:
    """Write the tokenizer."""
    parser = argparse.ArgumentParser(description="Make the tokenizer for easy-VQA from its training questions.")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to")
    args = parser.parse_args()
    package = importlib.util.find_spec("easy_vqa")  # looked up, never imported
    if package is None or not package.submodule_search_locations:
        sys.exit("the package easy-vqa is not installed: pip install 'mmbert[easy-vqa]'")
    folder = Path(next(iter(package.submodule_search_locations)))
    questions = json.loads((folder / "data/train/questions.json").read_text(encoding="utf-8"))
    size = write_tokenizer(args.out / "tokenizer", (question for question, _, _ in questions))
    print(f"{len(questions)} questions, {size} tokens -> {args.out / 'tokenizer'}")


if __name__ == "__main__":
    main()
