"""Every load accounts for all tensors of the file and all parameters of the model, or raises with the first name.

Sources: BERT files of many forms, ViTs of many timm families, and saved models of every fusion, custom ones included.
"""

import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from tiny import difference, randomize, tiny_batch, tiny_config, tiny_processor
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    CamembertForMaskedLM,
    RobertaForMaskedLM,
    XLMRobertaForMaskedLM,
)

import mmbert
from mmbert.errors import DataError, UsageError
from mmbert.model.configuration import MMBertConfig
from mmbert.model.fusion import FUSIONS
from mmbert.model.initialization import build_model
from mmbert.model.modeling import HeadedModel, MMBertForPreTraining, MMBertForTask, MMBertModel
from mmbert.model.options import KEYS, ModelOptions
from mmbert.runtime import allowed_imports


def options(**overrides: Any) -> ModelOptions:
    """`tiny_config` as options, without what follows from pretrained encoders."""
    derived = ("text_hidden_size", "text_num_attention_heads", "text_intermediate_size", "patch_size")
    images = ("image_hidden_size", "image_num_attention_heads")
    config = tiny_config()
    return ModelOptions(**{**{key: getattr(config, key) for key in KEYS if key not in derived + images}, **overrides})


IDS = torch.tensor([[2, 5, 7, 10, 3]])


# --- BERT ----------------------------------------------------------------------------------------------------------


def save_bert(folder: Path, **settings: Any) -> BertModel:
    """Save a random BERT of 2 layers, 16 wide."""
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    bert = BertModel(BertConfig(**{**sizes, "intermediate_size": 24, "max_position_embeddings": 12, **settings}))
    randomize(bert, seed=1)
    bert.eval().save_pretrained(folder)
    return bert


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def load_text(folder: Path, layers: int = 2) -> Tensor:
    model = build_model(options(text_pretrained=str(folder), text_layers=layers)).eval()
    return model.mmbert.text_encoder(IDS).hidden_states


def renamed(change: Callable[[str], str]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {change(name): x for name, x in state.items()}


def old_norms(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


BERT_NAMES: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "plain": lambda state: state,
    "bert.": renamed(lambda n: f"bert.{n}"),
    "module.": renamed(lambda n: f"module.{n}"),
    "_orig_mod.": renamed(lambda n: f"_orig_mod.{n}"),
    "text_encoder.": renamed(lambda n: f"text_encoder.{n}"),
    "module.bert.": renamed(lambda n: f"module.bert.{n}"),
    "any.other.": renamed(lambda n: f"any.other.{n}"),
    "gamma and beta": renamed(old_norms),
    "constants of old versions": lambda state: {**state, "embeddings.position_ids": torch.arange(12)[None]},
    "beside an image encoder": lambda s: {**{f"text.{n}": x for n, x in s.items()}, "visual.proj": torch.ones(2)},
}


@pytest.mark.parametrize("names", BERT_NAMES)
def test_bert_is_loaded_whatever_its_names(names: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bert = save_bert(tmp_path)
    rewrite(tmp_path, BERT_NAMES[names])
    with caplog.at_level(logging.INFO, logger="mmbert"):
        got = load_text(tmp_path)
    assert difference(got, bert(IDS).last_hidden_state) < 1e-5
    in_file = len(load_file(tmp_path / "model.safetensors"))
    assert f"37 of the {in_file} tensors in the file loaded, which set all 37" in caplog.text
    assert "not used: " in caplog.text and "pooler (2)" in caplog.text
    assert ("visual (1)" in caplog.text) == (names == "beside an image encoder")


def test_head_of_a_masked_language_model_is_named_as_unused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = save_bert(tmp_path).config
    BertForMaskedLM(config).save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, logger="mmbert"):
        load_text(tmp_path)
    assert "not used: cls (" in caplog.text


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_fewer_layers_leave_the_last_ones_and_say_which(
    layers: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_bert(tmp_path)
    with caplog.at_level(logging.INFO, logger="mmbert"):
        build_model(options(text_pretrained=str(tmp_path), text_layers=layers, objectives={"mlm": 1}))
    assert [f"encoder.layer.{n} (16)" in caplog.text for n in (0, 1)] == [layers < 1, layers < 2]


def without(part: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {name: x for name, x in state.items() if part not in name}


def with_shape(name: str, *shape: int) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {**state, name: torch.zeros(shape)}


BERT_REFUSED: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "a missing layer": (
        without("layer.1."),
        "lacks 16 of the 37 .* first 'encoder.layer.1.attention.self.query.weight'",
    ),
    "a layer of another name": (
        renamed(lambda n: f"x.{n}" if "layer.1." in n else n),
        "lacks 16 of the 37 .* first 'encoder.layer.1.attention.self.query.weight'",
    ),
    "a missing bias": (
        without("layer.0.output.dense.bias"),
        "lacks 1 of the 37 .* 'encoder.layer.0.output.dense.bias'",
    ),
    "one layer more than its configuration": (
        lambda s: {**s, **{n.replace("layer.1.", "layer.2."): x.clone() for n, x in s.items() if "layer.1." in n}},
        "has 16 tensors that the model has no place for, first 'encoder.layer.2",
    ),
    "an unknown tensor in a layer": (with_shape("encoder.layer.0.adapter", 2), "first 'encoder.layer.0.adapter'"),
    "relative positions": (
        with_shape("encoder.layer.0.attention.self.distance_embedding.weight", 23, 8),
        "first 'encoder.layer.0.attention.self.distance_embedding.weight'",
    ),
    "another shape": (
        with_shape("encoder.layer.0.output.dense.bias", 8),
        r"1 tensors have another shape .* first 'encoder.layer.0.output.dense.bias': \(8,\) in the file, \(16,\)",
    ),
    "two text encoders": (
        lambda s: {f"{prefix}.{n}": x.clone() for prefix in ("text", "momentum") for n, x in s.items()},
        "several text encoders, under 'momentum.', 'text.'",
    ),
    "a tensor under two names": (
        lambda s: s | {"embeddings.LayerNorm.gamma": s["embeddings.LayerNorm.weight"].clone()},
        "has 'embeddings.LayerNorm.weight' under two names",
    ),
    "no BERT at all": (lambda _: {"conv.weight": torch.zeros(2)}, "none of its 1 tensors is named .*'conv.weight'"),
}


@pytest.mark.parametrize("change", BERT_REFUSED)
def test_bert_that_does_not_fit_is_rejected_by_its_first_name(change: str, tmp_path: Path) -> None:
    save_bert(tmp_path)
    rewrite(tmp_path, BERT_REFUSED[change][0])
    with pytest.raises(UsageError, match=BERT_REFUSED[change][1]):
        load_text(tmp_path)


@pytest.mark.parametrize(
    "facts",
    [
        *({"hidden_act": name} for name in ("relu", "gelu_new", "silu", "gelu_pytorch_tanh")),
        *({"type_vocab_size": number} for number in (1, 3)),
        {"layer_norm_eps": 0.1},
        {"max_position_embeddings": 20, "vocab_size": 50, "pad_token_id": 3},
    ],
    ids=str,
)
def test_facts_of_a_bert_are_used_and_survive_saving(facts: dict[str, Any], tmp_path: Path) -> None:
    bert = save_bert(tmp_path / "bert", **facts)
    model = build_model(options(text_pretrained=str(tmp_path / "bert"), text_layers=2)).eval()
    model.save_pretrained(tmp_path / "saved")
    expected = bert(IDS).last_hidden_state
    for loaded in (model, MMBertForPreTraining.from_pretrained(tmp_path / "saved")):
        assert difference(loaded.mmbert.text_encoder(IDS).hidden_states, expected) < 1e-5


@pytest.mark.parametrize(
    "facts",
    [
        {"position_embedding_type": "relative_key"},
        {"position_embedding_type": "alibi"},
        {"is_decoder": True},
        {"add_cross_attention": True},
        {"pruned_heads": {"0": [1]}},
        {"auto_map": {"AutoModel": "code.Model"}},
        {"feed_forward_type": "geglu"},
        {"hidden_act": "gelu_of_my_own"},
        {"hidden_size": "16"},
        {"model_type": "electra"},
    ],
    ids=str,
)
def test_facts_of_a_bert_that_can_not_be_expressed_are_rejected(facts: dict[str, Any], tmp_path: Path) -> None:
    save_bert(tmp_path)
    edit_config(tmp_path, **facts)
    with pytest.raises(
        UsageError, match=next(iter(facts)) if "model_type" not in facts else "is a electra; allowed are bert, roberta,"
    ):
        load_text(tmp_path)


@pytest.mark.parametrize("kind", [RobertaForMaskedLM, XLMRobertaForMaskedLM, CamembertForMaskedLM])
def test_roberta_is_loaded_as_a_bert_without_the_first_rows_of_its_positions(
    kind: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 48, "max_position_embeddings": 14, "type_vocab_size": 1, "pad_token_id": 1}
    roberta = kind(kind.config_class(**sizes, layer_norm_eps=1e-5)).eval()
    randomize(roberta)
    roberta.save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, logger="mmbert"):
        model = build_model(options(text_pretrained=str(tmp_path), text_layers=3, objectives={"mlm": 1}))
    assert "the MLM head starts from lm_head" in caplog.text
    text = {
        "input_ids": torch.tensor([[0, 5, 7, 2], [0, 9, 2, 1]]),
        "attention_mask": torch.tensor([[1] * 4, [1] * 3 + [0]]),
    }
    got, expected = model.eval().mmbert.encode_text(**text).hidden_states, roberta.base_model(**text).last_hidden_state
    assert difference(got[0], expected[0]) < 1e-5 and difference(got[1, :3], expected[1, :3]) < 1e-5
    heads: Any = model.heads
    logits = heads["mlm"].logits(got[0], model.mmbert.word_embeddings)
    assert difference(logits, roberta(**text).logits[0]) < 1e-4
    assert model.config.max_position_embeddings == 12 and model.config.pad_token_id == 1
    with caplog.at_level(logging.INFO, logger="mmbert"):
        build_model(options(text_pretrained=str(tmp_path), text_layers=1))
    assert "tensors of fusion='hybrid' start from encoder.layer.1" in caplog.text


def test_keys_without_effect_on_the_outputs_are_accepted(tmp_path: Path) -> None:
    bert = save_bert(tmp_path)
    edit_config(tmp_path, directionality="bidi", pooler_type="first", num_beams=1, position_embedding_type="absolute")
    edit_config(tmp_path, _name_or_path="x", gradient_checkpointing=False, pruned_heads={})
    assert difference(load_text(tmp_path), bert(IDS).last_hidden_state) < 1e-5


def test_shards_are_read_and_stay_in_their_folder(tmp_path: Path) -> None:
    bert = save_bert(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    bert.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert difference(load_text(tmp_path), bert(IDS).last_hidden_state) < 1e-5
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["pooler.dense.bias"] = "../secret.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(DataError, match="a file in the same folder"):
        load_text(tmp_path)


# --- ViT -----------------------------------------------------------------------------------------------------------

PLAIN = "vit_tiny_patch16_224"
VITS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": (PLAIN, {}),
    "another activation": (PLAIN, {"act_layer": "quick_gelu"}),
    "another norm": (PLAIN, {"norm_layer": "rmsnorm"}),
    "CLIP's norm before": (PLAIN, {"pre_norm": True}),
    "normalised queries": (PLAIN, {"qk_norm": True}),
    "LayerScale": (PLAIN, {"init_values": 1e-3}),
    "pooled before its norm": (PLAIN, {"global_pool": "avg"}),
    "no class token": (PLAIN, {"class_token": False, "global_pool": "avg", "fc_norm": False}),
    "registers": (PLAIN, {"reg_tokens": 4, "no_embed_class": True}),
    "no final norm": (PLAIN, {"final_norm": False}),
    "no bias": (PLAIN, {"qkv_bias": False}),
    "another MLP width": (PLAIN, {"mlp_ratio": 2.0}),
    "attention pooling": ("vit_base_patch16_siglip_224", {}),
    "DINOv2": ("vit_small_patch14_reg4_dinov2", {"patch_size": 8}),
    "DINOv3": ("vit_small_patch16_dinov3", {"num_heads": 1, "embed_dim": 32}),
    "DeiT, distilled": ("deit_tiny_distilled_patch16_224", {}),
    "DeiT III": ("deit3_small_patch16_224", {}),
    "BEiT": ("beit_base_patch16_224", {}),
    "EVA-02": ("eva02_tiny_patch14_224", {"patch_size": 8, "num_heads": 1, "embed_dim": 32}),
    "relative positions": ("vit_relpos_small_patch16_224", {}),
    "convolutional stem": ("vit_tiny_r_s16_p8_224", {"patch_size": None, "img_size": 64}),
}


def save_vit(folder: Path, kind: str, **more: Any) -> Any:
    """Save a random ViT of 2 layers, 24 wide, as timm does."""
    name, changes = VITS[kind]
    sizes = {"depth": 2, "embed_dim": 24, "num_heads": 2, "img_size": 16, "patch_size": 8, **changes, **more}
    arguments = {key: value for key, value in sizes.items() if value is not None}
    vit = timm.create_model(name, num_classes=0, **arguments)
    randomize(vit, seed=2)
    save_for_hf(vit, str(folder), model_config={"num_classes": 0}, model_args=arguments, safe_serialization=True)
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def image_model(folder: Path, layers: int = 2, size: int = 16, **overrides: Any) -> HeadedModel:
    return build_model(options(image_pretrained=str(folder), image_layers=layers, image_size=size, **overrides)).eval()


def patches_like(encoded: Tensor, tokens: Tensor) -> Tensor:
    """The encoder's tokens without the mean that it puts first for ViTs without class token."""
    return encoded[:, encoded.shape[1] - tokens.shape[1] :]


@pytest.mark.parametrize("kind", VITS)
def test_vit_computes_what_timm_computes_and_survives_saving(kind: str, tmp_path: Path) -> None:
    vit = save_vit(tmp_path / "vit", kind)
    size = VITS[kind][1].get("img_size", 16)
    model = image_model(tmp_path / "vit", size=size)
    model.save_pretrained(tmp_path / "saved")
    images = torch.rand(2, 3, size, size)
    expected = vit.forward_features(images)
    for loaded in (model, MMBertForPreTraining.from_pretrained(tmp_path / "saved")):
        got = loaded.mmbert.image_encoder(images).hidden_states
        assert difference(patches_like(got, expected), expected) < 1e-4 * max(1, expected.abs().max().item())
    model.train()
    model.mmbert.image_encoder(images).hidden_states.sum().backward()
    assert not [name for name, p in model.mmbert.image_encoder.named_parameters() if p.grad is None]


def test_vit_on_the_hub_is_saved_as_its_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vit = save_vit(tmp_path / "vit", "LayerScale")
    content = json.loads((tmp_path / "vit/config.json").read_text())
    files = {"config.json": tmp_path / "vit/config.json", "model.safetensors": tmp_path / "vit/model.safetensors"}
    monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda *_, filename="", **__: str(files[filename or _[1]]))
    model = build_model(options(image_pretrained="hf-hub:me/vit", image_layers=2)).eval()
    monkeypatch.undo()
    assert model.config.image_model == content["architecture"] == PLAIN
    assert model.config.image_model_args == {"init_values": 1e-3}
    model.save_pretrained(tmp_path / "saved")
    loaded = MMBertForPreTraining.from_pretrained(tmp_path / "saved")
    images = torch.rand(1, 3, 16, 16)
    assert difference(loaded.mmbert.image_encoder(images).hidden_states, vit.forward_features(images)) < 1e-5


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_vit_of_a_wrapper_is_loaded(prefix: str, tmp_path: Path) -> None:
    vit = save_vit(tmp_path, "plain")
    rewrite(tmp_path, renamed(lambda n: prefix + n))
    images = torch.rand(1, 3, 16, 16)
    got = image_model(tmp_path).mmbert.image_encoder(images).hidden_states
    assert difference(got, vit.forward_features(images)) < 1e-5


def test_layers_and_heads_left_out_of_a_vit_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_vit(tmp_path, "plain")
    content = json.loads((tmp_path / "config.json").read_text())
    edit_config(tmp_path, num_classes=5, pretrained_cfg={**content["pretrained_cfg"], "num_classes": 5})
    rewrite(tmp_path, lambda s: {**s, "head.weight": torch.ones(5, 24), "head.bias": torch.ones(5)})
    with caplog.at_level(logging.INFO, logger="mmbert"):
        image_model(tmp_path, layers=1)
    assert "all 30 tensors of the ViT loaded from the 32 in the file; not used: head (2)" in caplog.text
    assert (
        "18 of the 30 tensors in the file loaded, which set all 18 of the encoder; not used: blocks.1 (12)"
        in caplog.text
    )


VIT_REFUSED: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "a missing layer": (without("blocks.1."), r"blocks.1.norm1.weight"),
    "a missing norm": (lambda s: {n: x for n, x in s.items() if n != "norm.weight"}, "norm.weight"),
    "LayerScale without its argument": (with_shape("blocks.0.ls1.gamma", 24), "blocks.0.ls1.gamma"),
    "an unknown name under blocks": (with_shape("blocks.extra.weight", 2), "blocks.extra.weight"),
    "one layer more than its configuration": (with_shape("blocks.2.norm1.weight", 24), "blocks.2.norm1.weight"),
    "an unknown prefix": (renamed(lambda n: f"image.{n}"), "cls_token|image.cls_token"),
}


@pytest.mark.parametrize("classes", [0, 5], ids=["strict in timm", "not strict in timm"])
@pytest.mark.parametrize("change", VIT_REFUSED)
def test_vit_that_does_not_fit_is_rejected_by_its_first_name(change: str, classes: int, tmp_path: Path) -> None:
    """With another number of classes than its file's, timm loads non-strictly and leaves the rest random."""
    save_vit(tmp_path, "plain")
    rewrite(tmp_path, VIT_REFUSED[change][0])
    content = json.loads((tmp_path / "config.json").read_text())
    edit_config(tmp_path, num_classes=classes, pretrained_cfg={**content["pretrained_cfg"], "num_classes": classes})
    with pytest.raises(UsageError, match=VIT_REFUSED[change][1]):
        image_model(tmp_path, layers=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_chans": 1}, "1 channels"),
        ({"checkpoint_path": "x.pth"}, "model_args.checkpoint_path"),
        ({"no_such_argument": 1}, "no_such_argument"),
    ],
)
def test_arguments_of_a_vit_that_can_not_be_expressed_are_rejected(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_vit(tmp_path, "plain")
    content = json.loads((tmp_path / "config.json").read_text())
    edit_config(tmp_path, model_args={**content["model_args"], **change})
    with pytest.raises(UsageError, match=message):
        image_model(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"image_model": "hf-hub:me/vit"}, "names weights; expected the name of a timm architecture"),
        ({"image_model": "local-dir:vit"}, "names weights; expected the name of a timm architecture"),
        ({"image_model": f"{PLAIN}.augreg_in21k"}, "only image_pretrained loads weights"),
        ({"image_model_args": {"depth": 3}}, "use the key image_layers instead"),
        ({"image_model_args": {"checkpoint_path": "x.pth"}}, "not an argument of the architecture"),
        (
            {"image_model": "convit_tiny", "patch_size": None},
            "image_hidden_size=24, but .*'convit_tiny' builds",
        ),
        ({"text_hidden_act": "geluu"}, "no activation of transformers.*Did you mean 'gelu'"),
    ],
)
def test_architecture_that_could_not_be_built_again_is_rejected(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_model(options(**{"image_hidden_size": 24, **overrides}))


def test_width_of_a_family_that_counts_it_by_heads_survives_saving(tmp_path: Path) -> None:
    settings = {"image_model": "convit_tiny", "image_hidden_size": None, "image_num_attention_heads": None}
    model = MMBertModel(tiny_config(**settings, patch_size=None, image_size=32, image_layers=11))
    assert model.config.image_hidden_size == 192
    model.save_pretrained(tmp_path)
    assert MMBertModel.from_pretrained(tmp_path).config.image_hidden_size == 192


# --- saved models --------------------------------------------------------------------------------------------------

CUSTOM = """import math
import torch
from mmbert import Fused, Fusion, Tokens

class Weighted(Fusion):
    def __init__(self, config):
        super().__init__(config)
        self.absent = torch.nn.Parameter(torch.full((config.hidden_size,), 0.25))
        self.scales = torch.nn.ParameterList([torch.nn.Parameter(torch.tensor(2.0)), torch.nn.Parameter(torch.ones(2))])
        self.register_buffer("table", torch.linspace(0.1, 1, config.hidden_size), persistent=False)
        self.register_buffer("kept", torch.arange(3.0))
        self.first = float(self.table.sum())  # needs real tensors
        self.plain = torch.tensor([1.0, 2.0])  # neither parameter nor buffer

    def forward(self, text: Tokens, image: Tokens) -> Fused:
        x, y = text.with_fallback(self.absent).first, image.with_fallback(self.absent).first
        joint = self.table * x + (1 - self.table) * y * self.scales[0] + self.plain.sum() + self.first
        return Fused(text, image, joint)
"""


@pytest.fixture
def custom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A custom fusion with raw parameters and buffers of either kind."""
    (tmp_path / "custom_fusion.py").write_text(CUSTOM)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(allowed_imports, "_ALLOWED", ["custom_fusion"])
    yield "custom_fusion.Weighted"
    sys.modules.pop("custom_fusion", None)


def fill_memory() -> None:
    """Leave large numbers in freed memory, where uninitialised tensors will find them."""
    junk = [torch.full((size,), 1e30) for size in (1, 2, 16, 32, 40, 128, 512, 1 << 10, 1 << 12) for _ in range(30)]
    del junk


def tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, the non-persistent ones included."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize("head", ["objectives", "decision", "none"])
@pytest.mark.parametrize("fusion", [*FUSIONS, "custom"])
def test_saved_model_is_loaded_to_the_bit(fusion: str, head: str, tmp_path: Path, custom: str) -> None:
    settings = {"task": "decision", "labels": ["no", "yes"]} if head == "decision" else {}
    config = tiny_config(fusion=custom if fusion == "custom" else fusion, **settings)
    kind = {"objectives": MMBertForPreTraining, "decision": MMBertForTask, "none": MMBertModel}[head]
    model: Any = kind(config)
    randomize(model)
    model.save_pretrained(tmp_path / "m")
    tiny_processor().save_pretrained(tmp_path / "m")
    fill_memory()
    before = torch.get_rng_state()
    loaded = kind.from_pretrained(tmp_path / "m")
    assert torch.equal(torch.get_rng_state(), before), "loading draws nothing from the caller's generator"
    fill_memory()
    for other in (loaded, mmbert.load(tmp_path / "m", device="cpu").model):
        got = tensors(other)
        assert got.keys() == tensors(model).keys()
        for name, expected in tensors(model).items():
            assert torch.equal(got[name], expected), name


def assert_initialized(loaded: MMBertForPreTraining, file: dict[str, Tensor], config: MMBertConfig) -> None:
    """Tensors of the file are loaded; the others have the value or the spread that the constructor gives."""
    fresh = tensors(MMBertForPreTraining(config))
    for name, got in tensors(loaded).items():
        assert got.isfinite().all(), name
        if name in file and file[name].shape == got.shape:
            assert torch.equal(got, file[name]), name
        elif fresh[name].unique().numel() == 1:  # zeros, ones, the temperature
            assert torch.equal(got, fresh[name]), name
        else:
            assert 0.5 < (got.float().std() / fresh[name].float().std()) < 2, name


@pytest.mark.parametrize("fusion", [*FUSIONS, "custom"])
def test_heads_that_a_backbone_lacks_are_initialized(fusion: str, tmp_path: Path, custom: str) -> None:
    config = tiny_config(fusion=custom if fusion == "custom" else fusion)
    backbone = MMBertModel(config)
    randomize(backbone)
    backbone.save_pretrained(tmp_path / "m")
    fill_memory()
    loaded, report = MMBertForPreTraining.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert {name.split(".")[0] for name in report["missing_keys"]} == {"objectives"}
    assert_initialized(loaded, {f"mmbert.{name}": x for name, x in backbone.state_dict().items()}, config)


@pytest.mark.parametrize("fusion", [*FUSIONS, "custom"])
def test_raw_parameters_that_a_file_lacks_are_initialized(fusion: str, tmp_path: Path, custom: str) -> None:
    config = tiny_config(fusion=custom if fusion == "custom" else fusion)
    model = MMBertForPreTraining(config)
    randomize(model)
    model.save_pretrained(tmp_path / "m")
    known = torch.nn.Linear | torch.nn.LayerNorm | torch.nn.Embedding | torch.nn.Conv2d
    modules = {prefix: module for prefix, module in model.named_modules() if not isinstance(module, known)}
    raw = {f"{prefix}.{name}" for prefix, m in modules.items() for name, _ in m.named_parameters(recurse=False)}
    assert {"objectives.mlm.bias", "objectives.itc.log_scale"} < raw and any("absent" in name for name in raw)
    rewrite(tmp_path / "m", lambda state: {name: x for name, x in state.items() if name not in raw})
    fill_memory()
    loaded, report = MMBertForPreTraining.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert {*report["missing_keys"]} == raw
    assert_initialized(loaded, load_file(tmp_path / "m/model.safetensors"), config)


def test_another_image_size_is_rejected_or_initialized(tmp_path: Path) -> None:
    model = MMBertForPreTraining(tiny_config())
    randomize(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        MMBertForPreTraining.from_pretrained(tmp_path, image_size=32)
    fill_memory()
    loaded = MMBertForPreTraining.from_pretrained(tmp_path, image_size=32, ignore_mismatched_sizes=True)
    assert_initialized(loaded, load_file(tmp_path / "model.safetensors"), tiny_config(image_size=32))


def test_file_without_any_tensor_of_the_model_is_rejected(tmp_path: Path) -> None:
    MMBertForPreTraining(tiny_config()).save_pretrained(tmp_path)
    rewrite(tmp_path, renamed(lambda n: f"module.{n}"))
    with pytest.raises(UsageError, match="none of the weights in the file belongs to a MMBertForPreTraining"):
        MMBertForPreTraining.from_pretrained(tmp_path)


SAVED_REFUSED: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "a missing weight": (without("fusion.absent_text"), "lacks 1 of .* first 'mmbert.fusion.absent_text'"),
    "another shape": (
        with_shape("mmbert.fusion.absent_text", 8),
        r"another shape, .*absent_text': \(8,\) instead of",
    ),
    "an unknown weight": (with_shape("mmbert.fusion.gate", 8), "no place for, first 'mmbert.fusion.gate'"),
}


@pytest.mark.parametrize("change", SAVED_REFUSED)
def test_folder_to_start_from_that_does_not_fit_is_rejected(change: str, tmp_path: Path) -> None:
    MMBertForPreTraining(tiny_config()).save_pretrained(tmp_path)
    rewrite(tmp_path, SAVED_REFUSED[change][0])
    with pytest.raises(UsageError, match=SAVED_REFUSED[change][1]):
        build_model(mmbert.ModelOptions(pretrained=str(tmp_path)))


def test_folder_to_start_from_names_new_and_unused_heads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    MMBertForPreTraining(tiny_config(objectives={"mlm": 1, "itm": 1})).save_pretrained(tmp_path)
    starting = mmbert.ModelOptions(pretrained=str(tmp_path), objectives={"mlm": 1, "itc": 1})
    with caplog.at_level(logging.INFO, logger="mmbert"):
        model = build_model(starting)
    file = load_file(tmp_path / "model.safetensors")
    loaded = sum(name in file for name in model.state_dict())
    assert f"{loaded} of the {len(file)} tensors in the file loaded" in caplog.text
    assert "newly initialized: objectives.itc (5); not used: objectives.itm (2)" in caplog.text


def test_backbone_can_be_started_from(tmp_path: Path) -> None:
    backbone = MMBertModel(tiny_config())
    randomize(backbone)
    backbone.save_pretrained(tmp_path)
    model = build_model(mmbert.ModelOptions(pretrained=str(tmp_path)))
    for name, value in backbone.state_dict().items():
        assert torch.equal(model.mmbert.state_dict()[name], value), name
    assert model(**tiny_batch()).loss.isfinite()


# --- Weights that are no numbers -----------------------------------------------------------------------------------


def with_nan(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """One value of the last 2-dimensional tensor becomes NaN."""
    name = [name for name, x in state.items() if x.ndim == 2 and x.is_floating_point()][-1]
    state[name][0, 0] = torch.nan
    return state


def test_weights_that_are_not_finite_are_rejected(tmp_path: Path) -> None:
    """Such as those of a diverged run, from every kind of source."""
    save_bert(tmp_path / "bert")
    save_vit(tmp_path / "vit", "plain")
    MMBertForPreTraining(tiny_config()).save_pretrained(tmp_path / "saved")
    tiny_processor().save_pretrained(tmp_path / "saved")
    for kind in ("bert", "vit", "saved"):
        rewrite(tmp_path / kind, with_nan)
    for load in (
        lambda: load_text(tmp_path / "bert"),
        lambda: image_model(tmp_path / "vit"),
        lambda: build_model(ModelOptions(pretrained=str(tmp_path / "saved"))),
        lambda: mmbert.load(tmp_path / "saved"),
    ):
        with pytest.raises(DataError, match=r"NaN or infinite values in '[\w.]+'; expected finite weights"):
            load()


FOREIGN_FILES: dict[str, tuple[str, dict[str, Any], str]] = {
    "longer texts": ("image_settings.json", {"max_text_length": 17}, "17 max_text_length .* expected at most 16"),
    "larger images": ("image_settings.json", {"image_size": 32}, "image_size=32 in .* expected 16"),
    "a smaller vocabulary": ("config.json", {"vocab_size": 9}, ""),
    "a key too many": ("image_settings.json", {"crop": 1}, "image_settings.json: the keys .*crop; expected the keys"),
    "two channels": ("image_settings.json", {"mean": [0.5, 0.5]}, "one number for each of the 3 channels"),
    "an unknown interpolation": ("image_settings.json", {"interpolation": "cubic"}, "interpolation='cubic'; allowed"),
}


@pytest.mark.parametrize("change", FOREIGN_FILES)
def test_processor_files_of_another_model_are_rejected(change: str, tmp_path: Path) -> None:
    file, changes, message = FOREIGN_FILES[change]
    config = tiny_config(**(changes if file == "config.json" else {}))
    MMBertForPreTraining(config).save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    if file != "config.json":
        settings = json.loads((tmp_path / file).read_text())
        (tmp_path / file).write_text(json.dumps(settings | changes))
    with pytest.raises(DataError, match=message or r"\d+ entries in its tokenizer; expected at most 9"):
        mmbert.load(tmp_path)


def test_image_settings_that_are_no_json_are_rejected(tmp_path: Path) -> None:
    MMBertForPreTraining(tiny_config()).save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    (tmp_path / "image_settings.json").write_text("{")
    with pytest.raises(DataError, match=r"image_settings.json: .*; expected the keys image_size, interpolation"):
        mmbert.load(tmp_path)
