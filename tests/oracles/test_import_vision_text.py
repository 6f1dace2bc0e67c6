"""Imported VisionTextDualEncoder against transformers, with padded texts, for each pair of encoders."""

from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.import_parity import LIMIT, difference, images, import_folder, import_model, texts
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    CLIPVisionConfig,
    DeiTConfig,
    RobertaConfig,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTConfig,
)

from mmbert.errors import UsageError

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
WORDS = {"vocab_size": 40, "max_position_embeddings": 18}
SQUARE = {"image_size": 16, "patch_size": 8}


def theirs(image: Any = CLIPVisionConfig, text: Any = BertConfig, *, widths: tuple[int, int] = (48, 32)) -> Any:
    """A model with images of width `widths`[0] and texts of width `widths`[1]."""
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        image(**SIZES, **SQUARE, hidden_size=widths[0]), text(**SIZES, **WORDS, hidden_size=widths[1])
    )
    config.projection_dim = 24
    return VisionTextDualEncoderModel(config)


@pytest.mark.parametrize(
    ("image", "text", "widths", "pooler"),
    [
        (CLIPVisionConfig, BertConfig, (48, 32), "text"),
        (ViTConfig, BertConfig, (32, 32), "both"),
        (ViTConfig, RobertaConfig, (32, 48), "both"),
    ],
)
@torch.no_grad()
def test_contrastive(image: Any, text: Any, widths: tuple[int, int], pooler: str, tmp_path: Path) -> None:
    other = theirs(image, text, widths=widths)
    words = texts(pad=1 if text is RobertaConfig else 0)
    model = import_model(other, tmp_path)
    own, expected = model(**words, pixel_values=images()), other(**words, pixel_values=images())
    assert difference(own.logits_per_text, expected.logits_per_text) < LIMIT
    assert difference(own.logits_per_image, expected.logits_per_image) < LIMIT
    itc, body = model.objectives["itc"], model.mmbert
    assert difference(itc.embed_text(body.encode_text(**words)), expected.text_embeds) < LIMIT
    assert difference(itc.embed_image(body.encode_image(images())), expected.image_embeds) < LIMIT
    assert model.config.objectives["itc"]["pooler"] == pooler


def test_files_of_older_versions_of_transformers(tmp_path: Path) -> None:
    other = theirs()
    model = import_model(other, tmp_path / "new")
    folder = tmp_path / "old"
    other.save_pretrained(folder / "theirs")
    state = load_file(folder / "theirs/model.safetensors")
    nested = {k.replace("vision_model.", "vision_model.vision_model.", 1): v for k, v in state.items()}
    nested["text_model.embeddings.position_ids"] = torch.arange(18)
    save_file(nested, folder / "theirs/model.safetensors", metadata={"format": "pt"})
    again, fresh = import_folder(folder).state_dict(), {"mmbert.fusion.absent_text", "mmbert.fusion.absent_image"}
    assert all(torch.equal(again[k], v) for k, v in model.state_dict().items() if k not in fresh)


def test_other_encoders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="an encoder of type 'deit'; of VisionTextDualEncoder mmbert imports clip_vis"):
        import_model(theirs(DeiTConfig), tmp_path)
