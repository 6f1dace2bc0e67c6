"""`MMBertForPreTraining`: the model with the heads and losses of the pretraining objectives."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmbert.errors import UsageError
from mmbert.model.backbone import MMBertModel, check_fusion_layers
from mmbert.model.base_model import MMBertPreTrainedModel, check_keywords
from mmbert.model.configuration import MMBertConfig
from mmbert.model.objectives import EncodedBatch, SoftTargets, build_objectives, combine_reads
from mmbert.model.objectives.base import Batch
from mmbert.model.outputs import PreTrainingOutput
from mmbert.model.tokens import IGNORE_INDEX, Reads, Tokens
from mmbert.runtime.randomness import torch_generator


class MMBertForPreTraining(MMBertPreTrainedModel):
    """`MMBertModel` with the heads and losses that `config.objectives` names."""

    def __init__(self, config: MMBertConfig):
        super().__init__(config)
        self.mmbert = MMBertModel(config)
        check_fusion_layers(self.mmbert)
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

    def encode(
        self,
        batch: dict[str, Tensor],
        *,
        generator: torch.Generator | None = None,
        soft_targets: SoftTargets | None = None,
        progress: Tensor | None = None,
    ) -> EncodedBatch:
        """Wrap a batch so that each encoding is computed once, on first use."""
        objectives: dict[str, Any] = dict(self.objectives.items())
        return EncodedBatch(
            self.mmbert,
            batch,
            generator=generator,
            heads=objectives,
            reads=combine_reads(objectives.values()),
            soft_targets=soft_targets,
            progress=progress,
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
            if head.decoder is not None:
                head.decoder = self._get_resized_lm_head(head.decoder, embeddings.weight.shape[0])
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
        image_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        only: str | None = None,
        soft_targets: SoftTargets | None = None,
        progress: Tensor | None = None,
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
            image_mask: See `MMBertModel.encode_image`.
            generator: For a training batch: draws ITM negatives. None: torch's global generator in training, and always
                the same negatives in evaluation mode.
            only: For a training batch: objective to compute alone; None: all.
            soft_targets: For a training batch: predictions of a momentum model, mixed with the labels. None: the labels
                alone.
            progress: For a training batch: see `EncodedBatch`.
            training_batch: Further keys of a batch as `mmbert.data.pairs.Collate` builds it.

        Raises:
            UsageError: Inputs that the model does not take, or labels of a head that it lacks.
        """
        batch = {
            "input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids,
            "pixel_values": pixel_values, "image_mask": image_mask,
        }  # fmt: skip
        check_keywords(input_ids, training_batch, self.training_keys)
        if training_batch:
            given = {name: value for name, value in batch.items() if value is not None}
            return self.compute_losses(
                {**training_batch, **given},
                generator=generator,
                only=only,
                soft_targets=soft_targets,
                progress=progress,
            )
        with self._record(output_attentions, output_hidden_states) as recorded:
            logits = self.head_logits(*self.mmbert.encode_pairs(**batch))
        loss = self._labelled_loss(logits, labels, match_labels, bool(return_loss))
        return self._returned(PreTrainingOutput(loss=loss, **logits, **recorded.outputs()), return_dict)

    training_keys = ("mlm_labels", "image_key", "ngram_ids", "boxes", "index")
    """Keys of which a training batch has at least one."""

    def compute_losses(
        self,
        batch: Batch,
        *,
        generator: torch.Generator | None = None,
        only: str | None = None,
        soft_targets: SoftTargets | None = None,
        progress: Tensor | None = None,
    ) -> PreTrainingOutput:
        """Compute the loss of every objective on one training batch; see `forward`."""
        if generator is None and not self.training:
            generator = torch_generator(0, "negatives", 0)
        encoded = self.encode(batch, generator=generator, soft_targets=soft_targets, progress=progress)
        outputs = {name: f(encoded) for name, f in self.objectives.items() if only in (None, name)}
        loss = torch.stack([self.weights[name] * output.loss for name, output in outputs.items()]).sum()
        return PreTrainingOutput(loss=loss, objectives=outputs)

    def head_logits(self, text: Tokens, image: Tokens) -> dict[str, Tensor]:
        """Compute the logits in a `PreTrainingOutput`; those that compare text and image only where both are there."""
        heads: dict[str, Any] = dict(self.objectives.items())
        fused, output = self.mmbert.fuse(text, image), dict[str, Tensor]()
        has_text, has_both = text.mask.shape[1] > 0, text.mask.shape[1] > 0 and image.mask.shape[1] > 0
        if "mlm" in heads and has_text:
            # A copy, because the strides of early fusion's slice would tie an exported program to 2 rows or more.
            states = fused.text.hidden_states.clone(memory_format=torch.contiguous_format)
            output["mlm_logits"] = heads["mlm"].logits(states, self.mmbert.word_embeddings)
        if "itm" in heads and has_both:
            has_residual = heads["itm"].residual_factor is not None
            similarity = heads["itc"].pair_logits(text, image) if has_residual else None
            output["itm_logits"] = heads["itm"].logits(fused.pooled, similarity)
        if "itc" in heads and has_both:
            itc, of_text, of_image = heads["itc"], heads["itc"].embed_text(text), heads["itc"].embed_image(image)
            output["logits_per_text"] = per_text = itc.logits(of_text, of_image)
            output["logits_per_image"] = per_text.T if itc.interaction == "pooled" else itc.logits(of_image, of_text)
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
                targets = torch.arange(rows.shape[0], device=rows.device).repeat(2)
                rows = torch.cat([rows, logits["logits_per_image"]])
            assert targets is not None
            loss = F.cross_entropy(rows.flatten(0, -2), targets.flatten(), ignore_index=IGNORE_INDEX)
            losses.append(self.weights[name] * loss)
        return torch.stack(losses).sum() if losses else None
