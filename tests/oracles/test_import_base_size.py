"""Imports in the sizes of the published checkpoints: default configurations of transformers, with random weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.import_parity import LIMIT, difference, images, import_folder, texts
from tiers import FULL
from transformers import (
    BertConfig,
    BlipConfig,
    BlipForImageTextRetrieval,
    BridgeTowerConfig,
    BridgeTowerForImageAndTextRetrieval,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    FlavaConfig,
    FlavaForPreTraining,
    ViltConfig,
    ViltForQuestionAnswering,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    VisualBertConfig,
    VisualBertForQuestionAnswering,
)

pytestmark = pytest.mark.skipif(not FULL, reason="100 to 300 million parameters; MMBERT_FULL=1 runs it")

WORDS = texts(2, 12, vocabulary=30_000, pad=1)


def imported(other: Any, folder: Path) -> Any:
    """Import with the weights of the library's initialisation, and small biases and scales, which it leaves at 0 and 1.

    Its standard deviations keep the activations of 12 layers in range; the tiny tests draw all weights anew.
    """
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    other.eval().save_pretrained(folder / "theirs")
    return import_folder(folder)


@torch.no_grad()
def test_vilt(tmp_path: Path) -> None:
    other = ViltForQuestionAnswering(ViltConfig(num_labels=3129, pad_token_id=1))
    pixels = images(2, 384)
    own = imported(other, tmp_path)(**WORDS, pixel_values=pixels).logits
    assert difference(own, other(**WORDS, pixel_values=pixels).logits) < LIMIT


@torch.no_grad()
def test_visualbert(tmp_path: Path) -> None:
    other = VisualBertForQuestionAnswering(VisualBertConfig(num_labels=3129, visual_embedding_dim=2048))
    regions = torch.randn(2, 36, 2048)
    own = imported(other, tmp_path)(**WORDS, pixel_values=regions).logits
    assert difference(own, other(**WORDS, visual_embeds=regions).logits) < LIMIT


@torch.no_grad()
def test_bridgetower(tmp_path: Path) -> None:
    other = BridgeTowerForImageAndTextRetrieval(BridgeTowerConfig(initializer_factor=0.4))
    pixels = images(2, 288)
    own = imported(other, tmp_path)(**WORDS, pixel_values=pixels).itm_logits
    assert difference(own, other(**WORDS, pixel_values=pixels).logits) < LIMIT


@torch.no_grad()
def test_vision_text_dual_encoder(tmp_path: Path) -> None:
    towers = CLIPVisionConfig(patch_size=32), BertConfig(pad_token_id=1)
    other = VisionTextDualEncoderModel(VisionTextDualEncoderConfig.from_vision_text_configs(*towers))
    pixels = images(2, 224)
    own = imported(other, tmp_path)(**WORDS, pixel_values=pixels).logits_per_text
    assert difference(own, other(**WORDS, pixel_values=pixels).logits_per_text) < LIMIT


@torch.no_grad()
def test_clip(tmp_path: Path) -> None:
    other = CLIPModel(CLIPConfig())
    end = other.config.text_config.eos_token_id
    lengths = WORDS["attention_mask"].sum(dim=1, keepdim=True)
    words = {**WORDS, "input_ids": WORDS["input_ids"].scatter(1, lengths - 1, end)}
    pixels = images(2, 224)
    own = imported(other, tmp_path)(**words, pixel_values=pixels).logits_per_text
    assert difference(own, other(**words, pixel_values=pixels).logits_per_text) < LIMIT


@torch.no_grad()
def test_blip(tmp_path: Path) -> None:
    text = {"num_attention_heads": 12, "pad_token_id": 1}
    other = BlipForImageTextRetrieval(BlipConfig(text_config=text, vision_config={"initializer_range": 0.02}))
    pixels = images(2, 384)
    own = imported(other, tmp_path)(**WORDS, pixel_values=pixels).itm_logits
    assert difference(own, other(**WORDS, pixel_values=pixels).itm_score) < LIMIT


@torch.no_grad()
def test_flava(tmp_path: Path) -> None:
    other = FlavaForPreTraining(FlavaConfig(init_codebook=False, text_config={"pad_token_id": 1}))
    pixels = images(2, 224)
    own, expected = (
        imported(other, tmp_path)(**WORDS, pixel_values=pixels),
        other(**WORDS, pixel_values=pixels, return_loss=False),
    )
    for name, theirs in (("mlm_logits", expected.mmm_text_logits), ("itm_logits", expected.itm_logits)):
        assert difference(own[name], theirs, WORDS["attention_mask"] if name == "mlm_logits" else None) < LIMIT
    assert difference(own.logits_per_text, expected.contrastive_logits_per_text) < LIMIT
