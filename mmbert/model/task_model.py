"""`MMBertForTask`: the model with the head of a task."""

from typing import Any

import torch
from torch import Tensor, nn

from mmbert.errors import UsageError
from mmbert.model.backbone import MMBertModel, check_fusion_layers
from mmbert.model.base_model import MMBertPreTrainedModel, check_keywords
from mmbert.model.configuration import MMBertConfig
from mmbert.model.objectives import EncodedBatch
from mmbert.model.outputs import TaskOutput
from mmbert.model.tasks import Task, build_task


class MMBertForTask(MMBertPreTrainedModel):
    """`MMBertModel` with the head of the task that `config.task` names, for the classes `config.labels`."""

    def __init__(self, config: MMBertConfig):
        super().__init__(config)
        self.mmbert = MMBertModel(config)
        check_fusion_layers(self.mmbert)
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
        image_mask: Tensor | None = None,
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
            image_mask: (B * N, P), 1 = real region; see `MMBertModel.encode_image`.
            generator: Not used: tasks draw nothing.
            training_batch: Further keys of a batch as `mmbert.data.labelled_samples.CollateLabelled` builds it.

        Raises:
            UsageError: Inputs that the model does not take, or classes that it does not have.
        """
        check_keywords(input_ids, training_batch, ("label_scores", "image_hidden_states", "index"))
        if input_ids is None:
            raise UsageError(f"{type(self).__name__} got no input_ids.")
        batch: dict[str, Any] = {**training_batch, "input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            batch["token_type_ids"] = token_type_ids
        if pixel_values is not None:
            is_nested = pixel_values.ndim == (5 if self.config.image_features is None else 4)
            batch["pixel_values"] = pixel_values.flatten(0, 1) if is_nested else pixel_values
        if image_mask is not None:
            batch["image_mask"] = image_mask
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
