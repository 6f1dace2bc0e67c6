"""`MMBertConfig`: the architecture and nothing else (no paths, no learning rates)."""

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

    Unlike other configurations of transformers it refuses keys that it does not know.

    Raises:
        UsageError: An unknown key, strategy or objective, or values that do not fit together.
    """

    model_type = "mmbert"

    labels: list[str] = field(default_factory=list)
    """What the task chooses from, in the order of the head's outputs; taken from the training data."""
    num_images: int = 1
    """Images of each text of the task: two for NLVR2, 0 for text alone."""
    num_hidden_layers: int = 0  # for tools that ask every config; filled from `fusion_layers`

    def __post_init__(self, **kwargs: Any) -> None:
        """Fills what follows from other keys and checks the whole."""
        known = {f.name for f in dataclasses.fields(self)}
        for name in kwargs:
            if name not in known | INHERITED_KEYS and not name.startswith("_"):
                raise UsageError(f"MMBertConfig has no key '{name}'.{did_you_mean(name, KEYS)}")
        self.intermediate_size = self.intermediate_size or 4 * self.hidden_size
        self.text_hidden_size = self.text_hidden_size or self.hidden_size
        self.text_num_attention_heads = self.text_num_attention_heads or self.num_attention_heads
        self.text_intermediate_size = self.text_intermediate_size or 4 * self.text_hidden_size
        self.num_hidden_layers = self.fusion_layers
        self.check()
        super().__post_init__(**kwargs)

    def all_objective_options(self) -> dict[str, dict[str, Any]]:
        """The objectives that are named, each with its options and its `weight`."""
        return {
            name: {"weight": 1.0, **value} if isinstance(value, dict) else {"weight": value}
            for name, value in self.objectives.items()
        }

    def objective_options(self) -> dict[str, dict[str, Any]]:
        """The same of those in use; a weight of 0 leaves one out."""
        return {name: own for name, own in self.all_objective_options().items() if own["weight"] != 0}


# What transformers itself passes around in configurations, on top of its declared fields.
INHERITED_KEYS = {
    "name_or_path",
    "attn_implementation",
    "output_attentions",
    "torch_dtype",
    "model_type",
    "num_labels",
}
