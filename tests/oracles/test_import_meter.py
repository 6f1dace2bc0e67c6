"""Imported METER against an oracle of our own, written from the paper and the key names; see `oracles.meter`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.import_parity import LIMIT, difference, images, import_folder, texts
from oracles.meter import Meter
from tiny import randomize

from mmbert.errors import UsageError

WORDS = texts(pad=1)


def imported(other: Meter, folder: Path, extra: dict[str, Any] | None = None, **options: Any) -> Any:
    """Save as Lightning does, with CLIP's text tower, which METER keeps without reading it, and import the file."""
    randomize(other)
    state = {**other.eval().state_dict(), "vit_model.token_embedding.weight": torch.zeros(4, 4), **(extra or {})}
    (folder / "theirs").mkdir()
    torch.save({"state_dict": state, "hyper_parameters": {"vit": "ViT-B/16"}}, folder / "theirs/meter.ckpt")
    return import_folder(folder, **options)


def both(own: Any, other: Meter) -> tuple[Any, dict[str, torch.Tensor]]:
    with torch.no_grad():
        return own(**WORDS, pixel_values=images()), other(**WORDS, pixel_values=images())


def test_pretraining(tmp_path: Path) -> None:
    other = Meter(heads="pretraining")
    own, expected = both(imported(other, tmp_path), other)
    assert difference(own.mlm_logits, expected["mlm"], WORDS["attention_mask"]) < LIMIT
    assert difference(own.itm_logits, expected["itm"]) < LIMIT


def test_retrieval(tmp_path: Path) -> None:
    other = Meter(heads="retrieval")
    own, expected = both(imported(other, tmp_path), other)
    assert difference(own.itm_logits[:, 1] - own.itm_logits[:, 0], expected["score"]) < LIMIT


@pytest.mark.parametrize("classifier", ["vqa_classifier", "snli_classifier"])
def test_classifiers(classifier: str, tmp_path: Path) -> None:
    other = Meter(heads=classifier)
    model = imported(other, tmp_path, labels=["yes", "no", "maybe"])
    own, expected = both(model, other)
    assert difference(own.logits, expected["logits"]) < LIMIT
    assert model.config.labels == ["yes", "no", "maybe"]


def test_types_of_the_second_image_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="METER's NLVR2 adds another type vector"):
        imported(Meter(heads="pretraining"), tmp_path, {"nlvr2_classifier.0.weight": torch.zeros(1)})
