"""METER written from the paper (arXiv:2111.02387) and the key names of the authors' files.

RoBERTa, the blocks of CLIP's ViT and the cross-modal layers are those of transformers (BridgeTower took over METER's);
how they are put together, the key names and the heads are written here. It is no run of the authors' code.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BridgeTowerVisionConfig, RobertaConfig, RobertaModel
from transformers.models.bert.modeling_bert import BertPooler, BertPredictionHeadTransform
from transformers.models.bridgetower.configuration_bridgetower import BridgeTowerTextConfig
from transformers.models.bridgetower.modeling_bridgetower import BridgeTowerBertCrossLayer, BridgeTowerResidualAttention

WIDTH = 128


class ClipVit(nn.Module):
    """CLIP's ViT with the names of OpenAI's code."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, 8, stride=8, bias=False)
        self.class_embedding, self.positional_embedding = (
            nn.Parameter(torch.zeros(WIDTH)),
            nn.Parameter(torch.zeros(5, WIDTH)),
        )
        self.ln_pre, self.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        blocks = [BridgeTowerResidualAttention(BridgeTowerVisionConfig(hidden_size=WIDTH)) for _ in range(2)]
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(blocks)})

    def forward(self, pixel_values: Tensor) -> Tensor:
        """All tokens after the last norm, (B, P + 1, D)."""
        x = self.conv1(pixel_values).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)
        x = self.ln_pre(x + self.positional_embedding).transpose(0, 1)
        blocks: Any = self.transformer["resblocks"]
        for block in blocks:
            x = block(x)
        return self.ln_post(x.transpose(0, 1))


class MlmHead(nn.Module):
    """BERT's head with a matrix of its own."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.decoder = nn.Linear(WIDTH, 40, bias=False)
        self.bias = nn.Parameter(torch.zeros(40))

    def forward(self, states: Tensor) -> Tensor:
        """Logits over the vocabulary."""
        return self.decoder(self.transform(states)) + self.bias


class Meter(nn.Module):
    """Model with the attributes whose names the authors' checkpoints have."""

    def __init__(self, *, heads: str) -> None:
        super().__init__()
        self.heads = heads
        sizes: dict[str, Any] = {"hidden_size": WIDTH, "num_attention_heads": 2, "intermediate_size": 48}
        text = RobertaConfig(
            **sizes, vocab_size=40, num_hidden_layers=2, max_position_embeddings=18, type_vocab_size=1,
            layer_norm_eps=1e-5, attn_implementation="eager",
        )  # fmt: skip
        self.text_transformer: Any = RobertaModel(text)
        self.vit_model = nn.ModuleDict({"visual": ClipVit()})
        self.cross_modal_text_transform, self.cross_modal_image_transform = (nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.token_type_embeddings = nn.Embedding(2, WIDTH)
        cross = BridgeTowerTextConfig(
            **sizes, layer_norm_eps=1e-12, is_decoder=True, add_cross_attention=True, attn_implementation="eager"
        )
        self.cross_modal_text_layers, self.cross_modal_image_layers = (
            nn.ModuleList(BridgeTowerBertCrossLayer(cross) for _ in range(2)) for _ in range(2)
        )
        self.cross_modal_text_pooler, self.cross_modal_image_pooler = BertPooler(cross), BertPooler(cross)
        if heads == "pretraining":
            self.mlm_score = MlmHead(cross)
            self.itm_score = nn.ModuleDict({"fc": nn.Linear(2 * WIDTH, 2)})
        elif heads == "retrieval":
            self.itm_score = nn.ModuleDict({"fc": nn.Linear(2 * WIDTH, 2)})
            self.rank_output = nn.Linear(2 * WIDTH, 1)
        else:
            classifier = nn.Sequential(
                nn.Linear(2 * WIDTH, 2 * WIDTH), nn.LayerNorm(2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, 3)
            )
            setattr(self, heads, classifier)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> dict[str, Tensor]:
        """The outputs of all heads: co-attention, in which both streams read the other's previous layer (Sec. 3.2)."""
        hidden = (1.0 - attention_mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
        types = self.token_type_embeddings.weight
        text = self.text_transformer(input_ids, attention_mask).last_hidden_state
        x = self.cross_modal_text_transform(text) + types[0]
        y = self.cross_modal_image_transform(self.vit_model["visual"](pixel_values)) + types[1]
        for text_layer, image_layer in zip(self.cross_modal_text_layers, self.cross_modal_image_layers, strict=True):
            x, y = (
                text_layer(x, y, attention_mask=hidden)[0],
                image_layer(y, x, encoder_attention_mask=hidden)[0],
            )
        joint = torch.cat([self.cross_modal_text_pooler(x), self.cross_modal_image_pooler(y)], dim=-1)
        if self.heads == "pretraining":
            return {"mlm": self.mlm_score(x), "itm": self.itm_score["fc"](joint)}
        if self.heads == "retrieval":
            return {"score": self.rank_output(joint)[:, 0]}
        return {"logits": getattr(self, self.heads)(joint)}
