"""`MMBertPreTrainedModel`: what the models inherit: loading, weight initialisation, recording of states."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from mmbert.errors import UsageError
from mmbert.model.configuration import MMBertConfig
from mmbert.model.encoders import ImageEncoder
from mmbert.model.layers import FusionLayer
from mmbert.model.outputs import record_states
from mmbert.model.weights import INDEX_FILE, shard_names

BLOCKS = (
    *("BertEmbeddings", "BertLayer", "CLIPEncoderLayer", "FlavaTextLayer"),
    *("TransformerBlock", "ModernBertEncoderLayer", "DebertaV2Layer"),
    *("SelfAttentionLayer", "CrossAttentionLayer"),
)
"""Classes of modules that stay on one device where a model is spread over several."""


class MMBertPreTrainedModel(PreTrainedModel):
    """Base class of the models: loading, weight initialisation, activation checkpointing."""

    config_class = MMBertConfig
    config: MMBertConfig
    base_model_prefix = "mmbert"
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012 - transformers declares it so
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # transformers' Trainer then divides by the number of accumulated batches itself
    _supports_sdpa = True
    _no_split_modules = [*BLOCKS]  # noqa: RUF012

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **options: Any) -> Any:
        """Load a saved model from a folder or the hub, from safetensors only: other formats can hold code.

        Parameters that the file lacks keep the values that the constructor draws, and are reported as newly
        initialized; `mmbert.load` raises on them instead.

        Raises:
            DataError: The folder's index names a file outside of the folder.
            UsageError: The file has no tensor of the model at all.
            OSError: Nothing to load there.
        """
        index = Path(str(pretrained_model_name_or_path)) / INDEX_FILE
        if index.is_file():
            shard_names(index)  # checks them
        with_report = options.pop("output_loading_info", False)
        generator_state = torch.get_rng_state()
        options |= {"use_safetensors": True, "output_loading_info": True}
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, **options)
        model, report = loaded
        missing = report["missing_keys"]
        if not missing and not report["mismatched_keys"]:
            torch.set_rng_state(generator_state)  # nothing that was drawn is left
        if len(missing) >= len(model.state_dict()):
            raise UsageError(
                f"'{pretrained_model_name_or_path}': none of the weights in the file belongs to a {cls.__name__}; the "
                f"first it lacks is '{min(missing)}'."
            )
        return (model, report) if with_report else model

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Do nothing: transformers would copy the source of the class into saved folders."""

    @torch.no_grad()
    def _move_missing_keys_from_meta_to_device(self, missing_keys: Any, *args: Any) -> None:
        """Give what the file lacks, and non-persistent buffers, the values that the constructor computes.

        transformers loads into a model on the meta device and leaves the rest to `_init_weights`, which can't know raw
        parameters and buffers: these would be uninitialised memory.
        """
        buffers = {name for name, _ in self.named_non_persistent_buffers()}
        lacking = {*missing_keys, *buffers}
        values = {name: x for name in lacking if not (x := self.get_parameter_or_buffer(name)).is_meta}
        super()._move_missing_keys_from_meta_to_device(missing_keys, *args)
        # Text encoders and timm compute the buffers of their own in `_init_weights`.
        own = {name for name in buffers if {"text_encoder", "vit"} & {*name.split(".")}}
        remaining = lacking - values.keys() - own
        if remaining:
            fresh = type(self)(copy.deepcopy(self.config))
            values |= {name: fresh.get_parameter_or_buffer(name) for name in remaining}
        for name, value in values.items():
            tensor = self.get_parameter_or_buffer(name)
            tensor.copy_(value)
            tensor._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue] - read by transformers

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw the weights of Linear, LayerNorm and Embedding modules of the fusion and the heads.

        Raw parameters and timm's modules keep their own values; timm's non-persistent buffers are computed again.
        """
        if getattr(module, "_belongs_to_timm", False):
            recompute = getattr(module, "init_non_persistent_buffers", None)
            if recompute is not None:
                recompute()
            return
        super()._init_weights(module)

    def _record(self, output_attentions: bool | None, output_hidden_states: bool | None) -> Any:
        """Record hidden states and attention weights where they are requested; see `record_states`."""
        config = self.config
        return record_states(
            getattr(self, "mmbert", self),
            hidden_states=bool(config.output_hidden_states if output_hidden_states is None else output_hidden_states),
            attentions=bool(config.output_attentions if output_attentions is None else output_attentions),
        )

    def _returned(self, output: Any, return_dict: bool | None) -> Any:
        """Convert an output to a tuple where it is requested."""
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, every_n_layers: int = 1
    ) -> None:
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, every_n_layers)  # BERT's layers
        for module in self.modules():
            if isinstance(module, ImageEncoder):
                module.vit.set_grad_checkpointing(enable)
            elif isinstance(module, FusionLayer):
                module.checkpointing = enable


def check_keywords(first: Any, others: dict[str, Any], training_keys: tuple[str, ...]) -> None:
    """Raise on keywords that are no training batch, and on a batch that is passed as one argument."""
    if isinstance(first, dict):
        raise UsageError("the model got a dict; pass the batch as keywords: model(**batch).")
    if others and not any(name in others for name in training_keys):
        raise UsageError(f"the model takes no {', '.join(others)}; a training batch also has {training_keys[0]}.")
