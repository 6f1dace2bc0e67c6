"""Relevance by gradients: gradient x input, and integrated gradients."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmbert.errors import UsageError
from mmbert.inference.explanation.targets import Target
from mmbert.inference.explanation.trace import replaced_inputs

INTEGRATION_STEPS = 64

Score = Callable[[Tensor, Tensor], Tensor]
"""(B, T, text width) input embeddings and (B, 3, S, S) normalised images to (B,) scores."""


def gradient_relevance(
    core: Any, target: Target, baseline_ids: Sequence[int], pixels: Tensor, baseline: Tensor, *, integrated: bool
) -> tuple[Tensor, Tensor]:
    """Compute the relevance of tokens and pixels by gradients, relative to inputs without content.

    Args:
        core: The model without its heads.
        target: The score.
        baseline_ids: T token ids of the text without content.
        pixels: (1, 3, S, S) normalised image.
        baseline: (1, 3, S, S) normalised image without content.
        integrated: Average the gradient over inputs between baseline and input (arXiv:1703.01365, Eq. 3), instead of
            taking it at the input.

    Returns:
        (T,) and (S, S) signed relevance; integrated gradients sum to the difference of the two scores.

    Raises:
        UsageError: captum, which integrates gradients, is not installed.
    """
    ids = torch.tensor([target.input_ids, [*baseline_ids]], device=pixels.device)
    embeddings, empty = core.text_encoder.blocks()[0][0](ids).detach().split(1)

    def score(embeddings: Tensor, pixels: Tensor) -> Tensor:
        rows = ids[:1].expand(len(embeddings), -1)
        with replaced_inputs(core, lambda _: embeddings, lambda tokens: tokens):
            found = target.score(core.encode_text(rows), core.encode_image(pixels))
        return found + 0 * (embeddings.sum() + pixels.sum())  # a score that reads one input alone has gradients too

    compute = _integrated_gradients if integrated else _gradient_times_input
    with torch.enable_grad():
        text, image = compute(score, (embeddings, pixels), (empty, baseline))
    return text[0].sum(dim=-1).detach(), image[0].sum(dim=0).detach()


def _gradient_times_input(score: Score, inputs: Sequence[Tensor], baselines: Sequence[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    gradients = torch.autograd.grad(score(leaves[0], leaves[1]).sum(), leaves)
    return [gradient * (x - empty) for gradient, x, empty in zip(gradients, inputs, baselines, strict=True)]


def _integrated_gradients(score: Score, inputs: Sequence[Tensor], baselines: Sequence[Tensor]) -> Sequence[Tensor]:
    try:
        from captum.attr import IntegratedGradients
    except ImportError:
        raise UsageError(
            "method='integrated_gradients' needs captum, which is not installed: pip install 'mmbert[explain]'."
        ) from None
    method = IntegratedGradients(score)
    return method.attribute(tuple(inputs), baselines=tuple(baselines), n_steps=INTEGRATION_STEPS)
