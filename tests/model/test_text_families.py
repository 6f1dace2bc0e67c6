"""Text encoders of the families DistilBERT, ModernBERT and DeBERTa-v3, against transformers' own models."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import difference, inputs, randomize, tiny_batch, tiny_config, tiny_examples, tiny_processor
from torch import Tensor
from transformers import (
    DebertaV2ForMaskedLM,
    DistilBertForMaskedLM,
    ModernBertForMaskedLM,
    PreTrainedConfig,
)

import mmbert
from mmbert.errors import UsageError
from mmbert.model.backbone import TEXT_ENCODERS
from mmbert.model.configuration import MMBertConfig
from mmbert.model.initialization import build_model
from mmbert.model.lora import LoraOptions, adapted_layers, add_adapters, merge_adapters
from mmbert.model.modeling import MMBertForPreTraining, MMBertModel
from mmbert.model.options import CHOICES, KEYS, ModelOptions
from mmbert.model.pretrained_bert import REQUIRED_VALUES, UNUSED_KEYS
from mmbert.model.pretrained_text import PretrainedText, fill_family_architecture, parse_config
from mmbert.model.text_families import COMMON_KEYS, FAMILIES, FamilyTextEncoder, family_config

SIZES: dict[str, Any] = {"vocab_size": 40, "max_position_embeddings": 16, "pad_token_id": 0}
BERT_SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 3}
SPECIAL = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"))
THETAS = {"full_attention": 100.0, "sliding_attention": 10.0}
V3 = {
    "relative_attention": True, "position_buckets": 4, "norm_rel_ebd": "layer_norm", "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"], "position_biased_input": False,
}  # fmt: skip
"""What DeBERTa-v3 sets."""

# fmt: off
CHECKPOINTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "distilbert": (DistilBertForMaskedLM, {
        "dim": 16, "n_heads": 2, "hidden_dim": 24, "n_layers": 3, "activation": "relu",
    }),
    "modernbert": (ModernBertForMaskedLM, {
        **BERT_SIZES, **SPECIAL, "local_attention": 4, "hidden_activation": "silu", "norm_bias": True,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in THETAS.items()},
    }),
    "deberta-v2": (DebertaV2ForMaskedLM, {**BERT_SIZES, **V3}),
    # The kinds of position that v3 lacks, and the convolution of v2.
    "deberta-v2, absolute": (DebertaV2ForMaskedLM, {
        **BERT_SIZES, "relative_attention": True, "pos_att_type": ["c2p"], "type_vocab_size": 2,
        "conv_kernel_size": 3, "conv_act": "gelu", "layer_norm_eps": 1e-3, "hidden_act": "gelu_new",
    }),
}
# fmt: on
"""Name of a tiny checkpoint -> its class, with a head of its own, and configuration."""

every_checkpoint = pytest.mark.parametrize("name", CHECKPOINTS)
every_family = pytest.mark.parametrize("tower", FAMILIES)


def save(name: str, folder: Path) -> Any:
    """Save a random checkpoint, and return its encoder."""
    kind, settings = CHECKPOINTS[name]
    model = kind(kind.config_class(**SIZES, **settings)).eval()
    randomize(model, seed=1)
    model.save_pretrained(folder)
    return model.base_model


def options(folder: Path | None = None, **overrides: Any) -> ModelOptions:
    """`tiny_config` as options, without what follows from pretrained encoders."""
    derived = ("text_hidden_size", "text_num_attention_heads", "text_intermediate_size", "patch_size")
    images = ("image_hidden_size", "image_num_attention_heads")
    config = tiny_config(text_layers=3)
    keys = {key: getattr(config, key) for key in KEYS if key not in derived + images}
    return ModelOptions(**{**keys, "text_pretrained": None if folder is None else str(folder), **overrides})


def final(encoder: Any, states: Tensor) -> Tensor:
    """ModernBERT's last LayerNorm, which the other families do not have."""
    return encoder.final_norm(states) if hasattr(encoder, "final_norm") else states


@every_checkpoint
@pytest.mark.parametrize("layers", [1, 3])
@torch.no_grad()
def test_states_are_those_of_transformers_with_padding_on_either_side(
    name: str, layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = save(name, tmp_path)
    model = build_model(options(tmp_path, text_layers=layers)).eval()
    ids = torch.randint(5, 40, (1, 6), generator=torch.Generator().manual_seed(0))
    states = expected(ids, output_hidden_states=True).hidden_states
    last = expected(ids).last_hidden_state if layers == 3 else final(expected, states[layers])
    padded, mask = torch.full((3, 9), 7), torch.ones(3, 9, dtype=torch.int64)
    places = {0: slice(0, 6), 1: slice(3, 9), 2: slice(1, 7)}
    for row, place in places.items():
        padded[row], mask[row] = 0, 0
        padded[row, place], mask[row, place] = ids[0], 1
    for fused in (False, True):
        monkeypatch.setattr("mmbert.model.text_families.fused_attention_is_faster", lambda device, fused=fused: fused)
        got = model.mmbert.text_encoder(padded, mask, layers=range(1, layers))
        for row, place in places.items():
            for some, one in zip((got.hidden_states, *got.intermediate), (last, *states[1:layers]), strict=True):
                assert difference(some[row, place], one[0]) < 1e-5
                assert difference(some[row, 0], one[0, 0]) < 1e-5, "the first token represents the text"
        assert got.mask.equal(mask.bool())
        assert difference(model.mmbert.text_encoder(ids).hidden_states, last) < 1e-5


@every_family
@pytest.mark.parametrize("fusion", ["early", "late", "hybrid"])
@torch.no_grad()
def test_scores_do_not_depend_on_the_side_of_the_padding(tower: str, fusion: str) -> None:
    model = MMBertForPreTraining(tiny_config(text_tower=tower, fusion=fusion, objectives={"itm": 1.0, "itc": 1.0}))
    randomize(model.eval())
    right, left = inputs(tiny_batch()), inputs(tiny_batch())
    for row, length in enumerate(right["attention_mask"].sum(dim=1).tolist()):
        for key in ("input_ids", "attention_mask"):
            left[key][row] = right[key][row].roll(8 - length)
    one, other = model(**right), model(**left)
    assert difference(one.itm_logits, other.itm_logits) < 1e-5
    assert difference(one.logits_per_text, other.logits_per_text) < 1e-5


@every_checkpoint
def test_layers_above_the_first_are_named_as_left_out(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = save(name, tmp_path)
    with caplog.at_level(logging.INFO, logger="mmbert"):
        build_model(options(tmp_path, text_layers=2))
    path = FAMILIES[encoder.config.model_type].layers
    assert [f"{path}.{i} (" in caplog.text for i in range(3)] == [False, False, True]
    assert (
        f"fusion and heads start random: text_pretrained='{tmp_path}' is a {encoder.config.model_type}" in caplog.text
    )


@every_checkpoint
@pytest.mark.parametrize("change", ["missing", "additional", "of another shape"])
def test_tensors_that_do_not_fit_are_named(name: str, change: str, tmp_path: Path) -> None:
    layer = f"{FAMILIES[save(name, tmp_path).config.model_type].layers}.1."
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    key = next(n for n in state if layer in n and n.endswith("weight"))
    if change == "missing":
        del state[key]
        message = f"lacks 1 of the .* first '{key.split('.', 1)[1]}'"
    elif change == "additional":
        state[key.replace("weight", "scale")] = torch.ones(2)
        message = f"has 1 tensors that the model has no place for, first '.*{layer}.*scale'"
    else:
        state[key] = torch.ones(3)
        message = f"1 tensors have another shape .* first '.*{layer}.*weight'"
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(UsageError, match=message):
        build_model(options(tmp_path))


@every_checkpoint
@torch.no_grad()
def test_saved_model_builds_itself_without_the_checkpoint(name: str, tmp_path: Path) -> None:
    encoder = save(name, tmp_path / "text")
    model = build_model(options(tmp_path / "text", text_layers=2)).eval()
    model.save_pretrained(tmp_path / "saved")
    for file in (tmp_path / "text").iterdir():
        file.unlink()
    batch = inputs(tiny_batch())
    assert model.config.text_tower == encoder.config.model_type
    for again in (
        MMBertForPreTraining.from_pretrained(tmp_path / "saved"),
        build_model(ModelOptions(pretrained=str(tmp_path / "saved"))),
    ):
        assert torch.equal(model(**batch).mlm_logits, again.eval()(**batch).mlm_logits)


@every_checkpoint
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_reaches_every_parameter(name: str, checkpointing: bool, tmp_path: Path) -> None:
    save(name, tmp_path)
    model = build_model(options(tmp_path, fusion="hybrid_bridge", fusion_layers=2)).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    loss: Any = model(**tiny_batch(), generator=torch.Generator().manual_seed(0)).loss
    loss.backward()
    assert loss.isfinite()
    encoder = model.mmbert.text_encoder
    assert not [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert model.mmbert.word_embeddings.shape == (40, 16)


@every_family
def test_frozen_embeddings_and_layers_have_no_gradient(tower: str) -> None:
    args = V3 if tower == "deberta-v2" else None
    encoder = FamilyTextEncoder(tiny_config(text_tower=tower, text_layers=2, text_model_args=args))
    encoder.freeze(1)
    trained = {name for name, p in encoder.named_parameters() if p.requires_grad}
    layers = f"transformer.{encoder.family.layers}."
    assert all(name.startswith((f"{layers}1.", "transformer.final_norm")) for name in trained) and trained
    encoder.freeze("none")
    assert all(p.requires_grad for p in encoder.parameters())


@every_family
def test_hidden_states_attentions_and_explanation(tower: str, tmp_path: Path) -> None:
    model = MMBertForPreTraining(tiny_config(text_tower=tower, text_layers=2)).eval()
    randomize(model)
    output = model(**inputs(tiny_batch()), output_hidden_states=True, output_attentions=True)
    assert [tuple(x.shape) for x in output.hidden_states[:3]] == [(4, 8, 32)] * 3
    assert [tuple(x.shape) for x in output.attentions[:2]] == [(4, 4, 8, 8)] * 2
    model.save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    tiny_examples(tmp_path, [("x",)])
    for method in ("attention", "gradient"):
        found = mmbert.load(tmp_path, device="cpu").explain(tmp_path / "0.png", "a red cat", method=method, links=False)
        assert any(abs(value) > 0 for value in found.token_relevance)


@every_family
def test_adapters_merge_into_a_plain_model(tower: str) -> None:
    config = tiny_config(text_tower=tower, text_layers=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model, merged = MMBertForPreTraining(config), MMBertForPreTraining(config)
    add_adapters(model, LoraOptions(rank=2, targets="text"), seed=0)
    assert len(adapted_layers(model)) == {"distilbert": 12, "modernbert": 8, "deberta-v2": 12}[tower]
    randomize(model)
    merged.load_state_dict(merge_adapters(model, model.state_dict()))
    batch = inputs(tiny_batch())
    assert difference(model.eval()(**batch).mlm_logits, merged.eval()(**batch).mlm_logits) < 1e-5


def test_embeddings_of_distilbert_fuse_early_and_the_others_need_a_layer(tmp_path: Path) -> None:
    expected = save("distilbert", tmp_path)
    model = build_model(options(tmp_path, fusion="early", text_layers=0, objectives={"mlm": 1.0})).eval()
    ids = torch.tensor([[2, 5, 7, 3]])
    assert difference(model.mmbert.text_encoder(ids).hidden_states, expected.embeddings(ids)) < 1e-6
    assert model(**tiny_batch()).loss.isfinite()
    for name in ("modernbert", "deberta-v2"):
        save(name, tmp_path / name)
        with pytest.raises(UsageError, match=f"text_layers=0: text_tower='{name}' reads the order of the tokens"):
            build_model(options(tmp_path / name, fusion="early", text_layers=0, objectives={"mlm": 1.0}))


def test_tables_agree() -> None:
    assert CHOICES["text_tower"] == tuple(TEXT_ENCODERS)


@every_family
def test_every_key_of_the_configuration_is_accounted_for(tower: str) -> None:
    """A key that a new version of transformers adds must be read, or be known to change no output."""
    family = FAMILIES[tower]
    own = {field.name for field in dataclasses.fields(family.config_class)}
    own -= {field.name for field in dataclasses.fields(PreTrainedConfig)}
    read = {*COMMON_KEYS, *family.keys, *family.dropouts, *family.arguments}
    assert own <= read | {*family.unused} | UNUSED_KEYS | REQUIRED_VALUES.keys()
    assert not read & {*family.unused}


V3_BASE = {
    "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768,
    "initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 512, "relative_attention": True,
    "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": "p2c|c2p",
    "layer_norm_eps": 1e-7, "max_relative_positions": -1, "position_biased_input": False, "num_attention_heads": 12,
    "num_hidden_layers": 12, "type_vocab_size": 0, "vocab_size": 128100, "model_type": "deberta-v2",
}  # fmt: skip
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "distilbert-base-uncased": ({
        "activation": "gelu", "architectures": ["DistilBertForMaskedLM"], "attention_dropout": 0.1, "dim": 768,
        "dropout": 0.1, "hidden_dim": 3072, "initializer_range": 0.02, "max_position_embeddings": 512,
        "model_type": "distilbert", "n_heads": 12, "n_layers": 6, "pad_token_id": 0, "qa_dropout": 0.1,
        "seq_classif_dropout": 0.2, "sinusoidal_pos_embds": False, "tie_weights_": True, "vocab_size": 30522,
    }, None),
    "ModernBERT-base": ({
        "architectures": ["ModernBertForMaskedLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 50281, "classifier_activation": "gelu", "classifier_bias": False, "classifier_dropout": 0.0,
        "classifier_pooling": "mean", "cls_token_id": 50281, "decoder_bias": True, "deterministic_flash_attn": False,
        "embedding_dropout": 0.0, "eos_token_id": 50282, "global_attn_every_n_layers": 3,
        "global_rope_theta": 160000.0, "gradient_checkpointing": False, "hidden_activation": "gelu",
        "hidden_size": 768, "initializer_cutoff_factor": 2.0, "initializer_range": 0.02, "intermediate_size": 1152,
        "layer_norm_eps": 1e-05, "local_attention": 128, "local_rope_theta": 10000.0, "max_position_embeddings": 8192,
        "mlp_bias": False, "mlp_dropout": 0.0, "model_type": "modernbert", "norm_bias": False, "norm_eps": 1e-05,
        "num_attention_heads": 12, "num_hidden_layers": 22, "pad_token_id": 50283,
        "position_embedding_type": "absolute", "sep_token_id": 50282, "tie_word_embeddings": True,
        "torch_dtype": "float32", "transformers_version": "4.47.0.dev0", "vocab_size": 50368,
    }, None),
    "deberta-v3-base": (V3_BASE, {**V3, "position_buckets": 256}),
    "deberta-v2-xxlarge": (
        {**V3_BASE, "attention_head_size": 64, "conv_act": "gelu", "conv_kernel_size": 3, "hidden_size": 1536,
         "intermediate_size": 6144, "num_attention_heads": 24, "num_hidden_layers": 48, "pooler_dropout": 0,
         "pooler_hidden_act": "gelu", "pooler_hidden_size": 1536},
        {**V3, "position_buckets": 256, "attention_head_size": 64, "conv_act": "gelu", "conv_kernel_size": 3},
    ),
}  # fmt: skip
"""Published config.json -> the `text_model_args` that follow from it."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_expressed(name: str) -> None:
    content, expected = PUBLISHED[name]
    tower = content["model_type"]
    text = PretrainedText(name, tower, parse_config(content, name, tower), {})
    architecture = {key: getattr(ModelOptions(), key) for key in KEYS}
    fill_family_architecture(architecture, text)
    assert architecture["text_model_args"] == expected and architecture["text_tower"] == tower
    built, published = family_config(MMBertConfig(**architecture)), text.config
    for key in (*FAMILIES[tower].keys, *FAMILIES[tower].arguments, *COMMON_KEYS):
        if key not in ("n_layers", "num_hidden_layers", "layer_types", "norm_eps", "layer_norm_eps"):
            assert getattr(built, key, None) == getattr(published, key, None), key
    assert architecture["text_layer_norm_eps"] == {"distilbert": 1e-12, "modernbert": 1e-5, "deberta-v2": 1e-7}[tower]
    if tower == "modernbert":
        assert built.layer_types == published.layer_types[:6] == ["full_attention", *["sliding_attention"] * 2] * 2


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("distilbert", {"pre_norm": True}, "config.json has pre_norm=True, which transformers' distilbert does not"),
        ("modernbert", {"hidden_activation": "gelo"}, "hidden_activation='gelo', which .* Did you mean 'gelu'"),
        ("modernbert", {"layer_types": ["full_attention"]}, "config.json describes no modernbert: .*layer_types"),
        ("deberta-v2", {"embedding_size": 8}, "config.json has embedding_size=8, which .* deberta-v2 does not have"),
        ("deberta-v2", {"auto_map": {"AutoModel": "x.Y"}}, "has auto_map=.* takes {} only"),
    ],
)
def test_configuration_that_can_not_be_expressed_is_refused(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    encoder = save(name, tmp_path)
    config = encoder.config.to_dict() | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=message):
        build_model(options(tmp_path))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"text_tower": "distilbert"}, "is a modernbert, but text_tower='distilbert': leave text_tower out"),
        ({"text_layers": 4}, "text_layers=4, but text_pretrained='.*' has 3"),
        ({"text_hidden_size": 32}, "text_hidden_size=32, but text_pretrained='.*' has 16; leave it out"),
        ({"text_tower": "modernbert", "text_model_args": {"norm_bias": False}}, "text_model_args=.* leave it out"),
    ],
)
def test_options_that_contradict_the_checkpoint_are_errors(
    overrides: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save("modernbert", tmp_path)
    with pytest.raises(UsageError, match=message):
        build_model(options(tmp_path, **overrides))


def test_missing_folder_is_the_error_whatever_the_family(tmp_path: Path) -> None:
    for tower in ("bert", *FAMILIES):
        with pytest.raises(UsageError, match="is no BERT on the hub and no folder with one"):
            build_model(options(tmp_path / "nowhere", text_tower=tower))


def test_what_an_encoder_can_not_do_is_refused(tmp_path: Path) -> None:
    ids = torch.ones(1, 4, dtype=torch.int64)
    for tower in FAMILIES:
        encoder = FamilyTextEncoder(tiny_config(text_tower=tower))
        with pytest.raises(UsageError, match="has no token types; leave them out"):
            encoder(ids, token_type_ids=ids)
        with pytest.raises(UsageError, match="input_ids has 17 tokens, but max_position_embeddings=16"):
            encoder(torch.ones(1, 17, dtype=torch.int64))
    for args, message in (
        ({"norm_bia": True}, "text_model_args.norm_bia: text_tower='modernbert' takes .* Did you mean 'norm_bias'"),
        ({"hidden_size": 8}, "text_model_args.hidden_size: use the key text_hidden_size instead"),
        ({"norm_bias": "yes"}, "transformers' configuration is not valid: .*norm_bias"),
    ):
        with pytest.raises(UsageError, match=message):
            MMBertModel(tiny_config(text_tower="modernbert", text_model_args=args))
    with pytest.raises(UsageError, match=r"text_model_args=\{'norm_bias': True\} has no effect on text_tower=bert"):
        tiny_config(text_model_args={"norm_bias": True})
    save("deberta-v2", tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(
        UsageError, match=r"a deberta-v2: no model.safetensors in the folder.*save_pretrained\(FOLDER\)"
    ):
        build_model(options(tmp_path))


def test_token_types_of_an_older_deberta_are_read(tmp_path: Path) -> None:
    expected = save("deberta-v2, absolute", tmp_path)
    encoder = build_model(options(tmp_path)).mmbert.text_encoder.eval()
    ids, types = torch.tensor([[2, 5, 7, 3]]), torch.tensor([[0, 0, 1, 1]])
    assert difference(encoder(ids, None, types).hidden_states, expected(ids, None, types).last_hidden_state) < 1e-5
    assert difference(encoder(ids, None, types).hidden_states, encoder(ids).hidden_states) > 1e-2
