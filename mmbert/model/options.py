"""Options of the section `model`: the architecture, and the sources of the initial weights."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from mmbert.errors import UsageError, did_you_mean


@dataclass(kw_only=True)
class Architecture:
    """Architecture of a model: `--model.*` on the command line, and the fields of `MMBertConfig`."""

    fusion: str = "hybrid"
    """Fusion strategy: a name in `mmbert.model.fusion.FUSIONS` (early, late, late_bilinear, hybrid, hybrid_cross,
    hybrid_bottleneck, hybrid_bridge), or a custom class such as my_fusion.GatedFusion (see --allow-import)."""
    text_layers: int = 6
    """Transformer layers of the text encoder, before fusion. 0: word embeddings go straight into the fusion."""
    image_layers: int = 6
    """Transformer layers of the image encoder, before fusion. 0: patch embeddings go straight into the fusion."""
    fusion_layers: int = 2
    """Layers of the fusion part; what a layer is depends on the strategy."""
    fusion_norm: str = "post"
    """Place of the LayerNorms in fusion layers. post: after each residual sum, as in BERT; pre: before each block, as
    in a ViT, with `fusion_final_norm`."""
    fusion_final_norm: bool = False
    """Whether a LayerNorm follows the last fusion layer of each stream."""
    pooler: str = "tanh"
    """How the joint vector is made from the first states of the streams, one in early and hybrid_cross, else two. tanh:
    one linear layer on all of them, and tanh; separate: a linear layer and tanh for each, concatenated; none: the
    states themselves, concatenated. A custom fusion need not read it."""
    bridge_text_norm: str = "plain"
    """Normalization of the text layers that hybrid_bridge reads. plain: LayerNorm without weights; none, as BERT's
    layers are normalised already (BridgeTower)."""
    early_image_norm: bool = True
    """Whether early applies a LayerNorm to the image tokens, as to BERT's embeddings."""
    early_image_types: int = 1
    """Type vectors of images in early. 1: all images have the same; more: the i-th image of a text has the i-th."""
    early_pool: str = "first"
    """Text token whose state is pooled in early. first: [CLS]; last: the one before [SEP] (VisualBERT for VQA)."""
    early_class_token: bool = False
    """Whether a class token of its own precedes all tokens in early, and its state is pooled (FLAVA)."""
    early_inputs: str = "output"
    """States of both encoders that early reads. output: their output; last_layer: those of the last layer, before the
    LayerNorm that follows it, through a linear layer each, while itc reads the output (FLAVA)."""
    shared_text_layers: bool = False
    """Whether the layers of hybrid_cross, without cross-attention, also encode the text alone, as itc reads it (BLIP);
    they then skip cross-attention where the image is absent. Needs `text_layers` 0."""
    project_text: bool = False
    """Whether a linear layer follows the text encoder even if its width is `hidden_size`."""
    project_image: bool = False
    """Whether a linear layer follows the image encoder even if its width is `hidden_size`."""

    hidden_size: int = 384
    """Width of the fusion part, in features. Encoders of another width are projected to it."""
    num_attention_heads: int = 6
    """Attention heads in each layer of the fusion part; divides `hidden_size`."""
    intermediate_size: int | None = None
    """Width of the feed-forward blocks of the fusion part. None: four times `hidden_size`."""

    text_tower: str = "bert"
    """Family of the text encoder. bert (also RoBERTa), distilbert, modernbert and deberta-v2 (also DeBERTa-v3):
    bidirectional, with the text in the state of [CLS]; clip: causal, with the LayerNorms first and the text in the
    state of its last token, as in CLIP; flava: as bert, with the LayerNorms first. `text_pretrained` chooses its own
    family."""
    text_model_args: dict[str, Any] | None = None
    """Further keys of the family's configuration in transformers, such as `{"local_attention": 64}` for modernbert. A
    pretrained encoder brings its own. None: the defaults of transformers."""
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
    type_vocab_size: int = 2
    """Entries of the token type embedding of the text encoder bert; every token has type 0."""
    text_hidden_act: str = "gelu"
    """Activation in the feed-forward blocks of the text encoder: a name of transformers, such as gelu, relu, silu."""

    image_model: str = "vit_small_patch16_224"
    """Architecture of the image encoder: the timm name of a ViT; the keys below override its defaults."""
    image_size: int = 224
    """Side of the square image, in pixels; the patch size divides it."""
    patch_size: int | None = None
    """Side of a patch, in pixels. None: that of `image_model`."""
    image_hidden_size: int | None = None
    """Width of the image encoder, in features. None: that of `image_model`."""
    image_num_attention_heads: int | None = None
    """Attention heads of the image encoder. None: those of `image_model`."""
    image_features: int | None = None
    """Width of region features, such as those of an object detector, that the model reads instead of images, with
    `image_layers` 0. None: it reads images."""
    image_final_norm: bool = True
    """Whether the image encoder applies the LayerNorm that follows the last layer of `image_model`."""
    image_model_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the timm architecture, such as `{"act_layer": "quick_gelu", "init_values": 1e-5}`. A
    pretrained ViT brings its own."""

    hidden_dropout_prob: float = 0.1
    """Dropout on hidden states of text layers, other than those of clip, and fusion layers, fraction of features."""
    attention_probs_dropout_prob: float = 0.1
    """Dropout on attention weights of text and fusion layers, fraction of weights."""
    layer_norm_eps: float = 1e-12
    """Epsilon of the LayerNorms of text and fusion layers."""
    text_layer_norm_eps: float | None = None
    """Epsilon of the LayerNorms of the text encoder. None: `layer_norm_eps`."""
    image_layer_norm_eps: float | None = None
    """Epsilon of the LayerNorms of the image encoder. None: that of `image_model`."""
    initializer_range: float = 0.02
    """Standard deviation of freshly drawn weights."""

    objectives: dict[str, Any] = field(default_factory=lambda: {"mlm": 1.0, "itm": 1.0, "itc": 1.0})
    """Pretraining objectives with their loss weights, `{"mlm": 1.0}`, or with options, `{"itm": {"weight": 1.0,
    "negatives": "hard"}}`; names in `mmbert.model.objectives.OBJECTIVES`. A weight of 0 disables the objective. A YAML
    file replaces those of the files it builds on; `--model.objectives.itm.negatives=hard` changes that option only."""
    task: str | None = None
    """Task to fine-tune for, whose head replaces those of the objectives: a name in `mmbert.model.tasks.TASKS` (vqa,
    decision). None: pretraining."""
    task_options: dict[str, Any] | None = None
    """Options of the task, such as `{"loss": "softmax"}` for vqa. None: the defaults of its class in
    `mmbert.model.tasks`."""

    def check(self) -> None:
        """Check the values that can be checked without building the model.

        Raises:
            UsageError: A value out of range, or attention heads that do not divide their width.
        """
        for name in ("text_layers", "image_layers", "fusion_layers"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name}={getattr(self, name)}: the number of layers must be 0 or more.")
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name}={value}: must be 1 or more.")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)}: must be a fraction from 0 to below 1.")
        for name in ("layer_norm_eps", "text_layer_norm_eps", "image_layer_norm_eps", "initializer_range"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"{name}={getattr(self, name)}: must be a number above 0.")
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise UsageError(f"{name}={value!r}; allowed are {', '.join(allowed)}.{did_you_mean(value, allowed)}")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise UsageError(f"pad_token_id={self.pad_token_id}: must be from 0 to below vocab_size={self.vocab_size}.")
        if self.text_model_args and self.text_tower in ("bert", "clip", "flava"):
            raise UsageError(f"text_model_args={self.text_model_args} has no effect on text_tower={self.text_tower}.")
        if self.image_features is not None and self.image_layers > 0:
            raise UsageError(f"image_features={self.image_features} have no encoder: set image_layers=0.")
        if self.fusion == "early" and self.early_inputs == "last_layer" and 0 in (self.text_layers, self.image_layers):
            raise UsageError(
                "early_inputs=last_layer: both encoders need at least 1 layer, but "
                f"text_layers={self.text_layers} and image_layers={self.image_layers}."
            )
        if self.early_class_token and self.early_pool == "last":
            raise UsageError(
                "early_pool=last: with early_class_token the class token is pooled; leave one of them out."
            )
        if self.shared_text_layers:
            needed = {"fusion": "hybrid_cross", "text_layers": 0, "text_hidden_size": self.hidden_size}
            for name, value in needed.items():
                if getattr(self, name) not in (value, None):
                    raise UsageError(f"shared_text_layers: needs {name}={value}; it is {getattr(self, name)}.")
        if ":" in self.image_model or "/" in self.image_model:
            raise UsageError(
                f"image_model='{self.image_model}' names weights; expected the name of a timm architecture, such as "
                "vit_small_patch16_224. Weights are loaded by model.image_pretrained."
            )
        for name in self.image_model_args:
            if name in TIMM_KEYS:
                raise UsageError(f"image_model_args.{name}: use the key {TIMM_KEYS[name]} instead.")
            if name in TIMM_FACTORY_ARGUMENTS:
                raise UsageError(f"image_model_args.{name}: not an argument of the architecture; leave it out.")
        for prefix in ("", "text_", "image_"):
            width, heads = getattr(self, f"{prefix}hidden_size"), getattr(self, f"{prefix}num_attention_heads")
            if width is not None and heads is not None and width % heads:
                raise UsageError(
                    f"{prefix}num_attention_heads={heads} does not divide {prefix}hidden_size={width}; "
                    f"allowed are {', '.join(str(h) for h in range(1, min(width, 64) + 1) if width % h == 0)}."
                )


CHOICES = {
    "fusion_norm": ("post", "pre"),
    "pooler": ("tanh", "separate", "none"),
    "bridge_text_norm": ("plain", "none"),
    "early_pool": ("first", "last"),
    "early_inputs": ("output", "last_layer"),
    "text_tower": ("bert", "clip", "flava", "distilbert", "modernbert", "deberta-v2"),
}
"""Keys with few allowed values."""

TIMM_KEYS = {
    "depth": "image_layers",
    "img_size": "image_size",
    "patch_size": "patch_size",
    "embed_dim": "image_hidden_size",
    "num_heads": "image_num_attention_heads",
}
"""Arguments of timm's ViTs that are keys of `Architecture`."""

TIMM_FACTORY_ARGUMENTS = frozenset(
    "pretrained pretrained_cfg pretrained_cfg_overlay pretrained_model_args checkpoint_path cache_dir scriptable "
    "exportable no_jit features_only feature_cfg out_indices pruned num_classes in_chans device dtype".split()
)
"""Arguments of `timm.create_model` about weights, files and heads, which a configuration must not set."""

POSITIVE = (
    *("hidden_size", "num_attention_heads", "intermediate_size"),
    *("text_hidden_size", "text_num_attention_heads", "text_intermediate_size"),
    *("vocab_size", "max_position_embeddings", "type_vocab_size"),
    *("image_size", "patch_size", "image_hidden_size", "image_num_attention_heads", "early_image_types"),
    "image_features",
)
"""Keys that are None or at least 1."""


@dataclass(kw_only=True)
class ModelOptions(Architecture):
    """Options of the section `model`: the architecture and the sources of its initial weights."""

    pretrained: str | None = None
    """Folder of a saved mmbert model (RUN/model) to start from: it gives the architecture, the tokenizer, the image
    preprocessing, and the weights of the encoders, the fusion and the heads of the same name; other heads are newly
    initialized. None: see the two keys below."""
    pretrained_parts: str = "all"
    """What is taken from `pretrained`. all: everything. encoders: encoders, projections and heads; the fusion is new,
    as its own keys say (`fusion`, `fusion_layers` ...), so a run of one strategy can start from that of another."""
    text_pretrained: str | None = None
    """Pretrained BERT, RoBERTa, DistilBERT, ModernBERT, or DeBERTa-v2 or v3: a name on the hub ("bert-base-uncased") or
    a local folder. None: from scratch."""
    image_pretrained: str | None = None
    """Pretrained ViT: a timm name with a weights tag ("vit_base_patch16_224.augreg_in21k"), a model on the hub
    ("hf-hub:OWNER/NAME"), or a local folder with config.json and model.safetensors. None: from scratch."""
    fusion_init: str = "bert"
    """Initial weights of the fusion and of the head of mlm. bert: the layers of `text_pretrained` above `text_layers`
    initialise fusion layers of the same sizes, and its MLM head, if it has one, that of mlm; the rest is random.
    random: everything is random, as without `text_pretrained`."""
    lora: dict[str, Any] | None = None
    """Low-rank adapters (LoRA) on the linear layers of pretrained encoders, whose own weights stay frozen: `{"rank": 8,
    "alpha": 16, "targets": "both"}`, with targets text, image or both. They are merged into the saved model. Needs
    peft: pip install 'mmbert[lora]'. None: no adapters."""


KEYS = tuple(f.name for f in dataclasses.fields(Architecture))
"""Names of the fields of `Architecture`: the keys of `MMBertConfig`, and those of the section `model` that name no
weights."""
