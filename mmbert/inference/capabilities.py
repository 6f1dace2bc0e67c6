"""What a saved model was trained for, and the one sentence where that is not what is asked of it."""

from typing import Any

from torch import nn

from mmbert.errors import UsageError
from mmbert.model.modeling import MMBertForPreTraining, MMBertForTask, MMBertPreTrainedModel
from mmbert.model.tasks import TASKS, Task


def task_of(model: MMBertPreTrainedModel, name: str, *tasks: str) -> Task:
    """The head of a model that was fine-tuned for a task with one image a text.

    Args:
        model: Any model.
        name: What the message calls it.
        tasks: Tasks that will do; none: all.

    Raises:
        UsageError: It was trained for something else.
    """
    tasks = tasks or tuple(TASKS)
    if isinstance(model, MMBertForTask) and model.task.num_images == 1 and model.config.task in tasks:
        return model.task
    raise UsageError(
        f"{_trained(model, name)}; answering needs a model that was fine-tuned with model.task={' or '.join(tasks)} "
        "and one image a text: see configs/finetune/."
    )


def objectives_of(model: MMBertPreTrainedModel, name: str, purpose: str, *objectives: str) -> dict[str, Any]:
    """The heads of a pretrained model that has at least one of `objectives`.

    Args:
        model: Any model.
        name: What the message calls it.
        purpose: What they are needed for.
        objectives: Objectives that will do.

    Raises:
        UsageError: It has none of them.
    """
    found: dict[str, nn.Module] = {}
    if isinstance(model, MMBertForPreTraining):
        found = dict(model.objectives.items())
    if not any(objective in found for objective in objectives):
        raise UsageError(
            f"{_trained(model, name)}; {purpose} needs a model that was pretrained with the objective "
            f"{' or '.join(objectives)}: see model.objectives in configs/."
        )
    return found


def _trained(model: MMBertPreTrainedModel, name: str) -> str:
    if isinstance(model, MMBertForPreTraining):
        return f"'{name}' was pretrained with {', '.join(model.objectives)}"
    if isinstance(model, MMBertForTask):
        count = {0: "no image", 1: "one image"}.get(model.task.num_images, f"{model.task.num_images} images")
        return f"'{name}' was fine-tuned with model.task={model.config.task} and {count} a text"
    return f"'{name}' holds a {type(model).__name__}, which has no heads"
