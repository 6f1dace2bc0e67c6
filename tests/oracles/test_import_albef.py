"""Imported ALBEF against an oracle of our own, written from the paper and the key names; see `oracles.albef`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.albef import Albef
from oracles.import_parity import LIMIT, difference, images, import_folder, texts
from tiny import randomize

from mmbert.errors import UsageError


def imported(other: Albef, folder: Path, extra: dict[str, Any] | None = None, **options: Any) -> Any:
    """Save as the authors' training does, with momentum model and queues, and import the file."""
    randomize(other)
    with torch.no_grad():
        if hasattr(other, "temp"):
            other.temp.fill_(0.05)
    state = {name: value for name, value in other.eval().state_dict().items() if name != "text_encoder.cls.x"}
    momentum = {f"visual_encoder_m.{name}": value for name, value in other.visual_encoder.state_dict().items()}
    queues = {"image_queue": torch.zeros(16, 4), "queue_ptr": torch.zeros(1, dtype=torch.int64)}
    (folder / "theirs").mkdir()
    torch.save({"model": {**state, **momentum, **queues, **(extra or {})}, "epoch": 3}, folder / "theirs/ALBEF.pth")
    return import_folder(folder, **options)


def both(own: Any, other: Albef) -> tuple[Any, dict[str, torch.Tensor]]:
    words = texts()
    with torch.no_grad():
        return own(**words, pixel_values=images()), other(**words, pixel_values=images())


@pytest.mark.parametrize("heads", ["pretraining", "retrieval"])
def test_pretraining_and_retrieval(heads: str, tmp_path: Path) -> None:
    other = Albef(heads=heads)
    own, expected = both(imported(other, tmp_path), other)
    assert difference(own.itm_logits, expected["itm"]) < LIMIT
    temperature = other.temp.item()  # 1 / 14: the logits are large, and fp32 sums to 1e-5 of them
    assert difference(own.logits_per_text * temperature, expected["itc"] * temperature) < LIMIT
    if heads == "pretraining":
        assert difference(own.mlm_logits, expected["mlm"], texts()["attention_mask"]) < LIMIT


def test_entailment(tmp_path: Path) -> None:
    other = Albef(heads="entailment")
    model = imported(other, tmp_path)
    own, expected = both(model, other)
    assert difference(own.logits, expected["logits"]) < LIMIT
    assert model.config.labels == ["contradiction", "neutral", "entailment"]


def test_positions_are_resized_to_another_image_size(tmp_path: Path) -> None:
    model = imported(Albef(heads="retrieval"), tmp_path, image_size=32)
    assert model.mmbert.image_encoder.vit.pos_embed.shape == (1, 17, 128)
    assert model(**texts(), pixel_values=images(side=32)).itm_logits.isfinite().all()


def test_the_answer_decoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="ALBEF's VQA generates answers with a decoder"):
        imported(Albef(heads="entailment"), tmp_path, {"text_decoder.bert.x": torch.zeros(1)})
