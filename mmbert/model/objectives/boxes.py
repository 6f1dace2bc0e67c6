"""Dense image labels: the image encoder alone predicts, for each patch, the classes of the boxes at its place."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmbert.errors import UsageError
from mmbert.model.configuration import MMBertConfig
from mmbert.model.objectives.base import EncodedBatch, Objective, ObjectiveOutput, full_precision, no_autocast
from mmbert.model.tokens import NOT_LABELLED
from mmbert.runtime.distributed import global_mean


class BoxClasses(Objective):
    """Multi-label classification of each image token by the classes of the boxes at the place of its patch.

    A box is there if it covers the center of the patch, or if the patch holds the center of the box, so that no box is
    too small for a label. A patch may have boxes of several classes, which overlap or are smaller than it; one without
    any is background, with no class. It reads neither text nor fusion. The boxes are those of `data.boxes`.
    """

    def __init__(self, config: MMBertConfig):
        """Build the head for `config.box_classes`.

        Args:
            config: The model's configuration.

        Raises:
            UsageError: The images are region features, which have no grid of patches.
        """
        super().__init__()
        if config.image_features is not None:
            raise UsageError("objectives.boxes labels patches, but this model reads region features; leave it out.")
        self.width = config.hidden_size
        self.head = nn.Linear(self.width, len(config.box_classes)) if config.box_classes else nn.Identity()

    @torch.no_grad()
    def start(self, frequencies: Sequence[float], *, std: float) -> None:
        """Build the head for the classes of the training data.

        Args:
            frequencies: Mean fraction of an image that the boxes of each class cover; the biases start at the log-odds.
            std: Standard deviation of the weights.
        """
        self.head = nn.Linear(self.width, len(frequencies))
        nn.init.normal_(self.head.weight, std=std)
        prior = [min(max(f, 1e-4), 0.99) for f in frequencies]
        self.head.bias.copy_(torch.tensor([math.log(p / (1 - p)) for p in prior]))

    def forward(self, encoded: EncodedBatch) -> ObjectiveOutput:
        """Compute the loss; reads `boxes` (B, N, 4) and `box_classes` (B, N), padded with `NO_BOX`.

        The loss is the sum of the binary cross-entropies of all patches and classes over the number of those that are
        present. The accuracy is the recall of those present. Images that are not labelled are left out, images
        without a box are background.
        """
        if isinstance(self.head, nn.Identity):
            raise UsageError("objectives.boxes: the model has no classes of boxes; mmbert.fit reads them (data.boxes).")
        if "boxes" not in encoded.batch:
            raise UsageError("objectives.boxes: the batch has no boxes; mmbert.fit reads them from data.boxes.")
        rows, columns = encoded.model.patch_grid
        logits = full_precision(self.head(encoded.image.hidden_states[:, -rows * columns :]))  # (B, P, C)
        corners, classes = encoded.batch["boxes"], encoded.batch["box_classes"]
        is_labelled = (classes != NOT_LABELLED).all(dim=1)
        with no_autocast(logits):
            there = patches_of_boxes(corners, rows, columns).to(logits.dtype)  # (B, N, P)
            one_hot = F.one_hot(classes.clamp(min=0), logits.shape[2]) * (classes >= 0)[:, :, None]
            targets = (there.transpose(1, 2) @ one_hot.to(logits.dtype)).clamp(max=1)  # (B, P, C)
            losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
            total = (losses.sum(dim=(1, 2)) * is_labelled).sum()
        loss = global_mean(total, targets.sum().long())
        present = logits.detach()[targets.bool()]
        return ObjectiveOutput(
            loss,
            torch.stack([torch.zeros_like(present), present], dim=1),
            torch.ones_like(present).long(),
            (~is_labelled).sum(),
        )


def patches_of_boxes(corners: Tensor, rows: int, columns: int) -> Tensor:
    """Find the patches at whose place a box is; see `BoxClasses`.

    Args:
        corners: (B, N, 4) left, top, right and bottom, as fractions of the image's sides.
        rows: Of patches.
        columns: Of patches.

    Returns:
        (B, N, rows * columns) bool.
    """

    def along(low: Tensor, high: Tensor, count: int) -> tuple[Tensor, Tensor]:
        numbers = torch.arange(count, device=corners.device)
        centers = (numbers.to(corners.dtype) + 0.5) / count
        is_covered = (low[..., None] <= centers) & (centers <= high[..., None])
        return is_covered, ((low + high) / 2 * count).floor()[..., None] == numbers

    left, top, right, bottom = corners.unbind(dim=-1)
    (covered_x, holds_x), (covered_y, holds_y) = along(left, right, columns), along(top, bottom, rows)
    covered = covered_y[..., :, None] & covered_x[..., None, :]
    return (covered | (holds_y[..., :, None] & holds_x[..., None, :])).flatten(2)
