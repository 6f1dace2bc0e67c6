"""mmbert: a text-image BERT whose fusion strategy is one key."""

from transformers import AutoConfig, AutoModel, AutoModelForPreTraining

from mmbert.allowed_imports import allow_import
from mmbert.configuration import MMBertConfig
from mmbert.fusion.base import Fusion
from mmbert.inference import LoadedModel, load
from mmbert.initialization import ModelOptions, build_model
from mmbert.modeling import MMBertForPreTraining, MMBertModel
from mmbert.processing import MMBertProcessor
from mmbert.tokens import Fused, Tokens

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
