"""`Muon`: orthogonalized momentum for hidden matrices, and AdamW for all other parameters, in one optimizer."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the Newton-Schulz polynomial a x + b x^3 + c x^5."""
ITERATIONS = 5
MOMENTUM = 0.95


class Muon(Optimizer):
    """Muon (Jordan et al., 2024; arXiv:2502.16982, Eq. 1 to 4) with Nesterov momentum, beside AdamW.

    An update is the orthogonalized momentum times 0.2 sqrt(max(rows, columns)), whose root mean square is about that of
    an update of AdamW, so learning rates and weight decays of AdamW carry over (arXiv:2502.16982, Sec. 2.2).
    `torch.optim.Muon` computes the same for one matrix at a time, always in bfloat16, which is 30 times slower than
    fp32 on CPUs without it; here matrices of equal shape are one batch, in the run's precision.

    Args:
        groups: Parameter groups with `lr` and `weight_decay`; those with `muon: True` hold matrices only.
        betas: AdamW's decay rates.
        fused: Use AdamW's fused step.
        dtype: Type in which matrices are orthogonalized.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        betas: tuple[float, float],
        fused: bool = True,
        dtype: torch.dtype = torch.float32,
    ):
        self.dtype = dtype
        super().__init__(groups, {"muon": False})
        self._adamw = AdamW([g for g in self.param_groups if not g["muon"]], betas=betas, fused=fused)
        self._link()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore groups and state, which AdamW shares."""
        super().__setstate__(state)
        self._link()

    def _link(self) -> None:
        self._adamw.param_groups = [g for g in self.param_groups if not g["muon"]]
        self._adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take an optimizer step; parameters without a gradient are left as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["muon"]:
                self._step_matrices(group)
        self._adamw.step()
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        by_shape: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        for matrix in group["params"]:
            if matrix.grad is not None:
                by_shape[tuple(matrix.shape)].append(matrix)
        for (rows, columns), matrices in by_shape.items():
            updates = []
            for matrix in matrices:
                state, gradient = self.state[matrix], matrix.grad
                assert gradient is not None
                if not state:
                    state["momentum"] = torch.zeros_like(matrix)
                momentum = state["momentum"].lerp_(gradient, 1 - MOMENTUM)
                updates.append(gradient.lerp(momentum, MOMENTUM))  # Nesterov
            directions = orthogonalize(torch.stack(updates).to(self.dtype))
            scale = 0.2 * max(rows, columns) ** 0.5
            for matrix, direction in zip(matrices, directions.to(matrices[0].dtype), strict=True):
                matrix.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=group["lr"] * scale)


def orthogonalize(x: Tensor) -> Tensor:
    """Approximate U V^T of the singular value decompositions U S V^T by Newton-Schulz iterations.

    Args:
        x: (N, rows, columns).

    Returns:
        (N, rows, columns) with singular values of about 1 (0.7 to 1.2).
    """
    is_tall = x.shape[1] > x.shape[2]
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
