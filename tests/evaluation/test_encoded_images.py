"""An evaluation encodes each image once, as right and as wrong image, and gives the same numbers."""

from typing import Any

import pytest
import torch
from tiny import difference, tiny_batch, tiny_config
from torch import Tensor

from mmbert.evaluation.encoded_images import EncodedImages
from mmbert.evaluation.pairs import PairEvaluation
from mmbert.model.modeling import MMBertForPreTraining, MMBertModel


@pytest.fixture(scope="module")
def model() -> MMBertModel:
    torch.manual_seed(0)
    return MMBertModel(tiny_config(fusion="hybrid_bridge", image_layers=2, fusion_layers=2)).eval().double()


@pytest.mark.parametrize("max_bytes", [0, 20_000, 1 << 30])
@torch.no_grad()
def test_images_are_encoded_once_unless_memory_is_short(model: MMBertModel, max_bytes: int) -> None:
    found = EncodedImages(model, max_bytes=max_bytes)
    images = tiny_batch(8, dtype=torch.float64)["pixel_values"]
    # 5 tokens of 32 + 24 fp64 numbers: 2,240 bytes an image, so 8 of them fit into 20,000.
    for rows in ([0, 1, 2, 1], [2, 3, 0, 4], [5, 6, 7, 5], [0, 4, 7, 7]):
        batch = {"pixel_values": images[rows]}
        got, expected = found.encode(batch), model.encode_image(images[rows])
        for a, b in zip((got[0], *got.intermediate), (expected[0], *expected.intermediate), strict=True):
            assert difference(a, b) < 1e-12
        assert got.mask.all() and got.mask.shape == expected.mask.shape
    assert found.num_encoded == (8 if max_bytes else 3 + 4 + 3 + 3)


@torch.no_grad()
def test_right_and_wrong_images_share_their_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = MMBertForPreTraining(tiny_config()).eval()
    sizes: list[int] = []
    original = MMBertModel.encode_image

    def counting(self: MMBertModel, pixel_values: Tensor, *more: Any) -> object:
        sizes.append(len(pixel_values))
        return original(self, pixel_values, *more)

    monkeypatch.setattr(MMBertModel, "encode_image", counting)
    evaluation, batch = PairEvaluation(model, frozenset()), tiny_batch(6)
    for rows in ([0, 1, 2], [3, 4, 5]):
        part = {key: value[rows] for key, value in batch.items()}
        evaluation.step({**part, "wrong_pixel_values": batch["pixel_values"].roll(1, 0)[rows]})
    assert sum(sizes) == 6
