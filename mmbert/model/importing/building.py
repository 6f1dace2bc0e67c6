"""Building the model of a plan, with an account of every tensor of checkpoint and model."""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from mmbert.errors import UsageError
from mmbert.model.configuration import MMBertConfig
from mmbert.model.importing.base import Checkpoint, Computed, Plan, State
from mmbert.model.initialization import new_model
from mmbert.model.modeling import MMBertModel, MMBertPreTrainedModel

POSITIONS = "vit.pos_embed"
"""End of the name of the one table that is resized, to another image size."""


class Account(NamedTuple):
    """What became of each tensor."""

    matched: list[str]  # parameters that have the values of the checkpoint
    resized: list[str]  # parameters that were interpolated
    missing: list[str]  # parameters that the checkpoint should give and does not; newly initialised
    new: dict[str, str]  # parameters that no such checkpoint has -> the reason; newly initialised
    unused: dict[str, str]  # tensors of the checkpoint that the model does without -> the reason
    unknown: list[str]  # tensors of the checkpoint that the model has no place for

    @property
    def is_partial(self) -> bool:
        """Whether a part of the checkpoint, or of the model, was left out."""
        return bool(self.missing or self.unknown)

    def table(self) -> str:
        """Format the numbers by part of the model, then what was not loaded and why."""
        columns = {"matched": self.matched, "resized": self.resized, "missing": self.missing, "new": [*self.new]}
        counts = {name: Counter(map(_part, names)) for name, names in columns.items()}
        parts = list(dict.fromkeys(map(_part, [name for names in columns.values() for name in names])))
        width = max(map(len, [*parts, "unused tensors of the checkpoint"]))
        lines = [f"{'part of the model':{width}}" + "".join(f"{name:>9}" for name in counts)]
        lines += [f"{part:{width}}" + "".join(f"{count[part]:9}" for count in counts.values()) for part in parts]
        lines.append(f"{'unused tensors of the checkpoint':{width}}{len(self.unused) + len(self.unknown):9}")
        reasons = Counter(f"unused, {reason}: {_part(name)}" for name, reason in self.unused.items())
        reasons |= Counter(f"new, {reason}: {name}" for name, reason in self.new.items())
        lines += [text if number == 1 else f"{text} ({number} tensors)" for text, number in reasons.items()]
        lines += [f"missing: {name}" for name in self.missing]
        lines += [f"unused, no place for it: {name}" for name in self.unknown]
        return "\n".join(lines)


def _part(name: str) -> str:
    """Return the part of a model that a tensor belongs to: two modules, "fusion.layers", without "mmbert."."""
    parts = [part for part in name.removeprefix("mmbert.").split(".") if not part.isdigit()]
    return ".".join(parts[: max(1, min(2, len(parts) - 1))])


@torch.no_grad()
def build(plan: Plan, checkpoint: Checkpoint, *, partial: bool = False) -> tuple[MMBertPreTrainedModel, Account]:
    """Build the model of a plan and copy the checkpoint into it.

    Args:
        plan: As the family of the checkpoint made it.
        checkpoint: As it was read.
        partial: Accept parameters that the checkpoint lacks, and tensors that the model has no place for.

    Returns:
        The model in evaluation mode, and what became of each tensor.

    Raises:
        UsageError: No tensor matches, one has another shape, or the load is partial and that was not allowed.
    """
    config = MMBertConfig(**plan.config)
    model = new_model(config) if plan.has_head else MMBertModel(config)
    prefix = "" if plan.has_head else "mmbert."
    account = Account([], [], [], {}, {}, [])
    used: set[str] = set()
    for name, parameter in model.state_dict().items():
        piece = plan.tensors.get(prefix + name)
        names = () if piece is None else (piece,) if isinstance(piece, str) else piece.names
        if piece is None or not all(source in checkpoint.state for source in names):
            if piece is None and prefix + name in plan.new:
                account.new[name] = plan.new[prefix + name]
            else:
                account.missing.append(name)
            continue
        value = _value(piece, checkpoint.state)
        if value.shape != parameter.shape and name.endswith(POSITIONS):
            value = _resized(value, parameter, prefix_tokens=1)
            account.resized.append(name)
        elif value.shape != parameter.shape:
            raise UsageError(
                f"'{checkpoint.source}': {' and '.join(names)} give {name} the shape {tuple(value.shape)}; the model "
                f"has {tuple(parameter.shape)}."
            )
        else:
            account.matched.append(name)
        parameter.copy_(value)
        used.update(names)
    for name in checkpoint.state:
        if name in used:
            continue
        reason = next((reason for start, reason in plan.unused.items() if name.startswith(start)), None)
        if reason is None:
            account.unknown.append(name)
        else:
            account.unused[name] = reason
    _check(account, checkpoint, partial=partial)
    return model.eval(), account


def _value(piece: str | Computed, state: State) -> Tensor:
    """Return a tensor of the checkpoint, or compute it from several, in fp32."""
    if isinstance(piece, str):
        return state[piece].float()
    return piece.function(*(state[name].float() for name in piece.names))


def _resized(value: Tensor, like: Tensor, *, prefix_tokens: int) -> Tensor:
    """Interpolate a (1, P, D) table of positions to another number of square patches."""
    side = round((like.shape[1] - prefix_tokens) ** 0.5)
    return resample_abs_pos_embed(value, [side, side], num_prefix_tokens=prefix_tokens)


def _check(account: Account, checkpoint: Checkpoint, *, partial: bool) -> None:
    """Raise on a load without any match, and on a partial one that was not allowed."""
    if not account.matched:
        raise UsageError(
            f"'{checkpoint.source}': none of its {len(checkpoint.state)} tensors, such as "
            f"'{next(iter(checkpoint.state), '')}', matches; the model lacks {_first(account.missing)}."
        )
    if account.is_partial and not partial:
        found = [
            f"{what} {_first(names)}"
            for what, names in (("it lacks", account.missing), ("there is no place for", account.unknown))
            if names
        ]
        raise UsageError(
            f"'{checkpoint.source}' does not match completely: {'; '.join(found)}. With --partial the rest is loaded."
        )


def _first(names: Iterable[str]) -> str:
    names = [*names]
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"'{names[0]}'{more}" if names else "nothing"
