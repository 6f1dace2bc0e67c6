"""mmbert: a text-image BERT whose fusion strategy is one key."""

from transformers import AutoConfig, AutoModel, AutoModelForPreTraining

from mmbert.data.processor import MMBertProcessor
from mmbert.inference.loaded import LoadedModel, load
from mmbert.model.configuration import MMBertConfig
from mmbert.model.fusion.base import Fusion
from mmbert.model.initialization import ModelOptions, build_model
from mmbert.model.modeling import MMBertForPreTraining, MMBertModel
from mmbert.model.tokens import Fused, Tokens
from mmbert.runtime.allowed_imports import allow_import

__version__ = "0.1.0"

__all__ = [
    "Fused",
    "Fusion",
    "LoadedModel",
    "MMBertConfig",
    "MMBertForPreTraining",
    "MMBertModel",
    "MMBertProcessor",
    "ModelOptions",
    "Tokens",
    "allow_import",
    "build_model",
    "load",
]

AutoConfig.register("mmbert", MMBertConfig)
AutoModel.register(MMBertConfig, MMBertModel)
AutoModelForPreTraining.register(MMBertConfig, MMBertForPreTraining)
