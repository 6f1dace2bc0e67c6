"""Capabilities of a saved model: the heads it has, and the error where a requested one is missing."""

from typing import Any

from torch import nn

from mmbert.errors import UsageError
from mmbert.model.modeling import MMBertForPreTraining, MMBertForTask, MMBertPreTrainedModel
from mmbert.model.tasks import TASKS, Task


def task_of(model: MMBertPreTrainedModel, name: str, *tasks: str, one_image: bool = False) -> Task:
    """Return the head of a model that was fine-tuned for a task with images.

    Args:
        model: Any model.
        name: Name of the model in messages.
        tasks: Accepted tasks; none given: all.
        one_image: Accept only models with one image per text.

    Raises:
        UsageError: It was trained for another task or objective.
    """
    tasks = tasks or tuple(TASKS)
    if isinstance(model, MMBertForTask) and model.config.task in tasks:
        count = model.task.num_images
        if count == 1 or (count > 1 and not one_image):
            return model.task
    raise UsageError(
        f"{_describe_training(model, name)}; {'explaining' if one_image else 'answering'} needs a model that was "
        f"fine-tuned with model.task={' or '.join(tasks)} and {'one image' if one_image else 'images'} per text: see "
        "configs/finetune/."
    )


def objectives_of(model: MMBertPreTrainedModel, name: str, purpose: str, *objectives: str) -> dict[str, Any]:
    """Return the heads of a pretrained model that has at least one of `objectives`.

    Args:
        model: Any model.
        name: Name of the model in messages.
        purpose: What needs them, for the message.
        objectives: Objectives of which one suffices.

    Raises:
        UsageError: It has none of them.
    """
    found: dict[str, nn.Module] = {}
    if isinstance(model, MMBertForPreTraining):
        found = dict(model.objectives.items())
    if not any(objective in found for objective in objectives):
        raise UsageError(
            f"{_describe_training(model, name)}; {purpose} needs a model that was pretrained with the objective "
            f"{' or '.join(objectives)}: see model.objectives in configs/."
        )
    return found


def _describe_training(model: MMBertPreTrainedModel, name: str) -> str:
    if isinstance(model, MMBertForPreTraining):
        return f"'{name}' was pretrained with {', '.join(model.objectives)}"
    if isinstance(model, MMBertForTask):
        count = {0: "no image", 1: "one image"}.get(model.task.num_images, f"{model.task.num_images} images")
        return f"'{name}' was fine-tuned with model.task={model.config.task} and {count} per text"
    return f"'{name}' holds a {type(model).__name__}, which has no heads"
