"""`MMBertConfig`: the architecture of a model for transformers, without paths or training options."""

import dataclasses
import logging
from dataclasses import field
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from mmbert.errors import UsageError, did_you_mean
from mmbert.model.auto_map import AUTO_MAP, write_auto_module
from mmbert.model.options import KEYS, Architecture

log = logging.getLogger("mmbert")


@strict
class MMBertConfig(Architecture, PreTrainedConfig):
    """Configuration of an `MMBertModel`; see `Architecture` for the keys.

    Unlike other configurations of transformers it raises on unknown keys; a saved configuration that has some is loaded
    without them, with a warning. `id2label` follows from `labels`, or `labels` from it.

    Raises:
        UsageError: An unknown key, fusion, objective or task, or values that are out of range or contradict each other.
    """

    model_type = "mmbert"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["objectives"]  # of outputs, by transformers' Trainer

    labels: list[str] = field(default_factory=list)
    """Classes of the task's head, in the order of its outputs; taken from the training data."""
    ngrams: list[str] = field(default_factory=list)
    """Caption n-grams of the objective ngrams, in the order of its outputs; taken from the training data."""
    box_classes: list[str] = field(default_factory=list)
    """Classes of the objective boxes, in the order of its outputs; taken from the training data."""
    num_images: int = 1
    """Images per text of the task: 2 for NLVR2, 0 for text only."""
    num_hidden_layers: int = 0  # read by generic tools of transformers; set to `fusion_layers`

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill the keys that follow from others, and check all values."""
        for name in kwargs:
            if not self._has_key(name):
                raise UsageError(f"MMBertConfig has no key '{name}'.{did_you_mean(name, KEYS)}")
        self._match_labels()
        self.check()
        self.intermediate_size = self.intermediate_size or 4 * self.hidden_size
        self.text_hidden_size = self.text_hidden_size or self.hidden_size
        self.text_num_attention_heads = self.text_num_attention_heads or self.num_attention_heads
        self.text_intermediate_size = self.text_intermediate_size or 4 * self.text_hidden_size
        self.num_hidden_layers = self.fusion_layers
        self.check()
        super().__post_init__(**kwargs)

    def _match_labels(self) -> None:
        """Set `id2label` from `labels`, or for a task without labels `labels` from `id2label`."""
        names = {int(number): str(name) for number, name in (self.id2label or {}).items()}
        defaults = {number: f"LABEL_{number}" for number in names}
        if self.task is not None and not self.labels and names != defaults:
            self.labels = [names[number] for number in sorted(names)]
        if self.labels:
            self.id2label = dict(enumerate(self.labels))
            self.label2id = {name: number for number, name in self.id2label.items()}

    @classmethod
    def _has_key(cls, name: str) -> bool:
        return name in {f.name for f in dataclasses.fields(cls)} | INHERITED_KEYS or name.startswith("_")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build from a saved configuration; unknown keys, as other versions write them, are left out with a warning."""
        unknown = [name for name in config_dict if not cls._has_key(name)]
        if unknown:
            log.warning("the saved configuration has keys that MMBertConfig does not know: %s", ", ".join(unknown))
        return super().from_dict({k: v for k, v in config_dict.items() if k not in unknown}, **kwargs)

    def save_pretrained(self, save_directory: Any, *arguments: Any, **options: Any) -> Any:
        """Write config.json, and the module that finds the classes with `trust_remote_code`; see `auto_map`."""
        self.auto_map = dict(AUTO_MAP)
        write_auto_module(save_directory)
        return super().save_pretrained(save_directory, *arguments, **options)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Do nothing: transformers would copy the source of the class into saved folders."""

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
    "use_cache",
    "tie_word_embeddings",
    "auto_map",
    "experts_implementation",
}
