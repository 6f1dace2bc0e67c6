"""The pretraining objectives. A new one is one file beside this and one line in the table."""

import inspect
import math

from mmbert.errors import UsageError, did_you_mean
from mmbert.model.configuration import MMBertConfig
from mmbert.model.objectives.base import EncodedBatch, Objective, ObjectiveOutput
from mmbert.model.objectives.itc import ImageTextContrast
from mmbert.model.objectives.itm import ImageTextMatching
from mmbert.model.objectives.mlm import MaskedLanguageModeling

__all__ = ["OBJECTIVES", "EncodedBatch", "Objective", "ObjectiveOutput", "build_objectives"]

OBJECTIVES: dict[str, type[Objective]] = {
    "mlm": MaskedLanguageModeling,
    "itm": ImageTextMatching,
    "itc": ImageTextContrast,
}


def build_objectives(config: MMBertConfig) -> dict[str, Objective]:
    """Builds the objectives that `config.objectives` names, with their options.

    Raises:
        UsageError: An unknown objective or option, a weight that is no number, or no objective at all.
    """
    built, used = {}, config.objective_options()
    for name, options in config.all_objective_options().items():  # a mistake is one where the weight is 0, too
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
        if name in used:
            built[name] = OBJECTIVES[name](config, **options)
    if not built:
        raise UsageError(f"objectives={config.objectives}: at least one needs a weight above 0.")
    # In the table's order: a saved configuration has its own, and sums in another order differ in their last bit.
    return {name: built[name] for name in OBJECTIVES if name in built}
