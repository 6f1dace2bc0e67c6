"""The models: encoders, fusion and heads in transformers' clothes (save, load, Auto classes)."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining, PreTrainedModel
from transformers.utils.generic import ModelOutput

from mmbert.errors import DataError, UsageError, quote
from mmbert.model.configuration import MMBertConfig
from mmbert.model.encoders import ImageEncoder, TextEncoder
from mmbert.model.fusion import build_fusion
from mmbert.model.layers import FusionLayer
from mmbert.model.objectives import EncodedBatch, ObjectiveOutput, build_objectives
from mmbert.model.tasks import Task, build_task
from mmbert.model.tokens import Fused, Tokens


class MMBertPreTrainedModel(PreTrainedModel):
    """What the models share: configuration class, weight initialisation, activation checkpointing."""

    config_class = MMBertConfig
    config: MMBertConfig
    base_model_prefix = "mmbert"
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012 - transformers declares it so
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **options: Any) -> Any:
        """Loads a saved model from a folder or the hub, from safetensors only: the other format is code.

        Raises:
            DataError: The folder's index names a file outside of the folder.
            OSError: Nothing to load there.
        """
        index = Path(str(pretrained_model_name_or_path)) / "model.safetensors.index.json"
        if index.is_file():
            for shard in set(json.loads(index.read_text())["weight_map"].values()):
                if Path(shard).name != shard or (index.parent / shard).is_symlink():
                    raise DataError(f"{index}:weight_map", quote(shard), "a file in the same folder")
        return super().from_pretrained(pretrained_model_name_or_path, *args, **{**options, "use_safetensors": True})

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draws the weights of the fusion part and the heads.

        transformers would redraw the ViT as well and so destroy what timm initialised or loaded; on its meta device
        nothing of timm survives, though, so the buffers that no checkpoint holds are computed again.
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
    """Text encoder, image encoder and the fusion that `config.fusion` names.

    `MMBertModel(config)` builds with random weights and needs no network; `mmbert.build_model` loads pretrained
    encoders, `MMBertModel.from_pretrained` a saved model.
    """

    def __init__(self, config: MMBertConfig):
        super().__init__(config)
        self.text_encoder = TextEncoder(config)
        self.image_encoder = ImageEncoder(config)
        for module in self.image_encoder.vit.modules():
            module._belongs_to_timm = True
        self.text_projection = _projection(self.text_encoder.width, config.hidden_size)
        self.image_projection = _projection(self.image_encoder.width, config.hidden_size)
        config.image_hidden_size = self.image_encoder.width  # a strategy that reads its layers must know
        self.fusion = build_fusion(config)
        self.post_init()

    @property
    def word_embeddings(self) -> Tensor:
        """The (V, text width) matrix of word embeddings."""
        return self.text_encoder.bert.embeddings.word_embeddings.weight

    def get_input_embeddings(self) -> nn.Module:
        """The word embedding layer."""
        return self.text_encoder.bert.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replaces the word embedding layer."""
        self.text_encoder.bert.embeddings.word_embeddings = value

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tokens:
        """(B, T) token ids to (B, T, D) tokens, in the width of the fusion part."""
        tokens = self.text_encoder(input_ids, attention_mask, layers=self.fusion.reads_text_layers)
        return tokens._replace(hidden_states=self.text_projection(tokens.hidden_states))

    def encode_image(self, pixel_values: Tensor) -> Tokens:
        """(B, 3, S, S) normalised images to (B, P, D) tokens, in the width of the fusion part."""
        tokens = self.image_encoder(pixel_values, layers=self.fusion.reads_image_layers)
        return tokens._replace(hidden_states=self.image_projection(tokens.hidden_states))

    def fuse(self, text: Tokens, image: Tokens) -> Fused:
        """Fuses encoded text (B, T, D) with encoded images (B, P, D); pairs may be made anew, see `Tokens.rows`."""
        return self.fusion(text, image)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
    ) -> Fused:
        """Encodes and fuses; either modality may be absent.

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
    """The weighted sum of the objectives' losses, and each objective's own output."""

    loss: Tensor | None = None  # ()
    objectives: dict[str, ObjectiveOutput] | None = None


class MMBertForPreTraining(MMBertPreTrainedModel):
    """An `MMBertModel` with the heads and losses that `config.objectives` names."""

    def __init__(self, config: MMBertConfig):
        super().__init__(config)
        self.mmbert = MMBertModel(config)
        _check_fusion_reaches_both(self.mmbert)
        self.objectives = nn.ModuleDict(build_objectives(config))
        self.weights = {name: float(options["weight"]) for name, options in config.objective_options().items()}
        self.post_init()

    @property
    def heads(self) -> nn.Module:
        """What stands on the fused tokens."""
        return self.objectives

    @property
    def scorer(self) -> str:
        """The cheapest objective that can rank images and captions: itc, else itm."""
        return "itc" if "itc" in self.objectives else "itm"

    def encode(self, batch: dict[str, Tensor], *, generator: torch.Generator | None = None) -> EncodedBatch:
        """Wraps a batch so that its encodings are computed once, on first use."""
        contrast: Any = self.objectives["itc"] if "itc" in self.objectives else None
        similarity = None if contrast is None else contrast.similarity
        return EncodedBatch(self.mmbert, batch, generator=generator, similarity=similarity)

    def after_step(self) -> None:
        """Constrain parameters after an optimizer step, such as ITC's temperature; training calls it."""
        for objective in self.objectives.values():
            objective.after_step()  # pyright: ignore[reportCallIssue]

    def forward(self, batch: dict[str, Tensor], *, generator: torch.Generator | None = None) -> PreTrainingOutput:
        """Computes every objective on one batch.

        Args:
            batch: See `mmbert.data.collate` for its keys.
            generator: Draws ITM's negatives; None draws from torch's global state.
        """
        encoded = self.encode(batch, generator=generator)
        outputs = {name: objective(encoded) for name, objective in self.objectives.items()}
        loss = torch.stack([self.weights[name] * output.loss for name, output in outputs.items()]).sum()
        return PreTrainingOutput(loss=loss, objectives=outputs)


class MMBertForTask(MMBertPreTrainedModel):
    """An `MMBertModel` with the head of the task that `config.task` names; `config.labels` are what it chooses from."""

    def __init__(self, config: MMBertConfig):
        super().__init__(config)
        self.mmbert = MMBertModel(config)
        _check_fusion_reaches_both(self.mmbert)
        self.task: Task = build_task(config)
        self.post_init()

    @property
    def heads(self) -> nn.Module:
        """What stands on the fused tokens."""
        return self.task

    def after_step(self) -> None:
        """Constrain parameters after an optimizer step; a task has none."""

    def forward(self, batch: dict[str, Tensor], *, generator: torch.Generator | None = None) -> PreTrainingOutput:
        """Computes the loss of one batch.

        Args:
            batch: See `mmbert.data.labelled_samples.CollateLabelled` for its keys.
            generator: Not used; a task draws nothing.
        """
        output = self.task(EncodedBatch(self.mmbert, batch))
        return PreTrainingOutput(loss=output.loss, objectives={str(self.config.task): output})


HeadedModel = MMBertForPreTraining | MMBertForTask
"""What can be trained."""


def _check_fusion_reaches_both(model: MMBertModel) -> None:
    least, given = model.fusion.least_layers, model.config.fusion_layers
    if given < least:
        raise UsageError(
            f"fusion_layers={given}: the joint vector of fusion='{model.config.fusion}' would know the text only; it "
            f"takes {least} or more."
        )


def _projection(width: int, hidden_size: int) -> nn.Module:
    """Brings an encoder's width to that of the fusion part; encoders that have it already stay untouched."""
    return nn.Identity() if width == hidden_size else nn.Linear(width, hidden_size)


AutoConfig.register("mmbert", MMBertConfig)
AutoModel.register(MMBertConfig, MMBertModel)
AutoModelForPreTraining.register(MMBertConfig, MMBertForPreTraining)
