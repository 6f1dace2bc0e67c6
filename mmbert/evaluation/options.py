"""Options of the section `evaluation`, and the names of the scorers."""

from collections.abc import Collection
from dataclasses import dataclass

from mmbert.errors import UsageError

SCORER_CHOICES = ("auto", "itc", "itm")
"""Allowed values of `EvaluationOptions.val_scorer` and `test_scorer`."""
RETRIEVAL_SCORERS = ("itc", "itm", "two_stage")
"""Names in `mmbert.evaluation.retrieval.SCORERS`, listed here for the command line, which must start without torch."""
FOIL_SCORERS = ("itm", "itc")
"""Objectives that can score foils, the preferred one first."""
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")
"""Precisions of training and evaluation, by Lightning's names: weights stay in fp32."""


@dataclass(kw_only=True)
class EvaluationOptions:
    """How a pretrained model ranks images and captions in validation and test."""

    val_scorer: str = "auto"
    """Scorer that ranks images and captions in validation: itc (contrastive vectors), itm (matching head on every
    pair), or auto: itc if the model has it."""
    test_scorer: str = "auto"
    """The same for the final test. To compare strategies use itm for all: it fuses every image with every caption, so
    `test_images` squared pairs."""
    val_images: int = 200
    """Images, with one caption per image, that are ranked in validation: a fixed sample; 0 ranks none."""
    test_images: int = 1000
    """The same for the final test."""

    def check(self) -> None:
        """Check the values.

        Raises:
            UsageError: An unknown scorer, or a negative number of images.
        """
        for name in ("val_scorer", "test_scorer"):
            if getattr(self, name) not in SCORER_CHOICES:
                raise UsageError(f"evaluation.{name}='{getattr(self, name)}'; allowed are {', '.join(SCORER_CHOICES)}.")
        for name in ("val_images", "test_images"):
            if getattr(self, name) < 0:
                raise UsageError(f"evaluation.{name}={getattr(self, name)}: must be 1 or more, or 0 to rank nothing.")

    def validate_objectives(self, objectives: Collection[str]) -> None:
        """Check that a model with these objectives has the scorers.

        Raises:
            UsageError: It has not; the message names those it has.
        """
        for split in ("val", "test"):
            name = f"{split}_scorer"
            scorer = getattr(self, name)
            if scorer != "auto" and scorer not in objectives and getattr(self, f"{split}_images"):
                allowed = ", ".join(["auto", *(choice for choice in SCORER_CHOICES if choice in objectives)])
                raise UsageError(
                    f"evaluation.{name}='{scorer}', but the model has no objective {scorer}; allowed are {allowed}."
                )
