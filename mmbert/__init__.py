"""mmbert: a text-image BERT whose fusion strategy (early, late, hybrid) is one key."""

from transformers import AutoConfig, AutoModel, AutoModelForPreTraining

from mmbert.configuration import MMBertConfig
from mmbert.inference import LoadedModel, load
from mmbert.initialization import ModelOptions, build_model
from mmbert.modeling import MMBertForPreTraining, MMBertModel
from mmbert.processing import MMBertProcessor
from mmbert.tokens import Fused, Tokens

__version__ = "0.1.0"

__all__ = [
    "Fused",
    "LoadedModel",
    "MMBertConfig",
    "MMBertForPreTraining",
    "MMBertModel",
    "MMBertProcessor",
    "ModelOptions",
    "Tokens",
    "build_model",
    "load",
]

AutoConfig.register("mmbert", MMBertConfig)
AutoModel.register(MMBertConfig, MMBertModel)
AutoModelForPreTraining.register(MMBertConfig, MMBertForPreTraining)
