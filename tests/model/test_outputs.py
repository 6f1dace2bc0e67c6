"""Keyword inputs and `ModelOutput`s of the models, as transformers' conventions have them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCAB, inputs, randomize, tiny_batch, tiny_config
from torch import nn
from transformers import AutoModelForVisualQuestionAnswering

from mmbert.errors import UsageError
from mmbert.model.auto_classes import (
    MMBertForImageTextRetrieval,
    MMBertForPairClassification,
    MMBertForQuestionAnswering,
)
from mmbert.model.modeling import MMBertForPreTraining, MMBertModel

every_family = pytest.mark.parametrize("fusion", ["early", "late", "hybrid"])
BATCH = inputs(tiny_batch())


def built(cls: Any, **overrides: Any) -> Any:
    torch.manual_seed(0)
    model = cls(tiny_config(**overrides)).eval()
    randomize(model)
    return model


@every_family
def test_hidden_states_and_attentions_are_those_of_every_layer(fusion: str) -> None:
    model = built(MMBertModel, fusion=fusion, text_layers=2, fusion_layers=2)
    out = model(**BATCH, output_hidden_states=True, output_attentions=True)
    fused = model.encode_and_fuse(**BATCH)
    torch.testing.assert_close(out.last_hidden_state, fused.text.hidden_states)
    torch.testing.assert_close(out.image_last_hidden_state, fused.image.hidden_states)
    torch.testing.assert_close(out.pooler_output, fused.pooled)
    assert out.pooled is out.pooler_output
    text, image, layers = [(4, 8, 32)] * 3, [(4, 5, 24)], {"early": [(4, 13, 32)] * 2, "late": []}
    streams = [(4, 8, 32), (4, 5, 32)] * 2
    assert [tuple(x.shape) for x in out.hidden_states] == text + image + layers.get(fusion, streams)
    own, cross = (4, 4, 8, 8), (4, 4, 8, 5)
    of_fusion = {"early": [(4, 4, 13, 13)] * 2, "late": []}.get(fusion, [own, cross, (4, 4, 5, 5), (4, 4, 5, 8)] * 2)
    assert [tuple(x.shape) for x in out.attentions] == [own] * 2 + [(4, 2, 5, 5)] + of_fusion
    assert all(torch.allclose(x.sum(-1), torch.ones(())) for x in out.attentions)
    plain = model(**BATCH, return_dict=False)
    assert isinstance(plain, tuple) and torch.allclose(plain[2], fused.pooled)


def test_all_positions_are_recorded_where_the_head_reads_one() -> None:
    model = built(MMBertForQuestionAnswering, fusion="early", labels=["no", "yes"])
    assert model(**BATCH, output_hidden_states=True).hidden_states[-1].shape == (4, 13, 32)


def test_pretraining_logits_are_those_of_the_heads() -> None:
    model = built(MMBertForPreTraining)
    out = model(**BATCH)
    assert out.loss is None and out.mlm_logits.shape == (4, 8, VOCAB)
    text, image = model.mmbert.encode_pairs(**BATCH)
    torch.testing.assert_close(out.itm_logits[:, 1] - out.itm_logits[:, 0], model.match_scores(text, image))
    torch.testing.assert_close(out.logits_per_text.diagonal(), model.objectives["itc"].pair_logits(text, image))
    torch.testing.assert_close(out.logits_per_image, out.logits_per_text.T)
    image_only = model(pixel_values=BATCH["pixel_values"])
    assert image_only.mlm_logits is None and image_only.itm_logits is None


def test_pretraining_loss_is_the_weighted_sum_of_the_losses_with_labels() -> None:
    model = built(
        MMBertForPreTraining, objectives={"mlm": 2.0, "itm": 3.0, "itc": {"weight": 5.0, "embedding_size": 8}}
    )
    labels, match = torch.full((4, 8), -100), torch.tensor([1, 0, 1, 1])
    labels[:, 1] = 7
    out = model(**BATCH, labels=labels, match_labels=match, return_loss=True)
    cross_entropy = nn.CrossEntropyLoss()
    mlm, itm = cross_entropy(out.mlm_logits[:, 1], labels[:, 1]), cross_entropy(out.itm_logits, match)
    own = torch.arange(4)
    itc = (cross_entropy(out.logits_per_text, own) + cross_entropy(out.logits_per_image, own)) / 2
    torch.testing.assert_close(out.loss, 2 * mlm + 3 * itm + 5 * itc)
    torch.testing.assert_close(model(**BATCH, labels=labels).loss, 2 * mlm)
    with pytest.raises(UsageError, match="a loss of itm needs the objective itm"):
        model(pixel_values=BATCH["pixel_values"], match_labels=match)


def test_loss_of_a_training_batch_in_evaluation_mode_draws_nothing() -> None:
    model, batch = built(MMBertForPreTraining), tiny_batch(8)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = model(**batch).loss
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(model(**batch).loss, first)


def test_token_type_ids_reach_the_text_encoder() -> None:
    model = built(MMBertForPreTraining)
    zeros = torch.zeros(4, 8, dtype=torch.int64)
    expected = model(**BATCH).itm_logits
    assert torch.equal(model(**BATCH, token_type_ids=zeros).itm_logits, expected)
    assert not torch.equal(model(**BATCH, token_type_ids=zeros + 1).itm_logits, expected)
    batch = tiny_batch()
    assert model(**batch, token_type_ids=zeros + 1).loss != model(**batch).loss


def test_unknown_inputs_are_named() -> None:
    model = built(MMBertForPreTraining)
    with pytest.raises(UsageError, match="takes no pixels"):
        model(input_ids=BATCH["input_ids"], pixels=BATCH["pixel_values"])
    with pytest.raises(UsageError, match=r"model\(\*\*batch\)"):
        model(tiny_batch())


def test_question_answering_takes_classes_or_scores() -> None:
    model = built(MMBertForQuestionAnswering, labels=["no", "yes", "red"])
    assert model.config.task == "vqa" and model.config.id2label[2] == "red"
    out = model(**BATCH, labels=torch.tensor([0, 2, -1, 1]))
    scores = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 0, 0], [0, 1, 0]])
    expected = nn.BCEWithLogitsLoss(reduction="none")(out.logits, scores).sum() / 4
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(model(**BATCH, labels=scores).loss, expected)
    assert model(**BATCH).loss is None
    with pytest.raises(UsageError, match="labels from 0 to 3; allowed are -1 to 2"):
        model(**BATCH, labels=torch.tensor([0, 3, 1, 1]))


def test_pair_classification_takes_several_images_in_a_dimension_of_their_own() -> None:
    model = built(MMBertForPairClassification, labels=["no", "yes"], num_images=2)
    images = torch.randn(4, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    texts = {name: BATCH[name] for name in ("input_ids", "attention_mask")}
    logits = model(**texts, pixel_values=images).logits
    assert logits.shape == (4, 2) and torch.equal(logits, model(**texts, pixel_values=images.flatten(0, 1)).logits)
    with pytest.raises(UsageError, match="takes task='vqa'; this configuration has task='decision'"):
        MMBertForQuestionAnswering(model.config)


def test_retrieval_model_takes_the_heads_it_needs_from_a_pretrained_one(tmp_path: Path) -> None:
    pretrained = built(MMBertForPreTraining)
    pretrained.save_pretrained(tmp_path)
    model = MMBertForImageTextRetrieval.from_pretrained(tmp_path).eval()
    assert [*model.objectives] == ["itm", "itc"]
    match = torch.tensor([1, 0, 1, 0])
    out = model(**BATCH, labels=match)
    torch.testing.assert_close(out.itm_logits, pretrained(**BATCH).itm_logits)
    torch.testing.assert_close(out.loss, nn.CrossEntropyLoss()(out.itm_logits, match))
    with pytest.raises(UsageError, match="needs the objective itm or itc"):
        MMBertForImageTextRetrieval(tiny_config(objectives={"mlm": 1.0}))


def test_saved_question_answering_model_loads_by_its_auto_class(tmp_path: Path) -> None:
    model = built(MMBertForQuestionAnswering, labels=["no", "yes"])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForVisualQuestionAnswering.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, MMBertForQuestionAnswering)
    assert torch.equal(loaded(**BATCH).logits, model(**BATCH).logits)


@pytest.mark.parametrize("size", [VOCAB + 6, VOCAB - 6])
def test_resizing_the_word_embeddings_resizes_the_bias_of_mlm(size: int, tmp_path: Path) -> None:
    model = built(MMBertForPreTraining)
    kept = min(size, VOCAB)
    ids = {**BATCH, "input_ids": BATCH["input_ids"].clamp(max=kept - 1)}
    before = model(**ids).mlm_logits
    model.resize_token_embeddings(size)
    after = model(**ids).mlm_logits
    assert after.shape == (4, 8, size) and model.config.vocab_size == size
    torch.testing.assert_close(after[..., :kept], before[..., :kept])
    model.save_pretrained(tmp_path)
    assert torch.equal(MMBertForPreTraining.from_pretrained(tmp_path).eval()(**ids).mlm_logits, after)
