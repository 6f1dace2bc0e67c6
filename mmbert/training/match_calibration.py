"""Calibration of ITM on validation pairs: Platt scaling of the matching logit, refitted before each validation."""

import logging

import torch
from torch import Tensor

from mmbert.data.datamodule import PairsDataModule
from mmbert.data.images import BadImageError
from mmbert.data.pairs import Pairs
from mmbert.errors import UsageError
from mmbert.evaluation.encoding import encode, pair_scores
from mmbert.model.modeling import MMBertForPreTraining
from mmbert.model.objectives.itm import ImageTextMatching
from mmbert.runtime.distributed import rank
from mmbert.runtime.randomness import numpy_generator, permutation
from mmbert.training.closed_form import image_loader

log = logging.getLogger("mmbert")

MAX_TEXTS, WRONG_IMAGES = 500, 3
"""Validation texts that are used at most, and mismatched images of each."""


def wants_calibration(model: torch.nn.Module) -> bool:
    """Whether the model's ITM is calibrated on validation."""
    itm = model.objectives["itm"] if isinstance(model, MMBertForPreTraining) and "itm" in model.objectives else None
    return isinstance(itm, ImageTextMatching) and itm.calibration is not None


@torch.no_grad()
def calibrate_matching(model: MMBertForPreTraining, data: PairsDataModule, *, seed: int) -> None:
    """Fit ITM's calibration to pairs of the validation split; the same for any number of processes.

    The logit of a match becomes a * (logit of the fused pair) + c * (contrastive logit, with `residual`) + b, by
    logistic regression on right and wrong pairs of equal weight (Platt scaling, Guo et al., arXiv:1706.04599, Sec. 4);
    a and c are 0 or more.
    Only evaluation reads it: losses and gradients of training stay as they are.

    Args:
        model: In evaluation mode, on its device.
        data: Its validation split is read.
        seed: Seed of the pairs.

    Raises:
        UsageError: Too few validation images can be read.
    """
    itm, val = model.objectives["itm"], data.val_samples
    assert isinstance(itm, ImageTextMatching) and itm.calibration is not None
    pairs = [] if val is None else choose_pairs(val, seed)
    if val is None or not pairs:
        return
    rows = sorted({i for text, image, _ in pairs for i in (text[0], image)})
    load = image_loader(val)
    if data.skip_unreadable:
        rows = [i for i in rows if _is_readable(val, i)]
    image_rows = {row: number for number, row in enumerate(rows)}
    pairs = [pair for pair in pairs if pair[0][0] in image_rows and pair[1] in image_rows]
    if len({match for _, _, match in pairs}) < 2:
        raise UsageError(
            f"objectives.itm.calibrate needs matching and wrong pairs of the validation split, but of its images only "
            f"{len(rows)} can be read: leave calibrate out, or repair them (`mmbert data check` lists them)."
        )
    texts = list(dict.fromkeys(text for text, _, _ in pairs))
    text_rows = {text: number for number, text in enumerate(texts)}
    encoded = encode(
        model,
        data.processor,
        [val.examples[i].image for i in rows],
        [val.examples[i].captions[j] for i, j in texts],
        load=load,
    )
    assert encoded.images is not None
    chosen = torch.tensor([(image_rows[image], int(encoded.text_index[text_rows[text]])) for text, image, _ in pairs])
    is_match = torch.tensor([match for _, _, match in pairs])
    itm.calibration.copy_(itm.calibration.new_tensor([1.0, 0.0, 0.0]))  # the fusion's part alone
    features = [pair_scores(model, encoded.images, encoded.texts, chosen).double()]
    if itm.residual_factor is not None:
        cosines = encoded.pair_similarities(chosen, dtype=torch.float64)
        features.append(cosines * float(model.objectives["itc"].scale * itm.residual_factor))  # pyright: ignore
    *factors, bias = fit_calibration(torch.stack(features, dim=1), is_match)
    values = [factors[0], factors[1] if len(factors) == 2 else 0.0, bias]
    itm.calibration.copy_(itm.calibration.new_tensor(values))
    if rank() == 0:
        log.info(
            "objectives.itm.calibrate: match logit = %.3g x fused %s%+.3g, from %d validation pairs",
            values[0],
            f"+ {values[1]:.3g} x contrastive " if len(factors) == 2 else "",
            values[2],
            len(pairs),
        )


def choose_pairs(val: Pairs, seed: int) -> list[tuple[tuple[int, int], int, bool]]:
    """Draw validation texts, each with its own image and with wrong images that have no equal caption.

    Returns:
        Text (number of the example, of its caption), number of the image's example, whether they match.
    """
    texts = [(i, j) for i, example in enumerate(val.examples) for j in range(len(example.captions))]
    order = permutation(seed, "match calibration", 0, len(texts))[:MAX_TEXTS]
    generator = numpy_generator(seed, "wrong images of the match calibration")
    found: list[tuple[tuple[int, int], int, bool]] = []
    for i, j in (texts[n] for n in sorted(order.tolist())):
        key, others = val.text_keys[i][j], []
        for other in generator.permutation(len(val.examples)).tolist():
            if val.image_keys[other] != val.image_keys[i] and key not in val.text_keys[other]:
                others.append(other)
            if len(others) == WRONG_IMAGES:
                break
        if others:
            found += [((i, j), i, True), *(((i, j), other, False) for other in others)]
    return found


def fit_calibration(features: Tensor, is_match: Tensor) -> list[float]:
    """Fit factors of 0 or more and an intercept: scores that know nothing must not turn the ranking around.

    A column whose factor is negative is left out, the first one first, and the others are fitted again.

    Args:
        features: (N, K), fp64.
        is_match: (N,) bool, with rows of both kinds.

    Returns:
        K factors and the intercept.
    """
    columns = [*range(features.shape[1])]
    while True:
        *found, bias = fit_logistic(features[:, columns], is_match).tolist()
        negative = [column for column, factor in zip(columns, found, strict=True) if factor < 0]
        if not negative:
            break
        columns.remove(negative[0])
    factors = dict(zip(columns, found, strict=True))
    return [*(factors.get(column, 0.0) for column in range(features.shape[1])), bias]


def fit_logistic(features: Tensor, is_match: Tensor, ridge: float = 1e-3) -> Tensor:
    """Fit a logistic regression by Newton's method, matched and mismatched rows weighing the same.

    Args:
        features: (N, K), fp64.
        is_match: (N,) bool, with rows of both kinds.
        ridge: Of the mean loss, so that separable rows have a finite solution.

    Returns:
        (K + 1,) coefficients and intercept.
    """
    x = torch.cat([features, features.new_ones(len(features), 1)], dim=1)
    y = is_match.to(x.dtype)
    weights = torch.where(is_match, 0.5 / y.sum(), 0.5 / (1 - y).sum())
    solution, penalty = x.new_zeros(x.shape[1]), ridge * torch.eye(x.shape[1], dtype=x.dtype)
    for _ in range(100):
        p = torch.sigmoid(x @ solution)
        gradient = x.T @ (weights * (p - y)) + penalty @ solution
        step = torch.linalg.solve((x.T * (weights * p * (1 - p))) @ x + penalty, gradient)
        step = step / max(1.0, float(step.norm()) / 5)  # far from the solution Newton's steps can be too long
        solution = solution - step
        if float(step.norm()) < 1e-10:
            break
    return solution


def _is_readable(val: Pairs, row: int) -> bool:
    try:
        image_loader(val)(val.examples[row].image)
    except BadImageError:
        return False
    return True
