"""`MMBertConfig`: the architecture of a model for transformers, without paths or training options."""

import dataclasses
from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from mmbert.errors import UsageError, did_you_mean
from mmbert.model.options import KEYS, Architecture


@strict
class MMBertConfig(Architecture, PreTrainedConfig):
    """Configuration of an `MMBertModel`; see `Architecture` for the keys.

    Unlike other configurations of transformers it raises on unknown keys.

    Raises:
        UsageError: An unknown key, fusion, objective or task, or values that are out of range or contradict each other.
    """

    model_type = "mmbert"

    labels: list[str] = field(default_factory=list)
    """Classes of the task's head, in the order of its outputs; taken from the training data."""
    ngrams: list[str] = field(default_factory=list)
    """Caption n-grams of the objective ngrams, in the order of its outputs; taken from the training data."""
    num_images: int = 1
    """Images per text of the task: 2 for NLVR2, 0 for text only."""
    num_hidden_layers: int = 0  # read by generic tools of transformers; set to `fusion_layers`

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill the keys that follow from others, and check all values."""
        known = {f.name for f in dataclasses.fields(self)}
        for name in kwargs:
            if name not in known | INHERITED_KEYS and not name.startswith("_"):
                raise UsageError(f"MMBertConfig has no key '{name}'.{did_you_mean(name, KEYS)}")
        self.check()
        self.intermediate_size = self.intermediate_size or 4 * self.hidden_size
        self.text_hidden_size = self.text_hidden_size or self.hidden_size
        self.text_num_attention_heads = self.text_num_attention_heads or self.num_attention_heads
        self.text_intermediate_size = self.text_intermediate_size or 4 * self.text_hidden_size
        self.num_hidden_layers = self.fusion_layers
        self.check()
        super().__post_init__(**kwargs)

    def check(self) -> None:
        """Check all values, the names of fusion, objectives and task included.

        Raises:
            UsageError: A value that is not allowed.
        """
        # Imported here because the modules of these tables import this one.
        from mmbert.model.fusion import validate_fusion_name
        from mmbert.model.objectives import validate_objective_options
        from mmbert.model.tasks import validate_task_options

        super().check()
        if self.num_images < 0:
            raise UsageError(f"num_images={self.num_images}: must be 0 or more.")
        validate_fusion_name(self.fusion)
        validate_objective_options(self)
        validate_task_options(self)

    def all_objective_options(self) -> dict[str, dict[str, Any]]:
        """Return the options of each objective in `objectives`, including its loss weight as `weight`."""
        return {
            name: {"weight": 1.0, **value} if isinstance(value, dict) else {"weight": value}
            for name, value in self.objectives.items()
        }

    def objective_options(self) -> dict[str, dict[str, Any]]:
        """Return the same for the enabled objectives, those whose weight is not 0."""
        return {name: options for name, options in self.all_objective_options().items() if options["weight"] != 0}


# Keys that transformers itself passes to configurations, besides its declared fields.
INHERITED_KEYS = {
    "name_or_path",
    "attn_implementation",
    "output_attentions",
    "torch_dtype",
    "model_type",
    "num_labels",
}
