"""Models with encoders, fusion and heads, as `PreTrainedModel`s of transformers (save, load, Auto classes)."""

import copy
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining, PreTrainedModel
from transformers.utils.generic import ModelOutput

from mmbert.errors import UsageError
from mmbert.model.configuration import MMBertConfig
from mmbert.model.encoders import ImageEncoder, TextEncoder
from mmbert.model.fusion import FUSIONS, build_fusion
from mmbert.model.layers import FusionLayer
from mmbert.model.objectives import EncodedBatch, ObjectiveOutput, build_objectives, combine_reads
from mmbert.model.tasks import Task, build_task
from mmbert.model.tokens import READ_ALL, Fused, Reads, Tokens
from mmbert.model.weights import INDEX_FILE, shard_names


class MMBertPreTrainedModel(PreTrainedModel):
    """Base class of the models: loading, weight initialisation, activation checkpointing."""

    config_class = MMBertConfig
    config: MMBertConfig
    base_model_prefix = "mmbert"
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012 - transformers declares it so
    supports_gradient_checkpointing = True
    _supports_sdpa = True

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
        # BERT and timm compute the buffers of their own in `_init_weights`.
        remaining = lacking - values.keys() - {name for name in buffers if {"bert", "vit"} & {*name.split(".")}}
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

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, every_n_layers: int = 1
    ) -> None:
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, every_n_layers)  # BERT's layers
        for module in self.modules():
            if isinstance(module, ImageEncoder):
                module.vit.set_grad_checkpointing(enable)
            elif isinstance(module, FusionLayer):
                module.checkpointing = enable


class MMBertModel(MMBertPreTrainedModel):
    """Text encoder, image encoder, and the fusion that `config.fusion` names.

    `MMBertModel(config)` has random weights and needs no network; `mmbert.build_model` loads pretrained encoders, and
    `MMBertModel.from_pretrained` a saved model.
    """

    def __init__(self, config: MMBertConfig):
        super().__init__(config)
        self.text_encoder = TextEncoder(config)
        self.image_encoder = ImageEncoder(config)
        for module in self.image_encoder.vit.modules():
            module._belongs_to_timm = True
        self.text_projection = _projection(self.text_encoder.width, config.hidden_size)
        self.image_projection = _projection(self.image_encoder.width, config.hidden_size)
        config.image_hidden_size = self.image_encoder.width  # read by fusions that use layers of the encoder
        with real_device() if config.fusion not in FUSIONS else nullcontext():
            self.fusion = build_fusion(config)
        self._fusion_takes_reads = "reads" in inspect.signature(self.fusion.forward).parameters
        self.post_init()

    @property
    def word_embeddings(self) -> Tensor:
        """Word embedding matrix, (V, text width)."""
        return self.text_encoder.bert.embeddings.word_embeddings.weight

    def get_input_embeddings(self) -> nn.Module:
        """Return the word embedding layer."""
        return self.text_encoder.bert.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the word embedding layer."""
        self.text_encoder.bert.embeddings.word_embeddings = value

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tokens:
        """Encode (B, T) token ids to (B, T, D) tokens, projected to the width of the fusion."""
        tokens = self.text_encoder(input_ids, attention_mask, layers=self.fusion.reads_text_layers)
        return tokens._replace(hidden_states=self.text_projection(tokens.hidden_states))

    def encode_image(self, pixel_values: Tensor) -> Tokens:
        """Encode (B, 3, S, S) normalised images to (B, P, D) tokens, projected to the width of the fusion."""
        tokens = self.image_encoder(pixel_values, layers=self.fusion.reads_image_layers)
        return tokens._replace(hidden_states=self.image_projection(tokens.hidden_states))

    def encode_batch_images(self, batch: dict[str, Tensor], *, prefix: str = "") -> Tokens:
        """Encode the images of a batch to (B, P, D) tokens, or continue from those that an encoder cache holds.

        Args:
            batch: With `pixel_values` (B, 3, S, S), or `image_hidden_states` (B, P, W) of `encode_frozen`.
            prefix: Of the keys: "wrong_" for the wrong images of an evaluation.
        """
        states = batch.get(f"{prefix}image_hidden_states")
        if states is None:
            return self.encode_image(batch[f"{prefix}pixel_values"])
        depth = self.image_encoder.frozen
        assert depth != "none"
        tokens = self.image_encoder.continue_from(states, depth, layers=self.fusion.reads_image_layers)
        return tokens._replace(hidden_states=self.image_projection(tokens.hidden_states))

    def fuse(self, text: Tokens, image: Tokens, *, reads: Reads = READ_ALL) -> Fused:
        """Fuse encoded texts (B, T, D) with encoded images (B, P, D); for other pairs of a batch see `Tokens.rows`.

        Args:
            text: (B, T, D).
            image: (B, P, D).
            reads: The outputs that the caller reads. The fusion need not compute the others.
        """
        return self.fusion(text, image, reads=reads) if self._fusion_takes_reads else self.fusion(text, image)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
    ) -> Fused:
        """Encode and fuse a batch; one modality may be absent.

        Args:
            input_ids: (B, T) int64, or None for images only.
            attention_mask: (B, T), 1 = real token; None = all real.
            pixel_values: (B, 3, S, S) float, or None for text only.

        Raises:
            UsageError: Both modalities absent, or batches of different size.
        """
        if input_ids is None and pixel_values is None:
            raise UsageError("MMBertModel got neither input_ids nor pixel_values; give at least one.")
        if input_ids is not None and pixel_values is not None and len(input_ids) != len(pixel_values):
            raise UsageError(f"{len(input_ids)} texts and {len(pixel_values)} images: the batch sizes must agree.")
        width = self.config.hidden_size
        text = None if input_ids is None else self.encode_text(input_ids, attention_mask)
        image = None if pixel_values is None else self.encode_image(pixel_values)
        if text is None:
            assert image is not None
            text = Tokens.absent(len(image.mask), width, like=image.hidden_states)
        if image is None:
            image = Tokens.absent(len(text.mask), width, like=text.hidden_states)
        return self.fuse(text, image)


@dataclass
class PreTrainingOutput(ModelOutput):
    """Weighted sum of the losses, and the output of each objective or task."""

    loss: Tensor | None = None  # ()
    objectives: dict[str, ObjectiveOutput] | None = None


class MMBertForPreTraining(MMBertPreTrainedModel):
    """`MMBertModel` with the heads and losses that `config.objectives` names."""

    def __init__(self, config: MMBertConfig):
        super().__init__(config)
        self.mmbert = MMBertModel(config)
        _check_fusion_layers(self.mmbert)
        self.objectives = nn.ModuleDict(build_objectives(config))
        self.weights = {name: float(options["weight"]) for name, options in config.objective_options().items()}
        self.post_init()

    @property
    def heads(self) -> nn.Module:
        """Modules on top of the fused tokens."""
        return self.objectives

    @property
    def scorer(self) -> str:
        """Fastest objective that can rank images and captions: itc, else itm."""
        return "itc" if "itc" in self.objectives else "itm"

    def encode(self, batch: dict[str, Tensor], *, generator: torch.Generator | None = None) -> EncodedBatch:
        """Wrap a batch so that each encoding is computed once, on first use."""
        objectives: Any = self.objectives
        contrast = objectives["itc"] if "itc" in objectives else None
        return EncodedBatch(
            self.mmbert,
            batch,
            generator=generator,
            similarity=None if contrast is None else contrast.similarity,
            reads=combine_reads(objectives.values()),
        )

    def match_scores(self, text: Tokens, image: Tokens) -> Tensor:
        """Fuse encoded texts with encoded images, row by row, and score them with the head of itm.

        Args:
            text: (B, T, D).
            image: (B, P, D).

        Returns:
            (B,) log-odds that text and image match.
        """
        matching: Any = self.objectives["itm"]
        contrast: Any = self.objectives["itc"] if matching.residual_factor is not None else None
        similarity = None if contrast is None else contrast.pair_logits(text, image)
        return matching.score(self.mmbert.fuse(text, image, reads=Reads(pooled=True)).pooled, similarity)

    def after_step(self) -> None:
        """Constrain parameters after an optimizer step, such as ITC's temperature; training calls it."""
        for objective in self.objectives.values():
            objective.after_step()  # pyright: ignore[reportCallIssue]

    def forward(
        self, batch: dict[str, Tensor], *, generator: torch.Generator | None = None, only: str | None = None
    ) -> PreTrainingOutput:
        """Compute the loss of every objective on one batch.

        Args:
            batch: Tensors as `mmbert.data.pairs.Collate` builds them.
            generator: Draws ITM negatives. None: torch's global generator.
            only: Objective to compute alone; None: all.
        """
        encoded = self.encode(batch, generator=generator)
        outputs = {name: f(encoded) for name, f in self.objectives.items() if only in (None, name)}
        loss = torch.stack([self.weights[name] * output.loss for name, output in outputs.items()]).sum()
        return PreTrainingOutput(loss=loss, objectives=outputs)


class MMBertForTask(MMBertPreTrainedModel):
    """`MMBertModel` with the head of the task that `config.task` names, for the classes `config.labels`."""

    def __init__(self, config: MMBertConfig):
        super().__init__(config)
        self.mmbert = MMBertModel(config)
        _check_fusion_layers(self.mmbert)
        self.task: Task = build_task(config)
        self.post_init()

    @property
    def heads(self) -> nn.Module:
        """Modules on top of the fused tokens."""
        return self.task

    def after_step(self) -> None:
        """Constrain parameters after an optimizer step; training calls it."""
        self.task.after_step()

    def forward(self, batch: dict[str, Tensor], *, generator: torch.Generator | None = None) -> PreTrainingOutput:
        """Compute the loss of one batch.

        Args:
            batch: Tensors as `mmbert.data.labelled_samples.CollateLabelled` builds them.
            generator: Not used: tasks draw nothing.
        """
        output = self.task(EncodedBatch(self.mmbert, batch))
        return PreTrainingOutput(loss=output.loss, objectives={str(self.config.task): output})


HeadedModel = MMBertForPreTraining | MMBertForTask
"""Models with a loss."""


def real_device() -> Any:
    """Return a context without the meta device, for constructors of custom fusions that compute with tensors."""
    return torch.device("cpu") if torch.get_default_device().type == "meta" else nullcontext()


def _check_fusion_layers(model: MMBertModel) -> None:
    """Raise where the joint vector would depend on the text only."""
    minimum, given = model.fusion.min_layers, model.config.fusion_layers
    if given < minimum:
        raise UsageError(
            f"fusion_layers={given}: the joint vector of fusion='{model.config.fusion}' would not depend on the image; "
            f"it takes {minimum} or more layers."
        )


def _projection(width: int, hidden_size: int) -> nn.Module:
    """Build the projection of an encoder's tokens to the width of the fusion; the identity where they are equal."""
    return nn.Identity() if width == hidden_size else nn.Linear(width, hidden_size)


AutoConfig.register("mmbert", MMBertConfig)
AutoModel.register(MMBertConfig, MMBertModel)
AutoModelForPreTraining.register(MMBertConfig, MMBertForPreTraining)
