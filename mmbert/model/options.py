"""Options of the section `model`: the architecture, and where the first weights come from."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from mmbert.errors import UsageError


@dataclass(kw_only=True)
class Architecture:
    """The keys that describe a model. The CLI shows them as `--model.*`; `MMBertConfig` serves them to transformers."""

    fusion: str = "hybrid"
    """Fusion strategy: a name in `mmbert.model.fusion.FUSIONS` (early, late, late_bilinear, hybrid, hybrid_cross,
    hybrid_bottleneck, hybrid_bridge), or a class of yours, my_fusion.GatedFusion (see --allow-import)."""
    text_layers: int = 6
    """Transformer layers of the text encoder, before fusion. 0: word embeddings go straight into the fusion."""
    image_layers: int = 6
    """Transformer layers of the image encoder, before fusion. 0: patch embeddings go straight into the fusion."""
    fusion_layers: int = 2
    """Layers of the fusion part; what a layer is depends on the strategy."""

    hidden_size: int = 384
    """Width of the fusion part, in features. Encoders of another width are projected to it."""
    num_attention_heads: int = 6
    """Attention heads in each layer of the fusion part; divides `hidden_size`."""
    intermediate_size: int | None = None
    """Width of the feed-forward blocks of the fusion part. None: four times `hidden_size`."""

    text_hidden_size: int | None = None
    """Width of the text encoder. None: that of the pretrained encoder, from scratch `hidden_size`."""
    text_num_attention_heads: int | None = None
    """Attention heads of the text encoder. None: pretrained, from scratch `num_attention_heads`."""
    text_intermediate_size: int | None = None
    """Feed-forward width of the text encoder. None: pretrained, from scratch four times its width."""
    vocab_size: int = 30522
    """Entries of the tokenizer's vocabulary. The CLI takes it from the tokenizer."""
    max_position_embeddings: int = 512
    """Longest text, in tokens incl. [CLS] and [SEP]."""
    pad_token_id: int | None = 0
    """Id of the padding token."""

    image_model: str = "vit_small_patch16_224"
    """Any ViT of timm, by its timm name; the keys below override its defaults."""
    image_size: int = 224
    """Side of the square image, in pixels; the patch size divides it."""
    patch_size: int | None = None
    """Side of a patch, in pixels. None: what `image_model` says."""
    image_hidden_size: int | None = None
    """Width of the image encoder. None: what `image_model` says."""
    image_num_attention_heads: int | None = None
    """Attention heads of the image encoder. None: what `image_model` says."""

    hidden_dropout_prob: float = 0.1
    """Dropout on hidden states of text and fusion layers, fraction of features."""
    attention_probs_dropout_prob: float = 0.1
    """Dropout on attention weights of text and fusion layers, fraction of weights."""
    layer_norm_eps: float = 1e-12
    """Epsilon of the LayerNorms of text and fusion layers."""
    initializer_range: float = 0.02
    """Standard deviation of freshly drawn weights."""

    objectives: dict[str, Any] = field(default_factory=lambda: {"mlm": 1.0, "itm": 1.0, "itc": 1.0})
    """Pretraining objectives with their weights, `{"mlm": 1.0}`, or with options, `{"itm": {"weight": 1.0,
    "negatives": "hard"}}`; names in `mmbert.model.objectives.OBJECTIVES`. 0 leaves the objective out. A YAML
    file replaces those of the files it builds on; `--model.objectives.itm.negatives=hard` changes that alone."""
    task: str | None = None
    """Fine-tunes for a task, with its head in place of the objectives': a name in `mmbert.model.tasks.TASKS` (vqa,
    decision). None: pretraining."""

    def check(self) -> None:
        """Refuses what can't be built.

        Raises:
            UsageError: A value out of range, or heads that do not divide their width.
        """
        for name in ("text_layers", "image_layers", "fusion_layers"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name}={getattr(self, name)}: a number of layers is 0 or more.")
        for name in (
            "hidden_size",
            "num_attention_heads",
            "vocab_size",
            "image_size",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)}: must be 1 or more.")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)}: a fraction from 0 to below 1.")
        for prefix in ("", "text_", "image_"):
            width, heads = (
                getattr(self, f"{prefix}hidden_size"),
                getattr(self, f"{prefix}num_attention_heads"),
            )
            if width is not None and heads is not None and width % heads:
                raise UsageError(
                    f"{prefix}num_attention_heads={heads} does not divide {prefix}hidden_size={width}; "
                    f"allowed are {', '.join(str(h) for h in range(1, min(width, 64) + 1) if width % h == 0)}."
                )


@dataclass(kw_only=True)
class ModelOptions(Architecture):
    """What a model is, and where its first weights come from."""

    pretrained: str | None = None
    """Folder of a saved mmbert (RUN/model) to start from: it gives the architecture, the tokenizer, how images are
    prepared, and every weight that has the same name here; other heads start fresh. None: see the two keys below."""
    text_pretrained: str | None = None
    """Pretrained BERT: a name on the hub ("bert-base-uncased") or a local folder. None: from scratch."""
    image_pretrained: str | None = None
    """Pretrained ViT: a timm name on the hub ("vit_base_patch16_224.augreg_in21k") or a local folder with config.json
    and model.safetensors. None: from scratch."""


KEYS = tuple(f.name for f in dataclasses.fields(Architecture))
"""The keys of the architecture: those of `MMBertConfig`, and of the section `model` but for the sources of weights."""
