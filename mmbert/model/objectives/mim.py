"""Masked image modelling: predict the pixels of masked patches from the visible ones."""

from typing import Any

import torch
from torch import Tensor, nn

from mmbert.errors import UsageError
from mmbert.model.configuration import MMBertConfig
from mmbert.model.encoders import build_vit, check_image_size
from mmbert.model.objectives.base import EncodedBatch, Objective, ObjectiveOutput, full_precision
from mmbert.model.objectives.rtd import draw_uniform
from mmbert.model.patches import PatchGrid, patch_grid
from mmbert.runtime.distributed import global_mean


class MaskedImageModeling(Objective):
    """Masked image modelling (MIM; SimMIM, arXiv:2111.09886): a linear head predicts the pixels of masked patches.

    A learned mask token replaces the embeddings of random patches, and the loss is the L1 distance to their normalised
    pixels. It reads neither text nor fusion, and encodes each image a second time. Masked pixels are set to 0 as well,
    the mean of the normalisation, so that a convolutional stem can't see them where its receptive fields overlap.
    """

    def __init__(self, config: MMBertConfig, *, mask_ratio: float = 0.6, mask_size: int = 1):
        """Build mask token and head for the patches of the image encoder.

        Args:
            config: The model's configuration.
            mask_ratio: Fraction of an image that is masked, rounded to whole squares; the paper's default is 0.6.
            mask_size: Side of a masked square, in patches; it divides those along a side of the image. The paper masks
                squares of 32 pixels in images of 192.

        Raises:
            UsageError: An option out of range, or an image encoder whose patches can't be masked.
        """
        super().__init__()
        self.check_options(mask_ratio=mask_ratio, mask_size=mask_size)
        self.grid, self.mask_size = read_grid(config), mask_size
        squares = (self.grid.side // mask_size) ** 2
        if self.grid.side % mask_size or squares < 2:
            raise UsageError(
                f"objectives.mim.mask_size={mask_size}: the image has {self.grid.side} x {self.grid.side} patches, and "
                "squares to mask must divide them into 4 or more; choose another mask_size, image_size or patch_size."
            )
        self.count = min(max(round(mask_ratio * squares), 1), squares - 1)
        """Masked squares of an image."""
        self.mask_token = nn.Parameter(torch.empty(self.grid.width).normal_(std=config.initializer_range))
        self.head = nn.Linear(config.hidden_size, 3 * self.grid.pixels**2)

    @classmethod
    def check_options(cls, *, mask_ratio: Any = 0.6, mask_size: Any = 1) -> None:
        """Check the ranges of both options.

        Raises:
            UsageError: A value out of range.
        """
        if isinstance(mask_ratio, bool) or not isinstance(mask_ratio, int | float) or not 0 < mask_ratio < 1:
            raise UsageError(f"objectives.mim.mask_ratio={mask_ratio!r}: a fraction above 0, below 1.")
        if isinstance(mask_size, bool) or not isinstance(mask_size, int) or mask_size < 1:
            raise UsageError(f"objectives.mim.mask_size={mask_size!r}: must be a whole number of 1 or more.")

    def draw_masks(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        """Choose the masked patches of (B, ...) images: (B, rows, columns) bool, equally many in each."""
        side = self.grid.side // self.mask_size
        uniform = draw_uniform(images.new_empty(len(images), side**2), generator)
        rank = uniform.argsort(dim=1, stable=True).argsort(dim=1)
        return enlarge((rank < self.count).unflatten(1, (side, side)), self.mask_size)

    def split_patches(self, images: Tensor) -> Tensor:
        """Split (B, 3, S, S) images into patches, row by row: (B, P, 3, pixels of a patch)."""
        side, pixels = self.grid.side, self.grid.pixels
        patches = images.unflatten(3, (side, pixels)).unflatten(2, (side, pixels))  # (B, 3, rows, h, columns, w)
        return patches.permute(0, 2, 4, 1, 3, 5).flatten(4).flatten(1, 2)

    def forward(self, encoded: EncodedBatch) -> ObjectiveOutput:
        """Compute the L1 loss; reads `pixel_values` (B, 3, S, S).

        It is the mean over all values of masked patches. The accuracy is the fraction of these patches that the
        prediction fits better than the mean color of the image's visible patches does.

        Raises:
            UsageError: The batch has outputs of a frozen image encoder instead of images, or images of another size.
        """
        if "pixel_values" not in encoded.batch:
            raise UsageError(
                "objectives.mim predicts pixels, but the batch has no images: they are replaced by the outputs of a "
                "frozen image encoder (data.cache). Leave the objective out."
            )
        images = encoded.batch["pixel_values"]
        check_image_size(images, self.grid.side * self.grid.pixels)
        masks = self.draw_masks(images, encoded.generator)
        hidden = enlarge(masks, self.grid.pixels)[:, None]
        masked = masks.flatten(1)  # (B, P)
        tokens = encoded.model.encode_masked_image(images.masked_fill(hidden, 0), masked, self.mask_token)
        states = tokens.hidden_states[:, -masked.shape[1] :]  # behind class and register tokens
        predicted = full_precision(self.head(states[masked]))  # (K, 3 * pixels)

        patches = full_precision(self.split_patches(images))
        targets = patches[masked]  # (K, 3, pixels)
        errors = (predicted - targets.flatten(1)).abs().mean(dim=1)  # (K,)
        visible = (~masked).to(patches.dtype)[..., None]  # (B, P, 1)
        color = (patches.mean(dim=3) * visible).sum(dim=1) / visible.sum(dim=1)  # (B, 3)
        color = color[:, None].expand(-1, masked.shape[1], -1)[masked]
        of_color = (color[:, :, None] - targets).abs().mean(dim=(1, 2))
        count = masked.sum()
        return ObjectiveOutput(
            global_mean(errors.sum(), count),
            torch.stack([-of_color, -errors.detach()], dim=1),
            torch.ones_like(errors, dtype=torch.int64),
            torch.zeros_like(count),
        )


def read_grid(config: MMBertConfig) -> PatchGrid:
    """Measure the patches of the image encoder that a configuration describes.

    Raises:
        UsageError: It reads no images, has no layer, or its patches can't be masked.
    """
    if config.image_features is not None:
        raise UsageError(
            f"objectives.mim predicts pixels, but with image_features={config.image_features} the model reads region "
            "features instead of images; disable mim."
        )
    if config.image_layers == 0:
        raise UsageError(
            "objectives.mim: with image_layers=0 masked patches can't see the visible ones; give the image encoder "
            "layers, or disable mim."
        )
    with torch.device("meta"):  # shapes only
        return patch_grid(build_vit(config), config.image_size)


def enlarge(masks: Tensor, factor: int) -> Tensor:
    """Enlarge each element of (B, rows, columns) masks to a square of `factor` x `factor` elements."""
    return masks.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)
