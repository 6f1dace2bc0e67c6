"""Models with encoders, fusion and heads, as `PreTrainedModel`s of transformers (save, load, Auto classes)."""

import copy
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining, PreTrainedModel

from mmbert.errors import UsageError
from mmbert.model.configuration import MMBertConfig
from mmbert.model.encoders import ImageEncoder, TextEncoder
from mmbert.model.fusion import FUSIONS, build_fusion
from mmbert.model.layers import FusionLayer
from mmbert.model.objectives import EncodedBatch, build_objectives, combine_reads
from mmbert.model.objectives.base import Batch
from mmbert.model.outputs import MMBertOutput, PreTrainingOutput, TaskOutput, is_recording, record_states
from mmbert.model.tasks import Task, build_task
from mmbert.model.tokens import IGNORE_INDEX, READ_ALL, Fused, Reads, Tokens
from mmbert.model.weights import INDEX_FILE, shard_names
from mmbert.runtime.randomness import torch_generator


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
    _no_split_modules = ["BertEmbeddings", "BertLayer", "SelfAttentionLayer", "CrossAttentionLayer"]  # noqa: RUF012

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

    def encode_text(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tokens:
        """Encode (B, T) token ids to (B, T, D) tokens, projected to the width of the fusion."""
        layers = self.fusion.reads_text_layers
        tokens = self.text_encoder(input_ids, attention_mask, token_type_ids, layers=layers)
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
        reads = READ_ALL if is_recording() else reads
        return self.fusion(text, image, reads=reads) if self._fusion_takes_reads else self.fusion(text, image)

    def encode_pairs(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
    ) -> tuple[Tokens, Tokens]:
        """Encode texts and images, of which one may be absent; see `forward`.

        Returns:
            Text (B, T, D) and image (B, P, D); an absent one has length 0.
        """
        if input_ids is None and pixel_values is None:
            raise UsageError(f"{type(self).__name__} got neither input_ids nor pixel_values; give at least one.")
        if input_ids is not None and pixel_values is not None and input_ids.shape[0] != pixel_values.shape[0]:
            raise UsageError(
                f"{input_ids.shape[0]} texts and {pixel_values.shape[0]} images: the batch sizes must agree."
            )
        width = self.config.hidden_size
        text = None if input_ids is None else self.encode_text(input_ids, attention_mask, token_type_ids)
        image = None if pixel_values is None else self.encode_image(pixel_values)
        if text is None:
            assert image is not None
            text = Tokens.absent(image.mask.shape[0], width, like=image.hidden_states)
        if image is None:
            image = Tokens.absent(text.mask.shape[0], width, like=text.hidden_states)
        return text, image

    def encode_and_fuse(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
    ) -> Fused:
        """Encode and fuse a batch as `forward` does, but return tokens with their masks."""
        return self.fuse(*self.encode_pairs(input_ids, attention_mask, token_type_ids, pixel_values))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MMBertOutput | tuple[Any, ...]:
        """Encode and fuse a batch; one modality may be absent.

        Args:
            input_ids: (B, T) int64, or None for images only.
            attention_mask: (B, T), 1 = real token; None = all real.
            token_type_ids: (B, T) segments of the text, as BERT's; None = all 0.
            pixel_values: (B, 3, S, S) float, or None for text only.
            output_attentions: Return `attentions`. None: as the configuration says.
            output_hidden_states: Return `hidden_states`. None: as the configuration says.
            return_dict: False: a tuple of the outputs that are not None. None: as the configuration says.

        Raises:
            UsageError: Both modalities absent, or batches of different size.
        """
        with self._record(output_attentions, output_hidden_states) as recorded:
            fused = self.encode_and_fuse(input_ids, attention_mask, token_type_ids, pixel_values)
            output = MMBertOutput(
                fused.text.hidden_states, fused.image.hidden_states, fused.pooled, **recorded.outputs()
            )
        return self._returned(output, return_dict)


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

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **options: Any) -> nn.Embedding:
        """Resize the word embeddings as transformers does, and the bias of the objective mlm; new biases are 0."""
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **options)
        if "mlm" in self.objectives:
            head: Any = self.objectives["mlm"]
            rows = embeddings.weight.shape[0] - head.bias.shape[0]
            head.bias = nn.Parameter(F.pad(head.bias.detach(), (0, rows)), requires_grad=head.bias.requires_grad)
        return embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        match_labels: Tensor | None = None,
        return_loss: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        generator: torch.Generator | None = None,
        only: str | None = None,
        **training_batch: Any,
    ) -> PreTrainingOutput | tuple[Any, ...]:
        """Compute the logits of every head; or, given a training batch as keywords, the losses of the objectives.

        With logits the loss is the weighted sum of the losses whose labels are given; text and image i are a pair.

        Args:
            input_ids: (B, T) int64, for a loss of mlm with masked tokens; None for images only.
            attention_mask: (B, T), 1 = real token; None = all real.
            token_type_ids: (B, T) segments of the text, as BERT's; None = all 0.
            pixel_values: (B, 3, S, S) float, or None for text only.
            labels: (B, T) int64 tokens to predict, `IGNORE_INDEX` elsewhere, for the loss of mlm.
            match_labels: (B,) int64, 1 = text and image match, for the loss of itm.
            return_loss: Add the loss of itc, in which all other pairs of the batch mismatch.
            output_attentions: Return `attentions`. None: as the configuration says.
            output_hidden_states: Return `hidden_states`. None: as the configuration says.
            return_dict: False: a tuple of the outputs that are not None. None: as the configuration says.
            generator: For a training batch: draws ITM negatives. None: torch's global generator in training, and always
                the same negatives in evaluation mode.
            only: For a training batch: objective to compute alone; None: all.
            training_batch: Further keys of a batch as `mmbert.data.pairs.Collate` builds it.

        Raises:
            UsageError: Inputs that the model does not take, or labels of a head that it lacks.
        """
        batch = {
            "input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids,
            "pixel_values": pixel_values,
        }  # fmt: skip
        _check_keywords(input_ids, training_batch, self.training_keys)
        if training_batch:
            given = {name: value for name, value in batch.items() if value is not None}
            return self.compute_losses({**training_batch, **given}, generator=generator, only=only)
        with self._record(output_attentions, output_hidden_states) as recorded:
            logits = self._head_logits(*self.mmbert.encode_pairs(**batch))
        loss = self._labelled_loss(logits, labels, match_labels, bool(return_loss))
        return self._returned(PreTrainingOutput(loss=loss, **logits, **recorded.outputs()), return_dict)

    training_keys = ("mlm_labels", "image_key", "ngram_ids", "index")
    """Keys of which a training batch has at least one."""

    def compute_losses(
        self, batch: Batch, *, generator: torch.Generator | None = None, only: str | None = None
    ) -> PreTrainingOutput:
        """Compute the loss of every objective on one training batch; see `forward`."""
        if generator is None and not self.training:
            generator = torch_generator(0, "negatives", 0)
        encoded = self.encode(batch, generator=generator)
        outputs = {name: f(encoded) for name, f in self.objectives.items() if only in (None, name)}
        loss = torch.stack([self.weights[name] * output.loss for name, output in outputs.items()]).sum()
        return PreTrainingOutput(loss=loss, objectives=outputs)

    def _head_logits(self, text: Tokens, image: Tokens) -> dict[str, Tensor]:
        """Compute the logits in a `PreTrainingOutput`; those that compare text and image only where both are there."""
        heads: dict[str, Any] = dict(self.objectives.items())
        fused, output = self.mmbert.fuse(text, image), dict[str, Tensor]()
        has_text, has_both = text.mask.shape[1] > 0, text.mask.shape[1] > 0 and image.mask.shape[1] > 0
        if "mlm" in heads and has_text:
            output["mlm_logits"] = heads["mlm"].logits(fused.text.hidden_states, self.mmbert.word_embeddings)
        if "itm" in heads and has_both:
            has_residual = heads["itm"].residual_factor is not None
            similarity = heads["itc"].pair_logits(text, image) if has_residual else None
            output["itm_logits"] = heads["itm"].logits(fused.pooled, similarity)
        if "itc" in heads and has_both:
            itc = heads["itc"]
            output["logits_per_text"] = itc.logits(itc.embed_text(text), itc.embed_image(image))
            output["logits_per_image"] = output["logits_per_text"].T
        return output

    def _labelled_loss(
        self, logits: dict[str, Tensor], labels: Tensor | None, match_labels: Tensor | None, return_loss: bool
    ) -> Tensor | None:
        """Compute the weighted sum of the losses whose labels are given; None without any."""
        requested = {
            "mlm": ("mlm_logits", labels is not None),
            "itm": ("itm_logits", match_labels is not None),
            "itc": ("logits_per_text", return_loss),
        }
        losses: list[Tensor] = []
        for name, (key, is_requested) in requested.items():
            if not is_requested:
                continue
            if key not in logits:
                raise UsageError(f"a loss of {name} needs the objective {name}, input_ids and pixel_values.")
            rows, targets = logits[key], labels if name == "mlm" else match_labels
            if name == "itc":
                rows, targets = torch.cat([rows, rows.T]), torch.arange(rows.shape[0], device=rows.device).repeat(2)
            assert targets is not None
            loss = F.cross_entropy(rows.flatten(0, -2), targets.flatten(), ignore_index=IGNORE_INDEX)
            losses.append(self.weights[name] * loss)
        return torch.stack(losses).sum() if losses else None


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

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        generator: torch.Generator | None = None,
        **training_batch: Any,
    ) -> TaskOutput | tuple[Any, ...]:
        """Classify texts with their images; with labels also compute the loss.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, T), 1 = real token; None = all real.
            token_type_ids: (B, T) segments of the text, as BERT's; None = all 0.
            pixel_values: (B * N, 3, S, S) or (B, N, 3, S, S) float, the N images of a text in sequence.
            labels: (B,) int64 classes, -1 for none of them, or (B, labels) scores from 0 to 1.
            output_attentions: Return `attentions`. None: as the configuration says.
            output_hidden_states: Return `hidden_states`. None: as the configuration says.
            return_dict: False: a tuple of the outputs that are not None. None: as the configuration says.
            generator: Not used: tasks draw nothing.
            training_batch: Further keys of a batch as `mmbert.data.labelled_samples.CollateLabelled` builds it.

        Raises:
            UsageError: Inputs that the model does not take, or classes that it does not have.
        """
        _check_keywords(input_ids, training_batch, ("label_scores", "image_hidden_states", "index"))
        if input_ids is None:
            raise UsageError(f"{type(self).__name__} got no input_ids.")
        batch: dict[str, Any] = {**training_batch, "input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            batch["token_type_ids"] = token_type_ids
        if pixel_values is not None:
            batch["pixel_values"] = pixel_values.flatten(0, 1) if pixel_values.ndim == 5 else pixel_values
        if labels is not None:
            batch["label_scores"] = self.task.label_scores(labels)
        with self._record(output_attentions, output_hidden_states) as recorded:
            encoded = EncodedBatch(self.mmbert, batch)
            logits = self.task.batch_logits(encoded)
        objective = self.task.output(logits, batch["label_scores"]) if "label_scores" in batch else None
        objectives = None if objective is None or labels is not None else {str(self.config.task): objective}
        loss = None if objective is None else objective.loss
        output = TaskOutput(loss=loss, logits=logits, **recorded.outputs(), objectives=objectives)
        return self._returned(output, return_dict)


HeadedModel = MMBertForPreTraining | MMBertForTask
"""Models with a loss."""


def _check_keywords(first: Any, others: dict[str, Any], training_keys: tuple[str, ...]) -> None:
    """Raise on keywords that are no training batch, and on a batch that is passed as one argument."""
    if isinstance(first, dict):
        raise UsageError("the model got a dict; pass the batch as keywords: model(**batch).")
    if others and not any(name in others for name in training_keys):
        raise UsageError(f"the model takes no {', '.join(others)}; a training batch also has {training_keys[0]}.")


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
