"""Makes the tokenizer for easy-VQA from its training questions; the package `easy-vqa` brings everything else."""

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "shapes"))

from wordpiece import write_tokenizer  # noqa: E402

from mmbert.data.readers.easy_vqa import package_folder  # noqa: E402

if __name__ == "__main__":
    questions = json.loads((package_folder() / "train/questions.json").read_text())
    size = write_tokenizer(HERE / "tokenizer", (question for question, _, _ in questions))
    print(f"{len(questions)} questions, {size} tokens -> {HERE / 'tokenizer'}")
