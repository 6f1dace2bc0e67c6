"""Image processor: images of any kind to `pixel_values`, resized and normalized as the encoder expects."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.data.config import resolve_data_config
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms
from transformers import BatchFeature

from mmbert.data.images import ImageSource, as_image_list, load_image
from mmbert.errors import UsageError


@dataclass(frozen=True)
class ImageSettings:
    """Resizing and normalization of images, as timm states them for the encoder."""

    image_size: int
    """Side of the square that images are resized to, in pixels."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        """Check the values, which may come from a file.

        Raises:
            UsageError: A value that no image can be resized or normalized with.
        """
        allowed = [mode.value for mode in InterpolationMode]
        if self.interpolation not in allowed:
            raise UsageError(f"interpolation={self.interpolation!r}; allowed are {', '.join(allowed)}.")
        if not isinstance(self.image_size, int) or self.image_size < 1:
            raise UsageError(f"image_size={self.image_size!r}: a number of pixels.")
        for name in ("mean", "std"):
            value = getattr(self, name)
            if len(value) != 3 or not all(isinstance(x, int | float) for x in value):
                raise UsageError(f"{name}={[*value]}: one number for each of the 3 channels.")

    @classmethod
    def of_timm(cls, pretrained_cfg: dict[str, Any], image_size: int) -> "ImageSettings":
        """Read the settings of a timm model; see `timm.data.resolve_data_config`."""
        facts = resolve_data_config(pretrained_cfg=pretrained_cfg)
        return cls(image_size, tuple(facts["mean"]), tuple(facts["std"]), facts["interpolation"])

    def resize(self, image: Tensor) -> Tensor:
        """Resize (3, H, W) uint8 to (3, S, S) uint8, without cropping: captions mention things at the edges too."""
        side = self.image_size
        if image.shape[-2:] == (side, side):
            return image
        return transforms.resize(
            image, [side, side], interpolation=InterpolationMode(self.interpolation), antialias=True
        )

    def normalize(self, images: Tensor) -> Tensor:
        """Normalize (B, 3, S, S) uint8 to float with the encoder's mean and standard deviation."""
        return transforms.normalize(transforms.to_dtype(images, torch.float32, scale=True), [*self.mean], [*self.std])


class MMBertImageProcessor:
    """Image processor in the manner of transformers: `image_processor(images, return_tensors="pt")`."""

    model_input_names = ("pixel_values",)

    def __init__(self, settings: ImageSettings):
        self.settings = settings

    def __call__(self, images: ImageSource | Sequence[ImageSource], *, return_tensors: str = "pt") -> BatchFeature:
        """Load, resize and normalize one image (path, bytes, PIL image or array) or an iterable of images.

        Returns:
            `pixel_values` (B, 3, S, S) float.

        Raises:
            UsageError: Another kind of tensors than "pt".
            BadImageError: An image that can't be read.
        """
        check_tensors(return_tensors)
        side = self.settings.image_size
        pixels = [transforms.pil_to_tensor(load_image(image)) for image in as_image_list(images)[0]]
        loaded = [self.settings.resize(image) for image in pixels]
        pixel_values = torch.stack(loaded) if loaded else torch.empty(0, 3, side, side, dtype=torch.uint8)
        return BatchFeature({"pixel_values": self.settings.normalize(pixel_values)})


def check_tensors(return_tensors: str) -> None:
    """Raise on another kind of tensors than PyTorch's."""
    if return_tensors != "pt":
        raise UsageError(f"return_tensors='{return_tensors}'; only 'pt' is available.")
