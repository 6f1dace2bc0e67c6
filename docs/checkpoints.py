"""Write docs/checkpoints.md: each published checkpoint and head, with its parity or the reason why it has none.

    PYTHONPATH=tests python docs/checkpoints.py

Runs the tests tests/oracles/test_import_*.py and takes the largest difference that each of them compared.
"""

import collections
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/checkpoints.md"


class Row(NamedTuple):
    """A head of a family of checkpoints."""

    family: str
    head: str
    test: str  # file::function that compares it; "" where it is not imported
    note: str = ""  # what differs, or the reason why it is not imported


VISUALBERT, ALBEF, BRIDGETOWER, VILT, METER, BLIP, CLIP, VISION_TEXT, FLAVA = (
    f"test_import_{name}.py::"
    for name in ("visualbert", "albef", "bridgetower", "vilt", "meter", "blip", "clip", "vision_text", "flava")
)
ROWS = [
    Row("VisualBERT", "none", VISUALBERT + "test_model_without_heads", "region features in place of images"),
    Row("VisualBERT", "pre-training: MLM, ITM", VISUALBERT + "test_pretraining_heads"),
    Row("VisualBERT", "VQA, NLVR2", VISUALBERT + "test_task_heads", "NLVR2: regions of both images in one sequence"),
    Row("VisualBERT", "multiple choice (VCR)", "", "mmbert has no task with choices"),
    Row("VisualBERT", "`image_text_alignment`, phrase grounding", "", "they align single regions with single words: "
        "positions and 2-D attention masks for each region, which a batch does not have"),
    Row("ALBEF", "pre-training: MLM, ITM, ITC; retrieval", ALBEF + "test_pretraining_and_retrieval",
        "against an oracle of our own, written from the paper and the key names"),
    Row("ALBEF", "visual entailment", ALBEF + "test_entailment", "same oracle"),
    Row("ALBEF", "VQA", "", "generates answers with a decoder"),
    Row("ALBEF", "NLVR2", "", "attends to two images in each layer, with doubled cross-attention"),
    Row("BridgeTower", "none", BRIDGETOWER + "test_model_without_heads"),
    Row("BridgeTower", "MLM", BRIDGETOWER + "test_masked_language_modeling"),
    Row("BridgeTower", "ITM", BRIDGETOWER + "test_image_text_matching"),
    Row("BridgeTower", "contrastive", BRIDGETOWER + "test_contrastive_heads",
        "text and image vectors; the head of joint vectors, which is read in training only, is left out"),
    Row("ViLT", "none", VILT + "test_model_without_heads", "square images: an image is resized to a square, where ViLT "
        "keeps its shape, pads it and interpolates the positions"),
    Row("ViLT", "MLM", VILT + "test_masked_language_modeling", "as above"),
    Row("ViLT", "VQA", VILT + "test_question_answering", "as above"),
    Row("ViLT", "retrieval", VILT + "test_retrieval", "as above; its one score is the log-odds of the head of itm"),
    Row("ViLT", "NLVR2", VILT + "test_two_images_with_types_of_their_own", "as above"),
    Row("ViLT", "token classification", "", "mmbert has no such head"),
    Row("CLIP", "contrastive", CLIP + "test_contrastive", "an image is resized to a square, where CLIP crops it"),
    Row("CLIP", "image classification", "", "mmbert's tasks read a text"),
    Row("VisionTextDualEncoder", "contrastive", VISION_TEXT + "test_contrastive",
        "of BERT or RoBERTa with CLIP's ViT or a ViT; images as of CLIP"),
    Row("VisionTextDualEncoder", "contrastive, with other encoders", "", "mmbert's text encoders are BERT and RoBERTa, "
        "and its import maps the names of these ViTs only"),
    Row("BLIP", "retrieval: ITM, contrastive", BLIP + "test_retrieval", "the temperature of itc, which these files "
        "lack, starts anew"),
    Row("BLIP", "the same with a ViT-L", "", "its cross-attention reads an image encoder that is wider than the texts"),
    Row("BLIP", "captions, VQA", "", "generate texts with a decoder"),
    Row("METER", "pre-training: MLM, ITM", METER + "test_pretraining",
        "with CLIP's ViT; against an oracle of our own, written from the paper and the key names"),
    Row("METER", "retrieval", METER + "test_retrieval",
        "same oracle; its one score is the log-odds of the head of itm"),
    Row("METER", "VQA, visual entailment", METER + "test_classifiers", "same oracle; name the labels by `--labels`"),
    Row("METER", "NLVR2", "", "adds another type vector to the second image, which `hybrid` does not have"),
    Row("METER", "with a Swin transformer", "", "mmbert's image encoders are ViTs"),
    Row("FLAVA", "none but the contrastive one", FLAVA + "test_model_without_heads",
        "joint states and vector, outputs and contrastive vectors of both encoders"),
    Row("FLAVA", "pre-training: MLM and ITM of pairs, contrastive", FLAVA + "test_pretraining_heads"),
    Row("FLAVA", "MLM of texts alone", "", "mmbert's head for MLM reads the fusion, here that of `mmm_text_head`"),
    Row("FLAVA", "masked image modeling, codebook", "", "mmbert predicts no codes of image patches"),
]  # fmt: skip

HEAD = """# Published checkpoints

`mmbert import SOURCE OUT` converts a checkpoint of another project to a folder that `mmbert.load` and the Auto classes
of transformers read. SOURCE is a folder, a file of weights, or a name on the hub:

```bash
mmbert import dandelin/vilt-b32-finetuned-vqa runs/vilt
mmbert ask runs/vilt image.jpg "what color is the bus?"
mmbert import ALBEF.pth runs/albef --tokenizer google-bert/bert-base-uncased
```

It prints a table of tensors: matched, resized (positions, with `--image_size`), missing, new, unused. A checkpoint that
does not match completely is imported with `--partial` only; what it lacks is then newly initialised. `--labels FILE`
names the classes of a head that the checkpoint only numbers. Weights are read from safetensors, or from a pickle of
tensors (`weights_only`); code in a pickle is not executed. OUT appears complete or not at all; its `import.json` lists
what became of each tensor.

## Parity

Largest absolute difference of any output in fp32, with random weights in the architecture of the original (tiny: 2 to 4
layers), random inputs and padded texts. The original is transformers' model, if nothing else is said; allowed is 1e-5.
No trained checkpoint was imported: the project's tests have no network.

| checkpoint | head | difference | remarks, or why it is not imported |
|---|---|---|---|
"""

FOOT = """
Dropout is not part of a checkpoint: fine-tuning starts with mmbert's defaults (`model.hidden_dropout_prob`).

This page is written by `PYTHONPATH=tests python docs/checkpoints.py`, which runs `tests/oracles/test_import_*.py`.
"""


class Recorder:
    """Pytest plugin that keeps the largest difference that each test compared."""

    def __init__(self) -> None:
        self.found: dict[str, float] = collections.defaultdict(float)
        self.current = ""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(self, item: Any) -> None:
        """Remember the test, and wrap the `difference` that its module imported."""
        self.current = f"{item.path.name}::{item.originalname}"
        module = item.module
        if not hasattr(module, "unrecorded"):
            module.unrecorded = module.difference
            module.difference = self.wrapped(module.unrecorded)

    def wrapped(self, difference: Any) -> Any:
        """Return a function that also records what `difference` returns, if it is within the limit of a test."""

        def record(*arguments: Any) -> float:
            value = difference(*arguments)
            if value < 1e-5:  # larger ones show that another input changes the output
                self.found[self.current] = max(self.found[self.current], value)
            return value

        return record


def page(found: dict[str, float]) -> str:
    """Format the page."""
    lines = []
    for row in ROWS:
        value = f"{found[row.test]:.1e}" if row.test else "-"
        lines.append(f"| {row.family} | {row.head} | {value} | {row.note} |")
    return HEAD + "\n".join(lines) + "\n" + FOOT


def main() -> None:
    """Run the tests and write the page; a failing test writes nothing."""
    recorder = Recorder()
    files = sorted(str(file) for file in (ROOT / "tests/oracles").glob("test_import_*.py"))
    with tempfile.TemporaryDirectory() as folder:
        code = pytest.main(["-q", "-p", "no:cacheprovider", f"--basetemp={folder}/tests", *files], plugins=[recorder])
    if code:
        sys.exit(int(code))
    PAGE.write_text(page(recorder.found), encoding="utf-8")


if __name__ == "__main__":
    main()
