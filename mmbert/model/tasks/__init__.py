"""Tasks to fine-tune for. To add one: a file in this folder, a line in `TASKS`, and a YAML in `configs/finetune/`."""

import inspect

from mmbert.errors import UsageError, did_you_mean
from mmbert.model.configuration import MMBertConfig
from mmbert.model.tasks.base import Predictions, Priors, Task, TaskExample
from mmbert.model.tasks.decision import Decision
from mmbert.model.tasks.vqa import VisualQuestionAnswering

__all__ = ["TASKS", "Predictions", "Priors", "Task", "TaskExample", "build_task", "task_class", "validate_task_options"]

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


def validate_task_options(config: MMBertConfig) -> None:
    """Check `config.task`, and the names and values of `config.task_options`.

    Raises:
        UsageError: An unknown task or option, an option value that is not allowed, or options without a task.
    """
    options = config.task_options or {}
    if config.task is None:
        if options:
            raise UsageError(f"task_options={options} without a task; leave them out, or set task: {', '.join(TASKS)}.")
        return
    task = task_class(config.task)
    allowed = list(inspect.signature(task).parameters)[1:]
    for option in options:
        if option not in allowed:
            raise UsageError(
                f"task_options: {config.task} has no option '{option}'; allowed are {', '.join(allowed)}."
                f"{did_you_mean(option, allowed)}"
            )
    task.check_options(**options)


def build_task(config: MMBertConfig) -> Task:
    """Build the head that `config.task` names.

    Raises:
        UsageError: See `validate_task_options`; or no labels.
    """
    validate_task_options(config)
    return task_class(config.task)(config, **config.task_options or {})
