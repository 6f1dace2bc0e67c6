"""Tasks to fine-tune for. To add one: a file in this folder, a line in `TASKS`, and a YAML in `configs/finetune/`."""

from mmbert.errors import UsageError, did_you_mean
from mmbert.model.configuration import MMBertConfig
from mmbert.model.tasks.base import Predictions, Priors, Task, TaskExample
from mmbert.model.tasks.decision import Decision
from mmbert.model.tasks.vqa import VisualQuestionAnswering

__all__ = ["TASKS", "Predictions", "Priors", "Task", "TaskExample", "build_task", "task_class"]

TASKS: dict[str, type[Task]] = {
    "vqa": VisualQuestionAnswering,
    "decision": Decision,
}


def task_class(name: str | None) -> type[Task]:
    """Return the task of that name.

    Raises:
        UsageError: There is no such task.
    """
    if name not in TASKS:
        raise UsageError(f"task={name!r} is no task; allowed are {', '.join(TASKS)}.{did_you_mean(str(name), TASKS)}")
    return TASKS[name]


def build_task(config: MMBertConfig) -> Task:
    """Build the head that `config.task` names.

    Raises:
        UsageError: An unknown task, or no labels.
    """
    return task_class(config.task)(config)
