"""Masked image modelling: the loss by hand, what is masked for every kind of image encoder, and what is refused."""

import copy
from typing import Any

import pytest
import torch
from tiers import FULL
from tiny import difference, randomize, tiny_batch, tiny_config
from torch import Tensor

from mmbert.compare.cost import flops_per_step
from mmbert.errors import UsageError
from mmbert.model.fusion import FUSIONS
from mmbert.model.modeling import MMBertForPreTraining
from mmbert.model.objectives.mim import MaskedImageModeling

ENCODERS: dict[str, dict[str, Any]] = {
    "class token": {},
    "no class token": {"image_model": "vit_relpos_small_patch16_224"},
    "registers": {"image_model": "vit_medium_patch16_reg4_gap_256"},
    "distilled": {"image_model": "deit_tiny_distilled_patch16_224"},
    "patches as rows and columns": {"image_model": "vit_small_patch16_dinov3"},
    "convolutional stem": {"image_model": "vit_tiny_r_s16_p8_224", "patch_size": 4, "image_size": 64},
    "another stem": {
        **{"image_model": "vit_base_mci_224", "patch_size": None, "image_size": 64},
        **{"image_hidden_size": None, "image_num_attention_heads": None},
    },
}
every_encoder = pytest.mark.parametrize("encoder", ENCODERS)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def built(options: Any = 1.0, *, others: dict | None = None, **overrides: object) -> MMBertForPreTraining:
    """A random model with the objective mim, without dropout."""
    torch.manual_seed(0)
    model = MMBertForPreTraining(tiny_config(objectives={**(others or {}), "mim": options}, **overrides)).eval()
    randomize(model)
    return model


def mim_of(model: MMBertForPreTraining) -> MaskedImageModeling:
    objective = model.objectives["mim"]
    assert isinstance(objective, MaskedImageModeling)
    return objective


def predictions(model: MMBertForPreTraining, batch: dict[str, Tensor], seed: int = 0) -> Tensor:
    """The predicted pixels of the masked patches, (K, 3 * pixels)."""
    found: list[Tensor] = []
    hook = mim_of(model).head.register_forward_hook(lambda module, args, output: found.append(output.detach()))
    model(**batch, generator=seeded(seed))
    hook.remove()
    return found[0]


# --- the loss ------------------------------------------------------------------------------------------------------


def test_loss_is_the_l1_distance_to_the_pixels_of_masked_patches() -> None:
    """Oracle: one image at a time through the parts of the ViT, and one patch at a time cut out of the image."""
    model, batch = built(), tiny_batch()
    output = model(**batch, generator=seeded(5)).objectives["mim"]
    vit: Any = model.mmbert.image_encoder.vit
    drawn = torch.rand(4, 4, generator=seeded(5), dtype=torch.float64)
    losses = []
    with torch.no_grad():
        for row in range(4):
            image, masked = batch["pixel_values"][row], drawn[row].topk(2, largest=False).indices.tolist()
            states = vit.patch_embed(image[None])
            for patch in masked:
                states[0, patch] = mim_of(model).mask_token
            states = vit.norm(vit.blocks(vit._pos_embed(states)))[0, 1:]
            for patch in masked:
                top, left = patch // 2 * 8, patch % 2 * 8
                target = image[:, top : top + 8, left : left + 8].flatten()
                predicted = mim_of(model).head(model.mmbert.image_projection(states[patch]))
                losses.append(float((predicted - target).abs().mean()))
    assert len(losses) == 8 == len(output.targets)
    assert float(output.loss.detach()) == pytest.approx(sum(losses) / 8, rel=1e-5)


def test_accuracy_compares_with_the_mean_color_of_visible_patches() -> None:
    """Two patches of four are masked. The prediction is 1 everywhere, and the first image is 1 where it is masked."""
    model, batch = built(), tiny_batch(2)
    masks = mim_of(model).draw_masks(batch["pixel_values"], seeded())
    assert masks.shape == (2, 2, 2)
    hidden = masks.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)[:, None]
    batch["pixel_values"] = torch.where(hidden, 1.0, 3.0).expand(2, 3, 16, 16).clone()
    batch["pixel_values"][1] = torch.where(hidden[1], 3.0, 3.5)
    with torch.no_grad():
        mim_of(model).head.weight.zero_()
        mim_of(model).head.bias.fill_(1.0)
    output = model(**batch, generator=seeded()).objectives["mim"]
    torch.testing.assert_close(output.logits, torch.tensor([[-2.0, 0], [-2, 0], [-0.5, -2], [-0.5, -2]]))
    assert output.targets.tolist() == [1] * 4 and output.left_out == 0 and output.loss == 1


@every_encoder
def test_masked_pixels_are_not_seen_and_alone_are_predicted(encoder: str) -> None:
    """Whatever stands in masked patches, the predictions are the same; they follow from the visible ones."""
    model = built(**ENCODERS[encoder])
    size = model.config.image_size
    batch = tiny_batch(3, image_size=size)
    side, pixels, _ = mim_of(model).grid
    assert side * pixels == size
    masks = mim_of(model).draw_masks(batch["pixel_values"], seeded())
    hidden = masks.repeat_interleave(pixels, dim=1).repeat_interleave(pixels, dim=2)[:, None]
    expected = predictions(model, batch)
    other = torch.randn(3, 3, size, size, generator=seeded(1))
    in_masked = {**batch, "pixel_values": torch.where(hidden, other, batch["pixel_values"])}
    in_visible = {**batch, "pixel_values": torch.where(hidden, batch["pixel_values"], other)}
    assert torch.equal(predictions(model, in_masked), expected)
    changed = (predictions(model, in_visible) - expected).abs().amax(dim=1)
    assert len(changed) == masks.sum() and changed.min() > 1e-7
    # Targets are the pixels at the place of each prediction.
    with torch.no_grad():
        mim_of(model).head.weight.zero_()
        mim_of(model).head.bias.zero_()
    loss = model(**batch, generator=seeded()).loss.detach()
    torch.testing.assert_close(loss, batch["pixel_values"].abs()[hidden.expand(-1, 3, -1, -1)].mean())


def test_targets_stand_in_the_order_of_the_mask() -> None:
    objective = mim_of(built())
    image = torch.arange(4.0).view(1, 1, 2, 2).repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    patches = objective.split_patches(torch.cat([image, image + 10, image + 20], dim=1))
    assert patches.shape == (1, 4, 3, 64)
    assert patches[0, :, :, 0].tolist() == [[0, 10, 20], [1, 11, 21], [2, 12, 22], [3, 13, 23]]
    assert torch.equal(patches, patches[..., :1].expand_as(patches))


@every_encoder
def test_gradient_reaches_the_mask_token_and_the_whole_image_encoder(encoder: str) -> None:
    model = built(others={"mlm": 1.0, "itm": 1.0}, **ENCODERS[encoder])
    output = model(**tiny_batch(image_size=model.config.image_size), generator=seeded(), only="mim")
    assert [*output.objectives] == ["mim"]
    output.loss.backward()
    assert mim_of(model).mask_token.grad.abs().min() > 0  # pyright: ignore[reportOptionalMemberAccess]
    touched = {name.split(".")[1] for name, p in model.named_parameters() if p.grad is not None}
    assert touched - {"image_projection"} == {"image_encoder", "mim"}
    assert [name for name, p in model.mmbert.image_encoder.named_parameters() if p.grad is None] == []


def test_other_encodings_of_the_step_see_the_whole_image() -> None:
    """The mask ends with the objective, be it by an error."""
    alone, beside = built(others={"itm": 1.0}), built(others={"itm": 1.0})
    expected = alone.mmbert.encode_image(tiny_batch()["pixel_values"]).hidden_states
    beside(**tiny_batch(), generator=seeded(), only="mim")
    assert torch.equal(beside.mmbert.encode_image(tiny_batch()["pixel_values"]).hidden_states, expected)
    with pytest.raises(UsageError, match=r"pixel_values has shape \(4, 3, 8, 8\)"):
        beside.mmbert.encode_masked_image(torch.zeros(4, 3, 8, 8), torch.zeros(4, 4).bool(), torch.zeros(24))
    assert torch.equal(beside.mmbert.encode_image(tiny_batch()["pixel_values"]).hidden_states, expected)


@pytest.mark.skipif(not FULL, reason="tracing takes several seconds: the full tier only")
def test_compiled_model_masks_anew_in_every_step() -> None:
    model = built(others={"mlm": 1.0, "itm": 1.0})
    expected = [model(**tiny_batch(), generator=seeded(step)).loss.detach() for step in range(3)]
    compiled = [copy.deepcopy(model), copy.deepcopy(model)]
    compiled[0].compile(dynamic=True, backend="eager")
    # Compiled alone, and called without a mask first, it would not notice the hook that masks.
    compiled[1].mmbert.image_encoder.compile(dynamic=True, backend="eager")
    for built_again in compiled:
        built_again.mmbert.encode_image(tiny_batch()["pixel_values"])
        for step, value in enumerate(expected):
            torch.testing.assert_close(built_again(**tiny_batch(), generator=seeded(step)).loss.detach(), value)


def test_step_of_mim_alone_costs_the_same_for_every_fusion() -> None:
    costs = {flops_per_step(built(fusion=fusion).train(), [tiny_batch()], only="mim") for fusion in FUSIONS}
    assert len(costs) == 1 and min(costs) > 0


# --- the mask ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 10),  # 0.6 of 16
        ({"mask_ratio": 0.25}, 4),
        ({"mask_ratio": 0.001}, 1),
        ({"mask_ratio": 0.999}, 15),
        ({"mask_size": 2}, 8),  # two of four squares of 2 x 2 patches
        ({"mask_size": 2, "mask_ratio": 0.75}, 12),
    ],
)
def test_each_image_has_the_fraction_of_masked_patches(options: dict, count: int) -> None:
    objective = mim_of(built(options, patch_size=4))
    masks = objective.draw_masks(torch.zeros(400, 3, 16, 16), seeded())
    assert masks.shape == (400, 4, 4) and set(masks.sum(dim=(1, 2)).tolist()) == {count}
    often = masks.double().mean(dim=0)
    assert difference(often, torch.full_like(often, count / 16)) < 0.1, "no patch is preferred"
    size = objective.mask_size
    squares = masks.unflatten(2, (-1, size)).unflatten(1, (-1, size)).double().mean(dim=(2, 4))
    assert set(squares.unique().tolist()) == {0.0, 1.0}, "squares are masked as a whole"


def test_mask_follows_from_the_generator_alone() -> None:
    """So it depends on seed and step; tests/contracts/test_two_processes.py has that it does not on processes."""
    model, images = built(patch_size=4), torch.zeros(4, 3, 16, 16)
    first, again, next_step = (mim_of(model).draw_masks(images, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, next_step)
    assert not torch.equal(first[0], first[1])


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "overrides", "message"),
    [
        ({"mask_ratio": 1}, {}, r"objectives\.mim\.mask_ratio=1: a fraction above 0, below 1"),
        ({"mask_ratio": True}, {}, r"objectives\.mim\.mask_ratio=True: a fraction"),
        ({"mask_size": 0}, {}, r"objectives\.mim\.mask_size=0: must be a whole number of 1 or more"),
        ({"mask_size": 2}, {}, r"mask_size=2: the image has 2 x 2 patches, and squares .* divide them into 4 or more"),
        ({"mask_size": 3}, {"patch_size": 4}, r"mask_size=3: the image has 4 x 4 patches"),
        ({"mask_rate": 0.5}, {}, r"objectives\.mim: no option 'mask_rate'; .*Did you mean 'mask_ratio'"),
        ({}, {"image_layers": 0, "fusion": "early"}, r"with image_layers=0 masked patches can't see the visible ones"),
        ({}, {"image_layers": 0, "image_features": 8, "fusion": "early"}, r"image_features=8 .* region features"),
        (
            {},
            {"image_model": "xcit_nano_12_p8_224", "patch_size": None, "image_size": 32},
            r"a Xcit can't be masked: for an image of 32 x 32 pixels .* returns a tuple instead of one vector",
        ),
    ],
)
def test_options_and_encoders_that_are_not_allowed_are_named(options: dict, overrides: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        built(options, **overrides)


@pytest.mark.parametrize("frozen", ["all", 1])
def test_frozen_image_encoder_is_an_error(frozen: str | int) -> None:
    model = built()
    model.mmbert.image_encoder.freeze(frozen)
    message = f"mim trains the image encoder from its first layer on, but optim.freeze_image={frozen}: leave one"
    with pytest.raises(UsageError, match=message):
        model(**tiny_batch(), generator=seeded())


def test_images_of_another_size_are_an_error() -> None:
    with pytest.raises(UsageError, match=r"pixel_values has shape \(4, 3, 24, 24\); this model takes \(B, 3, 16, 16\)"):
        built()(**tiny_batch(image_size=24), generator=seeded())


def test_cached_outputs_in_place_of_images_are_an_error() -> None:
    batch = tiny_batch()
    del batch["pixel_values"]
    with pytest.raises(UsageError, match=r"mim predicts pixels, but the batch has no images: .*\(data\.cache\)"):
        built()(**batch, image_hidden_states=torch.zeros(4, 5, 24))
