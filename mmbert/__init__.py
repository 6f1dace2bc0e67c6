"""mmbert: a text-image BERT whose fusion strategy is one key."""

import importlib
import os
from typing import TYPE_CHECKING, Any

# Read by torch at its first allocation on Linux: huge pages for large tensors, whose page faults else take a sixth of a
# training step in bf16.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

if TYPE_CHECKING:
    from mmbert.compare.experiment import ComparisonResult
    from mmbert.compare.experiment import run_comparison as compare
    from mmbert.data.datamodule import PairsDataModule
    from mmbert.data.labelled_datamodule import LabelledDataModule
    from mmbert.data.options import DataOptions
    from mmbert.data.processor import MMBertProcessor
    from mmbert.evaluation.options import EvaluationOptions
    from mmbert.inference.evaluate.bias import evaluate_bias
    from mmbert.inference.evaluate.foils import evaluate_foils
    from mmbert.inference.evaluate.retrieval import evaluate_retrieval
    from mmbert.inference.evaluate.shares import evaluate_shares
    from mmbert.inference.index import load_index
    from mmbert.inference.indexing import build_index
    from mmbert.inference.loaded import LoadedModel, load
    from mmbert.inference.pipeline import pipeline
    from mmbert.model.auto_classes import (
        MMBertForImageTextRetrieval,
        MMBertForPairClassification,
        MMBertForQuestionAnswering,
    )
    from mmbert.model.configuration import MMBertConfig
    from mmbert.model.fusion.base import Fusion
    from mmbert.model.initialization import build_model
    from mmbert.model.modeling import MMBertForPreTraining, MMBertForTask, MMBertModel
    from mmbert.model.options import ModelOptions
    from mmbert.model.tokens import Fused, Reads, Tokens
    from mmbert.runtime.allowed_imports import allow_import
    from mmbert.training.fit import fit
    from mmbert.training.module import TrainingModule
    from mmbert.training.options import CheckpointOptions, OptimOptions
    from mmbert.training.result import RunResult

__version__ = "0.1.0"

# oneDNN and torch keep up to 1,024 compiled matrix products each, one for every shape, and every text length and number
# of masked words is a shape: a bf16 run on a CPU grew by 15 MB a step. They read these names at their first product.
for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_name, "128")

_MODULES = {
    "ComparisonResult": "compare.experiment",
    "CheckpointOptions": "training.options",
    "DataOptions": "data.options",
    "OptimOptions": "training.options",
    "EvaluationOptions": "evaluation.options",
    "Fused": "model.tokens",
    "Reads": "model.tokens",
    "Fusion": "model.fusion.base",
    "LabelledDataModule": "data.labelled_datamodule",
    "LoadedModel": "inference.loaded",
    "MMBertConfig": "model.configuration",
    "MMBertForImageTextRetrieval": "model.auto_classes",
    "MMBertForPairClassification": "model.auto_classes",
    "MMBertForPreTraining": "model.modeling",
    "MMBertForQuestionAnswering": "model.auto_classes",
    "MMBertForTask": "model.modeling",
    "MMBertModel": "model.modeling",
    "MMBertProcessor": "data.processor",
    "ModelOptions": "model.options",
    "PairsDataModule": "data.datamodule",
    "RunResult": "training.result",
    "Tokens": "model.tokens",
    "TrainingModule": "training.module",
    "allow_import": "runtime.allowed_imports",
    "build_index": "inference.indexing",
    "build_model": "model.initialization",
    "compare": "compare",
    "evaluate_bias": "inference.evaluate.bias",
    "evaluate_foils": "inference.evaluate.foils",
    "evaluate_retrieval": "inference.evaluate.retrieval",
    "evaluate_shares": "inference.evaluate.shares",
    "fit": "training.fit",
    "load": "inference.loaded",
    "pipeline": "inference.pipeline",
    "load_index": "inference.index",
}
"""Public name -> its module, imported on first use (PEP 562): `import mmbert` alone imports neither torch nor
transformers. `AutoModel` knows mmbert's classes once one of them was used, or after `mmbert.register()`."""

__all__ = [
    "CheckpointOptions",
    "ComparisonResult",
    "DataOptions",
    "EvaluationOptions",
    "Fused",
    "Fusion",
    "LabelledDataModule",
    "LoadedModel",
    "MMBertConfig",
    "MMBertForImageTextRetrieval",
    "MMBertForPairClassification",
    "MMBertForPreTraining",
    "MMBertForQuestionAnswering",
    "MMBertForTask",
    "MMBertModel",
    "MMBertProcessor",
    "ModelOptions",
    "OptimOptions",
    "PairsDataModule",
    "Reads",
    "RunResult",
    "Tokens",
    "TrainingModule",
    "allow_import",
    "build_index",
    "build_model",
    "compare",
    "evaluate_bias",
    "evaluate_foils",
    "evaluate_retrieval",
    "evaluate_shares",
    "fit",
    "load",
    "load_index",
    "pipeline",
    "register",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _MODULES:
        raise AttributeError(f"module 'mmbert' has no attribute {name!r}")
    module = importlib.import_module(f"mmbert.{_MODULES[name]}")
    value = module if name == "compare" else getattr(module, name)  # a package that can be called
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_MODULES]


def register() -> None:
    """Make transformers' `AutoConfig` and `AutoModel` load mmbert's folders; any use of a model does it too."""
    importlib.import_module("mmbert.model.auto_classes")
    importlib.import_module("mmbert.data.processor")
