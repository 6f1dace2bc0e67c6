"""Options of the section `evaluation`: how a pretrained model ranks images and captions during a run."""

from collections.abc import Collection
from dataclasses import dataclass

from mmbert.errors import UsageError

SCORERS = ("auto", "itc", "itm")


@dataclass(kw_only=True)
class EvaluationOptions:
    """How a pretrained model is judged."""

    val_scorer: str = "auto"
    """What ranks images and captions in validation: itc (contrastive), itm (matching head on every pair), or auto: itc
    where the model has it."""
    test_scorer: str = "auto"
    """The same for the final test. To compare strategies use itm for all; it fuses every image with every caption."""
    val_images: int = 200
    """Images, with one caption each, that are ranked in validation: a fixed sample."""
    test_images: int = 1000
    """The same for the final test."""

    def check(self) -> None:
        """Refuses what can't be meant.

        Raises:
            UsageError: An unknown scorer.
        """
        for name in ("val_scorer", "test_scorer"):
            if getattr(self, name) not in SCORERS:
                raise UsageError(f"evaluation.{name}='{getattr(self, name)}'; allowed are {', '.join(SCORERS)}.")
        for name in ("val_images", "test_images"):
            if getattr(self, name) < 0:
                raise UsageError(f"evaluation.{name}={getattr(self, name)}: 1 or more, or 0 to rank nothing.")

    def validate_objectives(self, objectives: Collection[str]) -> None:
        """Refuses a scorer that a model with these objectives lacks.

        Raises:
            UsageError: With those it has.
        """
        for split in ("val", "test"):
            name = f"{split}_scorer"
            asked = getattr(self, name)
            if asked != "auto" and asked not in objectives and getattr(self, f"{split}_images"):
                having = ", ".join(["auto", *(scorer for scorer in SCORERS if scorer in objectives)])
                raise UsageError(
                    f"evaluation.{name}='{asked}', but the model has no objective {asked}; it has {having}."
                )
