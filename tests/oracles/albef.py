"""ALBEF written from the paper (arXiv:2107.07651) and the key names of the authors' files.

The layers are BERT's and timm's; what is ALBEF's is written here: which text layers attend to the image, the key names,
and what each head reads. It is no run of the authors' code.
"""

from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM
from transformers.models.bert.modeling_bert import BertAttention


class Albef(nn.Module):
    """Model with the attributes whose names the authors' checkpoints have."""

    def __init__(self, *, heads: str, depth: int = 4, first: int = 2, width: int = 128):
        super().__init__()
        self.first, self.heads = first, heads
        self.visual_encoder: Any = timm.create_model(
            "vit_base_patch16_224", depth=2, embed_dim=width, num_heads=width // 64, img_size=16, patch_size=8,
            num_classes=0, global_pool="",
        )  # fmt: skip
        config = BertConfig(
            vocab_size=40, hidden_size=width, num_hidden_layers=depth, num_attention_heads=width // 64,
            intermediate_size=48, max_position_embeddings=16, pad_token_id=0, attn_implementation="eager",
        )  # fmt: skip
        text: Any = BertForMaskedLM(config)
        for layer in text.bert.encoder.layer[first:]:
            layer.crossattention = BertAttention(config)
        self.text_encoder: Any = text if heads == "pretraining" else text.bert
        if heads == "entailment":
            self.cls_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))
            return
        self.vision_proj, self.text_proj = nn.Linear(width, 16), nn.Linear(width, 16)
        self.itm_head = nn.Linear(width, 2)
        self.temp = nn.Parameter(torch.tensor(0.07))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> dict[str, Tensor]:
        """The outputs of all heads, of matched pairs."""
        bert = self.text_encoder.bert if self.heads == "pretraining" else self.text_encoder
        image = self.visual_encoder.forward_features(pixel_values)
        hidden = (1.0 - attention_mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
        states = bert.embeddings(input_ids)
        for layer in bert.encoder.layer[: self.first]:
            states = layer(states, hidden)
        text = states
        for layer in bert.encoder.layer[self.first :]:
            states = layer.attention(states, hidden)[0]
            states = cross_attention(layer.crossattention, states, image)
            states = layer.output(layer.intermediate(states), states)
        if self.heads == "entailment":
            return {"logits": self.cls_head(states[:, 0])}
        text_vectors = F.normalize(self.text_proj(text[:, 0]), dim=-1)
        image_vectors = F.normalize(self.vision_proj(image[:, 0]), dim=-1)
        out = {"itc": text_vectors @ image_vectors.T / self.temp, "itm": self.itm_head(states[:, 0])}
        return {**out, "mlm": self.text_encoder.cls(states)} if self.heads == "pretraining" else out


def cross_attention(block: Any, states: Tensor, image: Tensor) -> Tensor:
    """BERT's attention block with queries of the text, and keys and values of the image (Sec. 3.1)."""
    heads = block.self.num_attention_heads

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    query, key, value = split(block.self.query(states)), split(block.self.key(image)), split(block.self.value(image))
    weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(dim=-1)
    return block.output((weights @ value).transpose(1, 2).flatten(2), states)
