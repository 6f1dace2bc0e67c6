"""Regularised canonical correlation analysis: the closed form from which ITC's projections start."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mmbert.errors import UsageError


class LinearMaps(NamedTuple):
    """Two affine maps into a common space, in the layout of `nn.Linear`."""

    text_weight: Tensor  # (E, F)
    text_bias: Tensor  # (E,)
    image_weight: Tensor  # (E, G)
    image_bias: Tensor  # (E,)


def canonical_maps(text: Tensor, image: Tensor, *, directions: int, ridge: float) -> LinearMaps:
    """Solve canonical correlation analysis (Hotelling, doi:10.1093/biomet/28.3-4.321) between paired features.

    Features are centered, by the bias, and whitened with a ridge; the directions are the singular vectors of the
    whitened cross-covariance, each scaled by its correlation. So their cosine counts a direction by how well it agrees.

    Args:
        text: (N, F) features of the texts; row i belongs to row i of `image`.
        image: (N, G) features of the images.
        directions: E, width of the common space.
        ridge: Added to the diagonal of each covariance, as a multiple of the diagonal's mean.

    Returns:
        fp64 maps, the same for the same input: the sign of each direction is fixed. Each is scaled so that its weights
        have a root mean square of 1.

    Raises:
        UsageError: More directions than features, or than pairs, or features that are equal in all rows.
    """
    pairs = len(text)
    possible = min(text.shape[1], image.shape[1])
    if directions > possible:
        raise UsageError(
            f"objectives.itc.embedding_size={directions}: init=closed_form finds at most {possible} directions in "
            f"features of {text.shape[1]} (texts) and {image.shape[1]} (images); choose at most {possible}."
        )
    if directions > pairs:
        raise UsageError(
            f"objectives.itc.embedding_size={directions}: init=closed_form can't find as many directions in {pairs} "
            f"training pairs; choose at most {pairs}, or more pairs by objectives.itc.init_samples."
        )
    text_mean, image_mean = (features.mean(dim=0, dtype=torch.float64) for features in (text, image))
    moments = [
        torch.zeros(a.shape[1], b.shape[1], dtype=torch.float64)
        for a, b in ((text, text), (text, image), (image, image))
    ]
    for rows in _row_blocks(pairs):  # the rows in fp64 all at once can take gigabytes
        t, i = text[rows].double() - text_mean, image[rows].double() - image_mean
        for moment, left, right in zip(moments, (t, t, i), (t, i, i), strict=True):
            moment += left.T @ right / pairs
    text_moment, cross_moment, image_moment = moments
    for name, features, moment in (("texts", text, text_moment), ("images", image, image_moment)):
        if float(moment.diagonal().max()) <= (1e-6 * float(features.abs().max())) ** 2:
            raise UsageError(
                f"the closed form (objectives.itc.init, --baseline) needs {name} that differ, but their features are "
                f"equal in all training pairs that it is solved from ({pairs:,}): give it others, or leave it out."
            )
    whiten_text, whiten_image = _whitening(text_moment, ridge), _whitening(image_moment, ridge)
    left, correlations, right = torch.linalg.svd(whiten_text @ cross_moment @ whiten_image)
    left, right = left[:, :directions], right[:directions].T
    largest = left.abs().argmax(dim=0, keepdim=True)
    sign = left.gather(0, largest).sign() * correlations[:directions]
    text_weight, image_weight = (
        weight / weight.square().mean().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
        for weight in ((whiten_text @ (left * sign)).T, (whiten_image @ (right * sign)).T)
    )
    return LinearMaps(text_weight, -text_weight @ text_mean, image_weight, -image_weight @ image_mean)


def _row_blocks(count: int, size: int = 8192) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, count, size))


def _whitening(covariance: Tensor, ridge: float) -> Tensor:
    """Inverse square root (F, F) of a covariance with a ridge."""
    covariance = covariance + ridge * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=covariance.dtype)
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=torch.finfo(torch.float64).eps * float(values.max())).rsqrt() @ vectors.T
