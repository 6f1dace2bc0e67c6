"""Early fusion: one sequence of all tokens."""

import torch
from torch import Tensor, nn

from mmbert.model.configuration import MMBertConfig
from mmbert.model.fusion.base import Fusion, upper_bert_layers
from mmbert.model.layers import Pooler, SelfAttentionLayer, build_layers
from mmbert.model.tokens import READ_ALL, Fused, Reads, Tokens


class EarlyFusion(Fusion):
    """Single stream: from the first fusion layer on, every token attends to every token of both modalities.

    With a deep image encoder this is VisualBERT (arXiv:1908.03557) on ViT features; with `text_layers=image_layers=0`
    raw patch embeddings meet word embeddings as in ViLT (arXiv:2102.03334); with two deep encoders it is the
    "merged attention" of METER (arXiv:2111.02387), and with a class token of its own FLAVA (arXiv:2112.04482).
    """

    min_layers = 1

    def __init__(self, config: MMBertConfig):
        super().__init__(config)
        # BERT's embeddings already hold the text's type embedding; VisualBERT adds one to the image and normalises.
        types = () if config.early_image_types == 1 else (config.early_image_types,)
        self.image_type = nn.Parameter(torch.randn(*types, config.hidden_size) * config.initializer_range)
        has_norm = config.early_image_norm
        self.image_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if has_norm else nn.Identity()
        vector = nn.Parameter(torch.randn(config.hidden_size) * config.initializer_range)
        self.has_class_token = config.early_class_token
        if self.has_class_token:
            self.class_token = vector
        else:
            self.absent_text = vector
        if config.early_inputs == "last_layer":
            self.reads_text_layers, self.reads_image_layers = (config.text_layers,), (config.image_layers,)
            assert config.text_hidden_size is not None  # set by MMBertConfig
            assert config.image_hidden_size is not None  # set by MMBertModel
            self.text_input = nn.Linear(config.text_hidden_size, config.hidden_size)
            self.image_input = nn.Linear(config.image_hidden_size, config.hidden_size)
        self.layers = build_layers(SelfAttentionLayer, config)
        self.pooler = Pooler(config)

    def modules_from_bert(self) -> dict[str, str]:
        """See `Fusion`: all layers and the pooler, as in VisualBERT."""
        # VisualBERT's embeddings of both modalities share a LayerNorm, and are followed by its first layer.
        has_norm = self.config.text_layers == 0 and self.config.early_image_norm
        norm = {"image_norm": "embeddings.LayerNorm"} if has_norm else {}
        return {**upper_bert_layers("layers", self.config), "pooler.dense": "pooler.dense", **norm}

    def forward(self, text: Tokens, image: Tokens, *, reads: Reads = READ_ALL) -> Fused:
        """See `Fusion`. Without text a learned token replaces [CLS], unless there is a class token."""
        if self.reads_text_layers:
            text, image = _last_layer(text, self.text_input), _last_layer(image, self.image_input)
        with_text = self._with_class_token(text) if self.has_class_token else text.with_fallback(self.absent_text)
        image_states = self.image_norm(image.hidden_states + self._image_types(image.mask.shape[0]))
        joint = Tokens(
            torch.cat([with_text.hidden_states, image_states], dim=1),  # (B, T+P, D), or (B, 1+T+P, D)
            torch.cat([with_text.mask, image.mask], dim=1),
        )
        text_length, start = with_text.mask.shape[1], int(self.has_class_token)
        needs_text = reads.text or self.config.early_pool == "last"
        for number, layer in enumerate(self.layers, start=1):
            reads_all = reads.image or number < len(self.layers)
            joint = layer(joint, queries=joint if reads_all else joint.prefix(text_length if needs_text else 1))
        states = joint.hidden_states
        fused_text = Tokens(states[:, start : start + text.mask.shape[1]], text.mask)
        fused_image = Tokens(states[:, text_length:], image.mask)
        return Fused.only(reads, fused_text, fused_image, lambda: self.pooler(self._pooled_state(joint, with_text)))

    def _with_class_token(self, text: Tokens) -> Tokens:
        """Prepend the class token to (B, T, D) tokens."""
        batch = text.mask.shape[0]
        token = self.class_token.to(text.hidden_states.dtype).expand(batch, 1, -1)
        return Tokens(
            torch.cat([token, text.hidden_states], dim=1), torch.cat([text.mask.new_ones(batch, 1), text.mask], dim=1)
        )

    def _pooled_state(self, joint: Tokens, text: Tokens) -> Tensor:
        """Return the (B, D) states that `early_pool` names."""
        if self.config.early_pool == "first":
            return joint.first
        numbers = (text.mask.sum(dim=1) - 2).clamp(min=0)  # before [SEP]
        return joint.hidden_states[torch.arange(len(numbers), device=numbers.device), numbers]

    def _image_types(self, batch: int) -> Tensor:
        """Return the type vector of all images (D,), or of each (B, 1, D): the images of a text are in sequence."""
        if self.image_type.ndim == 1:
            return self.image_type
        numbers = torch.arange(batch, device=self.image_type.device) % self.image_type.shape[0]
        return self.image_type[numbers].unsqueeze(1)


def _last_layer(tokens: Tokens, linear: nn.Module) -> Tokens:
    """Map the states of the encoder's last layer to (B, L, D) tokens; an absent modality has none."""
    return Tokens(linear(tokens.intermediate[0]), tokens.mask) if tokens.intermediate else tokens
