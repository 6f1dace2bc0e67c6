"""The plan of an import: which tensors of a checkpoint give which parameters of an mmbert model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmbert.errors import UsageError

State = Mapping[str, Tensor]


class Computed(NamedTuple):
    """Parameter that is computed from tensors of the checkpoint."""

    names: tuple[str, ...]
    function: Callable[..., Tensor]


@dataclass
class Plan:
    """How a checkpoint becomes an mmbert model."""

    config: dict[str, Any]
    """Keys of `MMBertConfig`."""
    tensors: dict[str, str | Computed]
    """Parameter of the model -> tensor of the checkpoint."""
    new: dict[str, str] = field(default_factory=dict)
    """Parameter that no checkpoint of this family has -> the reason."""
    unused: dict[str, str] = field(default_factory=dict)
    """Tensors, by the start of their name, that the model does without -> the reason."""
    image_settings: dict[str, Any] = field(default_factory=dict)
    """Arguments of `ImageSettings` where the checkpoint has no preprocessor_config.json."""
    has_head: bool = True
    """Whether the model has heads; without, it is an `MMBertModel`."""
    max_text_length: int = 64
    """Tokens incl. [CLS] and [SEP] at which the processor truncates."""


class Checkpoint(NamedTuple):
    """A published checkpoint as it was read."""

    source: str  # for messages
    config: dict[str, Any]  # of config.json; empty without one
    state: State
    labels: tuple[str, ...] = ()  # classes of the task's head, where the user gives them

    @property
    def head(self) -> str:
        """Class name that config.json has under "architectures"; "" without one."""
        return str((self.config.get("architectures") or [""])[0])

    def value(self, key: str, default: Any) -> Any:
        """Value of config.json; `default` as transformers' configuration has it, which leaves defaults out."""
        found = self.config.get(key)
        return default if found is None else found

    def require(self, key: str, allowed: Any, default: Any) -> None:
        """Check that config.json has the value that mmbert can express.

        Raises:
            UsageError: It has another one.
        """
        value = self.value(key, default)
        if value != allowed:
            raise UsageError(f"'{self.source}': config.json has {key}={value!r}; mmbert has {allowed!r} only.")

    def class_names(self, count: int) -> list[str]:
        """Return the labels of the task's head: those given, else those of `id2label`, else "LABEL_0" and so on.

        Raises:
            UsageError: Another number of labels was given.
        """
        if self.labels:
            if len(self.labels) != count:
                raise UsageError(f"'{self.source}' has a head of {count} labels; {len(self.labels)} were given.")
            return [*self.labels]
        names = self.config.get("id2label") or {}
        return [str(names.get(str(i), names.get(i, f"LABEL_{i}"))) for i in range(count)]


Planner = Callable[[Checkpoint], Plan]


class Source(NamedTuple):
    """A family of published checkpoints, listed in `mmbert.model.importing.SOURCES`."""

    plan: Planner
    marker: str = ""
    """Part of a tensor's name that tells the family where there is no config.json; "": its files always have one."""

    def marks(self, tensor: str) -> bool:
        """Whether the name of a tensor tells that a checkpoint is of this family."""
        return self.marker != "" and self.marker in tensor


def count_layers(state: State, prefix: str) -> int:
    """Count the layers whose names start with `prefix`, "encoder.layer.": the highest number plus 1.

    Raises:
        UsageError: There is none.
    """
    numbers = {name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)}
    found = [int(number) for number in numbers if number.isdigit()]
    if not found:
        raise UsageError(f"the checkpoint has no tensor named {prefix}N...; the first is '{next(iter(state), '')}'.")
    return max(found) + 1


def shape(state: State, name: str) -> torch.Size:
    """Return the shape of a tensor that the architecture is read from.

    Raises:
        UsageError: The checkpoint lacks it.
    """
    if name not in state:
        raise UsageError(
            f"the checkpoint lacks '{name}', from which the architecture is read; it has {len(state)} tensors, the "
            f"first is '{next(iter(state), '')}'."
        )
    return state[name].shape


def flip_rows(x: Tensor) -> Tensor:
    """Reverse the order of the classes of a head."""
    return x.flip(0)
