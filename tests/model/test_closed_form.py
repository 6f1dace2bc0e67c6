"""Closed form of ITC: canonical correlations against an independent solution, and its errors."""

import pytest
import torch
from torch import Tensor

from mmbert.errors import UsageError
from mmbert.model.objectives.closed_form import LinearMaps, canonical_maps


def paired_features(pairs: int = 60, *, shift: float = 5.0) -> tuple[Tensor, Tensor]:
    """Two noisy views of 3 common factors, 6 and 5 wide, with a large common mean."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(pairs, 3, generator=generator, dtype=torch.float64)

    def view(width: int) -> Tensor:
        mixing = torch.randn(3, width, generator=generator, dtype=torch.float64)
        return common @ mixing + 0.5 * torch.randn(pairs, width, generator=generator, dtype=torch.float64) + shift

    return view(6), view(5)


def embed(maps: LinearMaps, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    return text @ maps.text_weight.T + maps.text_bias, image @ maps.image_weight.T + maps.image_bias


def test_directions_have_the_canonical_correlations() -> None:
    """Their squares are the eigenvalues of Cxx^-1 Cxy Cyy^-1 Cyx; directions of one side are uncorrelated."""
    text, image = paired_features()
    x, y = text - text.mean(dim=0), image - image.mean(dim=0)
    product = torch.linalg.solve(x.T @ x, x.T @ y) @ torch.linalg.solve(y.T @ y, y.T @ x)
    expected = torch.linalg.eigvals(product).real.sort(descending=True).values[:4].sqrt()
    a, b = embed(canonical_maps(text, image, directions=4, ridge=0.0), text, image)
    a, b = a / a.norm(dim=0), b / b.norm(dim=0)
    torch.testing.assert_close((a * b).sum(dim=0), expected)
    torch.testing.assert_close(a.T @ a, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(a.T @ b, expected.diag(), rtol=0, atol=1e-9)


def test_each_direction_is_scaled_by_its_correlation() -> None:
    text, image = paired_features()
    a, b = embed(canonical_maps(text, image, directions=4, ridge=0.0), text, image)
    correlations = (a * b).sum(dim=0) / a.norm(dim=0) / b.norm(dim=0)
    for vectors in (a, b):
        spread = vectors.std(dim=0)
        torch.testing.assert_close(spread / spread[0], correlations / correlations[0])


def test_bias_centers_the_features() -> None:
    text, image = paired_features(shift=100.0)
    for vectors in embed(canonical_maps(text, image, directions=3, ridge=0.1), text, image):
        torch.testing.assert_close(vectors.mean(dim=0), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-9)


def test_true_pairs_are_nearest_where_features_determine_each_other() -> None:
    text, _ = paired_features()
    image = text @ torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 3
    a, b = embed(canonical_maps(text, image, directions=6, ridge=1e-9), text, image)
    cosines = torch.nn.functional.normalize(a, dim=1) @ torch.nn.functional.normalize(b, dim=1).T
    assert torch.equal(cosines.argmax(dim=1), torch.arange(len(text)))
    assert cosines.diagonal().min() > 0.999


def test_order_of_pairs_changes_nothing_but_rounding() -> None:
    """The sign of each direction is fixed, so equal data give equal weights."""
    text, image = paired_features()
    order = torch.randperm(len(text), generator=torch.Generator().manual_seed(2))
    first, second = (
        canonical_maps(t, i, directions=3, ridge=0.3) for t, i in ((text, image), (text[order], image[order]))
    )
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other)


def test_repeated_pairs_change_nothing() -> None:
    text, image = paired_features()
    once = canonical_maps(text, image, directions=3, ridge=0.3)
    often = canonical_maps(text.repeat(200, 1), image.repeat(200, 1), directions=3, ridge=0.3)  # more than one block
    for one, other in zip(once, often, strict=True):
        torch.testing.assert_close(one, other)


def test_constant_features_give_finite_weights() -> None:
    text, image = paired_features()
    image[:, 2] = 7.0
    assert all(part.isfinite().all() for part in canonical_maps(text, image, directions=2, ridge=0.1))


@pytest.mark.parametrize(
    ("pairs", "directions", "message"),
    [
        (60, 6, "embedding_size=6: init=closed_form finds at most 5 directions in features of 6 .texts. and 5"),
        (
            3,
            4,
            "embedding_size=4: init=closed_form can't find as many directions in 3 training pairs; choose at most 3",
        ),
    ],
)
def test_too_many_directions_are_named(pairs: int, directions: int, message: str) -> None:
    text, image = paired_features(pairs)
    with pytest.raises(UsageError, match=message):
        canonical_maps(text, image, directions=directions, ridge=0.1)


def test_features_that_are_all_equal_are_told() -> None:
    text, image = paired_features()
    with pytest.raises(UsageError, match=r"needs texts that differ, .* training pairs that it is solved from \(60\)"):
        canonical_maps(torch.full_like(text, 0.3), image, directions=2, ridge=0.3)
    with pytest.raises(UsageError, match="needs images that differ"):
        canonical_maps(text.float(), torch.full_like(image, 1.7).float(), directions=2, ridge=0.3)
    with pytest.raises(UsageError, match=r"solved from \(1\)"):
        canonical_maps(text[:1], image[:1], directions=1, ridge=0.3)
