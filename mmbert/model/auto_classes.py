"""Classes for one task each, as transformers names them, and their registration with its Auto classes."""

import copy
from typing import Any, ClassVar

from torch import Tensor
from transformers import AutoModelForVisualQuestionAnswering

from mmbert.errors import UsageError
from mmbert.model.configuration import MMBertConfig
from mmbert.model.modeling import MMBertForPreTraining, MMBertForTask


def _set_task(config: MMBertConfig, task: str, name: str) -> MMBertConfig:
    """Return a copy of a configuration, with the task where it has none.

    Raises:
        UsageError: It has another one.
    """
    if config.task not in (None, task):
        raise UsageError(f"{name} takes task='{task}'; this configuration has task='{config.task}'.")
    config = copy.deepcopy(config)
    config.task = task
    return config


class MMBertForQuestionAnswering(MMBertForTask):
    """`MMBertForTask` for visual question answering: one of `config.labels` for a question about an image."""

    def __init__(self, config: MMBertConfig):
        super().__init__(_set_task(config, "vqa", type(self).__name__))


class MMBertForPairClassification(MMBertForTask):
    """`MMBertForTask` that classifies a text with its images, as in SNLI-VE or NLVR2, into `config.labels`."""

    def __init__(self, config: MMBertConfig):
        super().__init__(_set_task(config, "decision", type(self).__name__))


class MMBertForImageTextRetrieval(MMBertForPreTraining):
    """`MMBertForPreTraining` with the objectives itm and itc only; other heads of a saved model are left out.

    Raises:
        UsageError: The configuration has neither objective.
    """

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"^objectives\.(?!itm\.|itc\.)"]

    def __init__(self, config: MMBertConfig):
        config = copy.deepcopy(config)
        kept = {name: value for name, value in config.objectives.items() if name in ("itm", "itc")}
        config.objectives = kept
        if not config.objective_options():
            raise UsageError(
                f"{type(self).__name__} needs the objective itm or itc; set objectives={{itm: 1, itc: 1}}."
            )
        super().__init__(config)

    def forward(self, *args: Any, labels: Tensor | None = None, **inputs: Any) -> Any:
        """See `MMBertForPreTraining.forward`; `labels` are its `match_labels`."""
        return super().forward(*args, match_labels=labels, **inputs)


TASK_CLASSES: dict[str, type[MMBertForTask]] = {
    "vqa": MMBertForQuestionAnswering,
    "decision": MMBertForPairClassification,
}
"""Task -> its class."""

AutoModelForVisualQuestionAnswering.register(MMBertConfig, MMBertForQuestionAnswering)
