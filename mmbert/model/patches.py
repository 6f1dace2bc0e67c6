"""Patch embeddings of timm, computed faster on CPUs."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def speed_up_patches(patch_embed: nn.Module) -> None:
    """Replace the projection of patches, and change the memory format of pooling, in a timm patch embedding."""
    projection = getattr(patch_embed, "proj", None)
    if isinstance(projection, nn.Conv2d) and PatchProjection.replaces(projection):
        patch_embed.proj = PatchProjection.of(projection)
    for module in patch_embed.modules():
        if isinstance(module, nn.MaxPool2d):  # of a convolutional stem; 15 times faster so on CPUs, with equal results
            module.register_forward_pre_hook(_channels_last)


class PatchProjection(nn.Conv2d):
    """Convolution whose stride is its kernel's size, computed as a matrix product of patches and weights.

    Parameters and outputs are those of the convolution. On a CPU its backward pass is many times faster.
    """

    @classmethod
    def replaces(cls, module: nn.Conv2d) -> bool:
        """Tell whether `module` is a convolution over patches that neither overlap nor are padded."""
        return (
            type(module) is nn.Conv2d
            and module.kernel_size == module.stride
            and module.padding in ((0, 0), "valid")
            and module.dilation == (1, 1)
            and module.groups == 1
        )

    @classmethod
    def of(cls, convolution: nn.Conv2d) -> "PatchProjection":
        """Build one with the parameters of a convolution, which are shared."""
        projection = cls(
            convolution.in_channels,
            convolution.out_channels,
            convolution.kernel_size,  # pyright: ignore[reportArgumentType]
            convolution.stride,  # pyright: ignore[reportArgumentType]
            bias=convolution.bias is not None,
            device="meta",
        )
        projection.weight, projection.bias = convolution.weight, convolution.bias
        return projection.train(convolution.training)

    def forward(self, input: Tensor) -> Tensor:
        """Project (B, C, H, W) images to (B, D, H / patch height, W / patch width)."""
        height, width = self.kernel_size
        rows, columns = input.shape[2] // height, input.shape[3] // width
        pixels = input[:, :, : rows * height, : columns * width]  # the convolution ignores the rest, too
        patches = pixels.unflatten(3, (columns, width)).unflatten(2, (rows, height))  # (B, C, rows, h, columns, w)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, P, C * h * w)
        tokens = F.linear(patches, self.weight.flatten(1), self.bias)  # (B, P, D)
        return tokens.transpose(1, 2).unflatten(2, (rows, columns))


def _channels_last(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Change the memory format of a module's input."""
    return tuple(_ChannelsLast.apply(x) for x in args)  # pyright: ignore[reportReturnType]


class _ChannelsLast(torch.autograd.Function):
    """Change to channels-last format, with a gradient in the default one: ReLU's backward is slow for mixed formats."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].contiguous(memory_format=torch.contiguous_format)
