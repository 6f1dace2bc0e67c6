"""What a model can be fine-tuned for. A new task is one file beside this, one line in the table, one YAML."""

from mmbert.errors import UsageError, did_you_mean
from mmbert.model.configuration import MMBertConfig
from mmbert.model.tasks.base import Labelled, Predictions, Priors, Task
from mmbert.model.tasks.decision import Decision
from mmbert.model.tasks.vqa import VisualQuestionAnswering

__all__ = ["TASKS", "Labelled", "Predictions", "Priors", "Task", "build_task", "task_class"]

TASKS: dict[str, type[Task]] = {
    "vqa": VisualQuestionAnswering,
    "decision": Decision,
}


def task_class(name: str | None) -> type[Task]:
    """The task of that name.

    Raises:
        UsageError: There is none.
    """
    if name not in TASKS:
        raise UsageError(f"task={name!r} is no task; allowed are {', '.join(TASKS)}.{did_you_mean(str(name), TASKS)}")
    return TASKS[name]


def build_task(config: MMBertConfig) -> Task:
    """Builds the head that `config.task` names.

    Raises:
        UsageError: An unknown task, or no labels.
    """
    return task_class(config.task)(config)
