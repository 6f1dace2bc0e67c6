"""The models, as `PreTrainedModel`s of transformers, and their registration with its Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForPreTraining

from mmbert.model.backbone import MMBertModel
from mmbert.model.base_model import MMBertPreTrainedModel
from mmbert.model.configuration import MMBertConfig
from mmbert.model.pretraining_model import MMBertForPreTraining
from mmbert.model.task_model import MMBertForTask

__all__ = ["HeadedModel", "MMBertForPreTraining", "MMBertForTask", "MMBertModel", "MMBertPreTrainedModel"]

HeadedModel = MMBertForPreTraining | MMBertForTask
"""Models with a loss."""

AutoConfig.register("mmbert", MMBertConfig)
AutoModel.register(MMBertConfig, MMBertModel)
AutoModelForPreTraining.register(MMBertConfig, MMBertForPreTraining)
