"""Pretraining objectives. To add one: a file in this folder and a line in `OBJECTIVES`."""

import inspect
import math

from mmbert.errors import UsageError, did_you_mean
from mmbert.model.configuration import MMBertConfig
from mmbert.model.objectives.base import EncodedBatch, Objective, ObjectiveOutput, SoftTargets, combine_reads
from mmbert.model.objectives.boxes import BoxClasses
from mmbert.model.objectives.distill import TeacherDistillation
from mmbert.model.objectives.itc import ImageTextContrast
from mmbert.model.objectives.itm import ImageTextMatching
from mmbert.model.objectives.mim import MaskedImageModeling
from mmbert.model.objectives.mlm import MaskedLanguageModeling
from mmbert.model.objectives.ngrams import CaptionNGrams
from mmbert.model.objectives.rtd import ReplacedTokenDetection

__all__ = [
    "OBJECTIVES",
    "EncodedBatch",
    "Objective",
    "ObjectiveOutput",
    "SoftTargets",
    "build_objectives",
    "combine_reads",
    "validate_objective_options",
]

OBJECTIVES: dict[str, type[Objective]] = {
    "mlm": MaskedLanguageModeling,
    "itm": ImageTextMatching,
    "itc": ImageTextContrast,
    "ngrams": CaptionNGrams,
    "boxes": BoxClasses,
    "distill": TeacherDistillation,
    "rtd": ReplacedTokenDetection,
    "mim": MaskedImageModeling,
}


def validate_objective_options(config: MMBertConfig) -> None:
    """Check the names, loss weights and options in `config.objectives`, including objectives of weight 0.

    Raises:
        UsageError: An unknown objective or option, a weight that is not a number of 0 or more, or an option value that
            is not allowed.
    """
    for name, options in config.all_objective_options().items():
        if name not in OBJECTIVES:
            raise UsageError(
                f"objectives: '{name}' is no objective; allowed are {', '.join(OBJECTIVES)}."
                f"{did_you_mean(name, OBJECTIVES)}"
            )
        weight = options.pop("weight")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise UsageError(f"objectives.{name}: weight {weight!r} is not a number of 0 or more.")
        allowed = list(inspect.signature(OBJECTIVES[name]).parameters)[1:]
        for option in options:
            if option not in allowed:
                raise UsageError(
                    f"objectives.{name}: no option '{option}'; allowed are {', '.join(['weight', *allowed])}."
                    f"{did_you_mean(option, ['weight', *allowed])}"
                )
        OBJECTIVES[name].check_options(**options)


def build_objectives(config: MMBertConfig) -> dict[str, Objective]:
    """Build the objectives that `config.objectives` names with a weight above 0.

    Raises:
        UsageError: See `validate_objective_options`; no objective at all; one that does not fit the architecture, or
            reads the head of another that is missing.
    """
    validate_objective_options(config)
    enabled = config.objective_options()
    if not enabled:
        raise UsageError(f"objectives={config.objectives}: at least one needs a weight above 0.")
    for name in enabled:
        for other in OBJECTIVES[name].requires:
            if other not in enabled:
                raise UsageError(f"objectives.{name} reads the head of the objective {other}: add {other} too.")
    # In the order of the table: a saved configuration has another one, and float sums depend on it.
    return {
        name: OBJECTIVES[name](config, **{key: value for key, value in enabled[name].items() if key != "weight"})
        for name in OBJECTIVES
        if name in enabled
    }
