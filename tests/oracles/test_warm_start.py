"""Models that start from one BERT, against transformers' BERT, VisualBERT and BLIP with the weights of that BERT."""

from typing import Any

import pytest
import torch
from oracles.test_blip import blip
from tiny import difference, random_tokens, randomize, tiny_batch, tiny_config
from torch import nn
from transformers import BertConfig, BertForPreTraining, BertModel, VisualBertConfig, VisualBertModel

from mmbert.model.initialization import build_model
from mmbert.model.layers import CrossAttentionLayer
from mmbert.model.modeling import MMBertForPreTraining, MMBertModel
from mmbert.model.options import KEYS, ModelOptions

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 16,
    "layer_norm_eps": 1e-12,
}
LAYERS = SIZES["num_hidden_layers"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[BertForPreTraining, str]:
    """A random BERT of 4 layers with pooler and MLM head, and the folder it is saved in."""
    folder = tmp_path_factory.mktemp("bert")
    model = BertForPreTraining(BertConfig(**SIZES))
    randomize(model, seed=1)
    model.eval().save_pretrained(folder)
    return model, str(folder)


def start(folder: str, fusion: str, **overrides: Any) -> MMBertForPreTraining:
    """A model of all four layers of the BERT: those that the text encoder leaves over are in the fusion."""
    config = tiny_config()
    settings = {key: getattr(config, key) for key in KEYS if not key.startswith("text_") or key == "text_layers"}
    settings |= {"fusion": fusion, "objectives": {"mlm": 1.0}, "text_layers": LAYERS // 2, "fusion_layers": LAYERS // 2}
    torch.manual_seed(0)
    model = build_model(ModelOptions(**{**settings, "text_pretrained": folder, **overrides}))
    assert isinstance(model, MMBertForPreTraining)
    return model.eval()


@pytest.mark.parametrize("text_layers", [0, 2])
def test_early_fusion_of_a_text_alone_equals_bert(text_layers: int, bert: tuple[BertForPreTraining, str]) -> None:
    """States, pooler and MLM logits."""
    theirs, folder = bert
    model = start(folder, "early", text_layers=text_layers, fusion_layers=LAYERS - text_layers)
    batch = tiny_batch()
    real = batch["attention_mask"].bool()
    assert not real.all()
    got = model.mmbert.encode_and_fuse(batch["input_ids"], batch["attention_mask"])
    expected = theirs.bert(batch["input_ids"], batch["attention_mask"])
    assert difference(got.text.hidden_states[real], expected.last_hidden_state[real]) < 1e-5
    assert difference(got.pooled, expected.pooler_output) < 1e-5
    logits = model.objectives["mlm"].logits(got.text.hidden_states[real], model.mmbert.word_embeddings)
    head = theirs(batch["input_ids"], batch["attention_mask"])
    assert difference(logits, head.prediction_logits[real]) < 1e-4
    assert logits.abs().max() > 1


def visualbert(own: MMBertModel, bert: BertModel) -> VisualBertModel:
    """VisualBERT that starts from `bert`; what a BERT lacks, the image's projection and type, is from `own`."""
    sizes = {key: getattr(bert.config, key) for key in SIZES}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    # Not VisualBERT's default padding.
    theirs = VisualBertModel(VisualBertConfig(**sizes, **dropout, visual_embedding_dim=24, pad_token_id=0)).eval()
    started = theirs.load_state_dict(bert.state_dict(), strict=False)
    assert not started.unexpected_keys and all("visual" in name for name in started.missing_keys)
    # VisualBERT adds a type vector and the vector of position 0 to every visual token; here the sum is one vector.
    position = theirs.embeddings.position_embeddings.weight[0]
    with torch.no_grad():
        theirs.embeddings.visual_position_embeddings.weight[0] = position
        theirs.embeddings.visual_token_type_embeddings.weight[1] = own.fusion.image_type - position
    theirs.embeddings.visual_projection.load_state_dict(own.image_projection.state_dict())
    return theirs


def test_early_fusion_without_text_layers_equals_visualbert(bert: tuple[BertForPreTraining, str]) -> None:
    theirs, folder = bert
    own = start(folder, "early", text_layers=0, fusion_layers=LAYERS).mmbert
    batch, mask = tiny_batch(), [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]
    image = random_tokens(mask, 24, dtype=torch.float32)
    text = own.encode_text(batch["input_ids"], batch["attention_mask"])
    got = own.fuse(text, image._replace(hidden_states=own.image_projection(image.hidden_states)))
    expected = visualbert(own, theirs.bert)(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        visual_embeds=image.hidden_states,
        visual_attention_mask=image.mask.long(),
    )
    joint = torch.cat([got.text.hidden_states, got.image.hidden_states], dim=1)
    real = torch.cat([text.mask, image.mask], dim=1)
    assert difference(joint[real], expected.last_hidden_state[real]) < 1e-5
    assert difference(got.pooled, expected.pooler_output) < 1e-5


def test_cross_fusion_equals_blip_with_the_upper_layers_of_bert(bert: tuple[BertForPreTraining, str]) -> None:
    """BLIP's multimodal encoder, which is ALBEF's: cross-attention is the model's own, the rest BERT's."""
    theirs, folder = bert
    own = start(folder, "hybrid_cross").mmbert
    reference, upper = blip(own.fusion), theirs.bert.encoder.layer[LAYERS // 2 :]
    for layer, start_of in zip(reference.encoder.layer, upper, strict=True):
        loaded = layer.load_state_dict(start_of.state_dict(), strict=False)
        assert not loaded.unexpected_keys and all(name.startswith("crossattention.") for name in loaded.missing_keys)
    batch = tiny_batch()
    text, image = own.encode_text(batch["input_ids"], batch["attention_mask"]), own.encode_image(batch["pixel_values"])
    lower = theirs.bert(batch["input_ids"], batch["attention_mask"], output_hidden_states=True).hidden_states[
        LAYERS // 2
    ]
    expected = reference(
        encoder_embeds=lower,
        attention_mask=batch["attention_mask"],
        encoder_hidden_states=image.hidden_states,
        is_decoder=False,
    )
    got = own.fuse(text, image)
    assert difference(got.text.hidden_states[text.mask], expected.last_hidden_state[text.mask]) < 1e-5
    assert difference(got.pooled, expected.pooler_output) < 1e-5


@pytest.mark.parametrize("fusion", ["hybrid_cross", "hybrid"])
def test_text_stream_without_its_cross_attention_equals_bert(fusion: str, bert: tuple[BertForPreTraining, str]) -> None:
    """An absent image makes the output of cross-attention zero; what is left of the block is its LayerNorm."""
    theirs, folder = bert
    model = start(folder, fusion).mmbert
    for layer in model.fusion.modules():
        if isinstance(layer, CrossAttentionLayer):
            layer.cross_attention.norm = nn.Identity()
    batch = tiny_batch()
    real = batch["attention_mask"].bool()
    got = model.encode_and_fuse(batch["input_ids"], batch["attention_mask"]).text.hidden_states
    expected = theirs.bert(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    assert difference(got[real], expected[real]) < 1e-5
