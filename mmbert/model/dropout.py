"""Dropout that draws 16 random bits per number on a CPU, where torch's draws cost up to a fifth of a step."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEPS = 2**16
"""Values of a draw: the fraction of numbers that is dropped is a multiple of 1 / STEPS."""


def dropout(x: Tensor, p: float, *, training: bool = True) -> Tensor:
    """Set random elements to zero and scale the others, so that the mean is kept (arXiv:1207.0580).

    Drawn from torch's global generator. On a CPU the fraction is `p` rounded to 1 / 65,536, and the scale that of the
    rounded fraction, so the expectation is exact. Elsewhere and in compiled code it is `torch.nn.functional.dropout`.

    Args:
        x: Of any shape.
        p: Fraction of elements to drop.
        training: False: return `x`.
    """
    dropped = min(round(p * STEPS), STEPS - 1)
    if not training or p == 0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling() or dropped == 0:
        return F.dropout(x, p)
    bits = torch.empty(x.numel() // 4 + 1, dtype=torch.int64).random_(-(2**63), None)  # four draws each
    kept = bits.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - STEPS // 2
    return x * kept.to(x.dtype).mul_(STEPS / (STEPS - dropped))


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` by the function of this module."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply dropout in training mode."""
        return dropout(input, self.p, training=self.training)


def speed_up_dropout(module: nn.Module) -> None:
    """Replace every `torch.nn.Dropout` below a module."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Dropout:
                setattr(parent, name, Dropout(child.p))
