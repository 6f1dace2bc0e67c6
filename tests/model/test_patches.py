"""The projection of patches as a matrix product equals the convolution that it replaces."""

import pytest
import torch
from tiny import difference, tiny_config
from torch import nn

from mmbert.model.encoders import ImageEncoder
from mmbert.model.patches import PatchProjection


@pytest.mark.parametrize("patch", [(4, 4), (2, 8)])
@pytest.mark.parametrize("bias", [False, True])
def test_projection_equals_the_convolution(patch: tuple[int, int], bias: bool) -> None:
    """Values and all gradients, also where a rest of the image is no patch."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 5, patch, stride=patch, bias=bias).double()
    projection = PatchProjection.of(convolution)
    assert projection.weight is convolution.weight and projection.state_dict().keys() == convolution.state_dict().keys()
    pixels = torch.randn(2, 3, 9, 17, dtype=torch.float64, requires_grad=True)
    inputs = [pixels, *convolution.parameters()]
    out, expected = projection(pixels), convolution(pixels)
    assert difference(out, expected) < 1e-12
    found, wanted = (torch.autograd.grad(x.sin().sum(), inputs) for x in (out, expected))
    assert all(difference(x, y) < 1e-12 for x, y in zip(found, wanted, strict=True))


def test_only_patches_side_by_side_are_replaced() -> None:
    replaces = PatchProjection.replaces
    assert replaces(nn.Conv2d(3, 4, 8, stride=8)) and replaces(nn.Conv2d(3, 4, 8, stride=8, padding="valid"))
    assert not any(
        replaces(nn.Conv2d(4, 4, 8, **{"stride": 8, **other}))
        for other in ({"stride": 4}, {"padding": 1}, {"dilation": 2}, {"groups": 2})
    )


@pytest.mark.parametrize("image_model", ["vit_tiny_patch16_224", "vit_tiny_r_s16_p8_224"])
def test_image_encoders_use_it(image_model: str) -> None:
    """A ViT on pixels, and one on the output of a convolutional stem."""
    torch.manual_seed(0)
    encoder = ImageEncoder(tiny_config(image_model=image_model, image_size=64, patch_size=None)).eval()
    projection = encoder.vit.patch_embed.proj
    assert isinstance(projection, PatchProjection)
    pixels = torch.randn(2, 3, 64, 64)
    tokens = encoder(pixels).hidden_states
    plain = nn.Conv2d(projection.in_channels, projection.out_channels, projection.kernel_size, projection.stride)
    plain.load_state_dict(projection.state_dict())
    encoder.vit.patch_embed.proj = plain
    assert difference(encoder(pixels).hidden_states, tokens) < 1e-5
