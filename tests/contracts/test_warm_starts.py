"""Contract of every entry of `FUSIONS`: what starts from a pretrained BERT is BERT's to the bit, the rest as drawn."""

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import BERT_NAMES, randomize, tiny_config
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining

import mmbert
from mmbert.errors import UsageError
from mmbert.model.fusion import FUSIONS
from mmbert.model.initialization import build_model, new_model
from mmbert.model.modeling import HeadedModel, MMBertForPreTraining
from mmbert.model.options import KEYS, ModelOptions
from mmbert.runtime import allowed_imports

STREAMS = {
    "early": "layers",
    "hybrid_cross": "layers",
    "hybrid": "text_layers",
    "hybrid_bottleneck": "text_layers",
    "hybrid_bridge": "text_layers",
}
"""Fusion -> its layers that start from BERT's; late fusions have none."""
SIZES = {"vocab_size": 40, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
MLM_HEAD = {
    "transform": "cls.predictions.transform.dense",
    "norm": "cls.predictions.transform.LayerNorm",
}

every_fusion = pytest.mark.parametrize("fusion", FUSIONS)


def save_bert(folder: Path, kind: type = BertForPreTraining, **settings: Any) -> dict[str, Tensor]:
    """Save a random BERT of 3 layers with its heads, and return its tensors."""
    sizes = {**SIZES, "num_hidden_layers": 3, "max_position_embeddings": 16, **settings}
    bert = kind(BertConfig(**sizes))
    randomize(bert, seed=1)
    bert.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("bert")
    tensors = save_bert(folder)
    return str(folder), tensors


def build(folder: str | Path, **overrides: Any) -> HeadedModel:
    """A model with one text layer and two fusion layers, drawn with seed 0."""
    config = tiny_config()
    derived = ("text_hidden_size", "text_num_attention_heads", "text_intermediate_size")
    settings = {key: getattr(config, key) for key in KEYS if key not in derived} | {"fusion_layers": 2}
    torch.manual_seed(0)
    return build_model(ModelOptions(**{**settings, "text_pretrained": str(folder), **overrides}))


def fusion_from_bert(stream: str, layers: int, text_layers: int) -> dict[str, str]:
    """Parameter of the model -> tensor of the file, of one stream."""
    return {
        f"mmbert.fusion.{stream}.{i}.{own}.{kind}": f"bert.encoder.layer.{text_layers + i}.{theirs}.{kind}"
        for i in range(layers)
        for own, theirs in BERT_NAMES.items()
        for kind in ("weight", "bias")
    }


def assert_starts_from(
    model: HeadedModel, drawn: HeadedModel, sources: dict[str, str], file: dict[str, Tensor]
) -> None:
    """Parameters in `sources` are those of the file, all others those of `drawn`, to the bit."""
    state, other = model.state_dict(), drawn.state_dict()
    assert state.keys() == other.keys() >= sources.keys()
    for name, value in state.items():
        expected = file[sources[name]] if name in sources else other[name]
        assert torch.equal(value, expected), name


@every_fusion
def test_layers_left_over_start_the_fusion_and_nothing_else_changes(
    fusion: str, bert: tuple[str, dict[str, Tensor]]
) -> None:
    folder, file = bert
    model, drawn = build(folder, fusion=fusion), build(folder, fusion=fusion, fusion_init="random")
    sources = fusion_from_bert(STREAMS[fusion], 2, 1) if fusion in STREAMS else {}
    if fusion == "early":
        sources |= {f"mmbert.fusion.pooler.dense.{kind}": f"bert.pooler.dense.{kind}" for kind in ("weight", "bias")}
    for own, theirs in MLM_HEAD.items():
        sources |= {f"objectives.mlm.{own}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias")}
    sources["objectives.mlm.bias"] = "cls.predictions.bias"
    assert_starts_from(model, drawn, sources, file)


@every_fusion
def test_random_start_is_what_the_constructor_draws(fusion: str, bert: tuple[str, dict[str, Tensor]]) -> None:
    folder, _ = bert
    model = build(folder, fusion=fusion, fusion_init="random")
    torch.manual_seed(0)
    drawn = new_model(model.config)
    state = drawn.state_dict()
    for name, value in model.state_dict().items():
        assert name.startswith("mmbert.text_encoder.") or torch.equal(value, state[name]), name
    generator = torch.get_rng_state()
    build(folder, fusion=fusion)
    assert torch.equal(torch.get_rng_state(), generator), "a warm start draws nothing"


@every_fusion
def test_warm_start_survives_saving(fusion: str, bert: tuple[str, dict[str, Tensor]], tmp_path: Path) -> None:
    model = build(bert[0], fusion=fusion)
    model.save_pretrained(tmp_path)
    state = MMBertForPreTraining.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_log_accounts_for_every_tensor(bert: tuple[str, dict[str, Tensor]], caplog: pytest.LogCaptureFixture) -> None:
    folder, file = bert
    with caplog.at_level(logging.INFO, logger="mmbert"):
        build(folder, fusion="hybrid_cross")
    loaded, started = caplog.messages
    # Of 3 layers and 5 tensors of embeddings, the text encoder takes one layer; 2 layers and 5 tensors start the rest.
    assert loaded.endswith(
        f"21 of the {len(file)} tensors in the file loaded, which set all 21 of the encoder; 37 more initialise fusion "
        "and heads; not used: pooler (2), cls (2)"
    )
    assert len(file) == 21 + 37 + 4
    assert started == (
        "fusion_init=bert: 32 of 55 tensors of fusion='hybrid_cross' start from encoder.layer.1, encoder.layer.2; "
        "random: absent_text (1), layers.cross_attention (20), pooler.dense (2); "
        "the MLM head starts from cls.predictions"
    )


def test_layers_beyond_those_of_bert_start_random(
    bert: tuple[str, dict[str, Tensor]], caplog: pytest.LogCaptureFixture
) -> None:
    """The pooler too: it reads the last layer."""
    folder, file = bert
    settings: dict[str, Any] = {"fusion": "early", "text_layers": 2, "objectives": {"itm": 1.0}}
    for layers in (2, 3):
        with caplog.at_level(logging.INFO, logger="mmbert"):
            model = build(folder, **settings, fusion_layers=layers)
        drawn = build(folder, **settings, fusion_layers=layers, fusion_init="random")
        assert_starts_from(model, drawn, fusion_from_bert("layers", 1, 2), file)
        assert f"start from encoder.layer.2; {layers - 1} of {layers} layers start random; random: " in caplog.text
        assert f"layers.attention ({10 * (layers - 1)}), " in caplog.text and "pooler.dense (2)" in caplog.text


def test_pooler_stays_random_below_layers_of_bert(bert: tuple[str, dict[str, Tensor]]) -> None:
    folder, file = bert
    settings: dict[str, Any] = {"fusion": "early", "fusion_layers": 1, "objectives": {"itm": 1.0}}
    model, drawn = build(folder, **settings), build(folder, **settings, fusion_init="random")
    assert_starts_from(model, drawn, fusion_from_bert("layers", 1, 1), file)


REASONS: dict[str, tuple[dict[str, Any], str]] = {
    "no layer left over": ({"text_layers": 3}, "starts random: text_layers=3 takes all 3 layers of text_pretrained="),
    "another width": (
        {"hidden_size": 24, "intermediate_size": 48},
        "starts random: hidden_size is 24, not the 32 of text_pretrained=",
    ),
    "other heads": ({"num_attention_heads": 8}, "num_attention_heads is 8, not the 4 of"),
    "another feed-forward width": ({"intermediate_size": 40}, "intermediate_size is 40, not the 48 of"),
    "no layers": ({"fusion": "late"}, "fusion='late' starts random: it has no layers that BERT has"),
}


@pytest.mark.parametrize("case", REASONS)
def test_fusion_that_can_not_start_from_bert_is_random_and_logs_why(
    case: str, bert: tuple[str, dict[str, Tensor]], caplog: pytest.LogCaptureFixture
) -> None:
    overrides, reason = REASONS[case]
    overrides = {"objectives": {"itm": 1.0}, **overrides}
    with caplog.at_level(logging.INFO, logger="mmbert"):
        model = build(bert[0], **overrides)
    assert reason in caplog.text
    assert_starts_from(model, build(bert[0], **overrides, fusion_init="random"), {}, {})


def test_another_activation_starts_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_bert(tmp_path, hidden_act="relu")
    with caplog.at_level(logging.INFO, logger="mmbert"):
        model = build(tmp_path)
    assert "the activation is gelu, not the relu of" in caplog.text
    assert "the MLM head starts random: its activation is gelu, BERT's relu" in caplog.text
    assert_starts_from(model, build(tmp_path, fusion_init="random"), {}, {})


def test_mlm_head_of_another_shape_or_none_is_random(
    bert: tuple[str, dict[str, Tensor]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="mmbert"):
        build(bert[0], hidden_size=24)
    assert (
        "MLM head starts random: cls.predictions.transform.dense.weight has shape (32, 32), the model's (32, 24)"
        in (caplog.text)
    )
    bare = save_bert(tmp_path, BertForMaskedLM)
    save_file({name: x for name, x in bare.items() if "cls." not in name}, tmp_path / "model.safetensors")
    with caplog.at_level(logging.INFO, logger="mmbert"):
        build(tmp_path, fusion="early")  # and a BERT without pooler
    assert "the file has no tensors named cls.predictions.transform.dense.weight" in caplog.text
    assert "32 of 38 tensors of fusion='early'" in caplog.text


def test_names_of_wrappers_and_old_files_are_understood(bert: tuple[str, dict[str, Tensor]], tmp_path: Path) -> None:
    file = save_bert(tmp_path)
    norms = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {}
    for name, value in file.items():
        for new, old in norms.items():
            name = name.replace(new, old)
        renamed[f"module.{name}"] = value
    save_file(renamed, tmp_path / "model.safetensors")
    assert_starts_from(build(tmp_path), build(bert[0]), {}, {})


def test_file_that_lacks_a_layer_left_over_is_rejected(tmp_path: Path) -> None:
    file = save_bert(tmp_path)
    lacking = {name: x for name, x in file.items() if "layer.2.output.dense.bias" not in name}
    save_file(lacking, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=r"'encoder.layer.2.output.dense.bias', from which .* is missing; give intact"):
        build(tmp_path)
    build(tmp_path, fusion_init="random")
    save_file({**file, "bert.encoder.layer.2.adapter.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=r"no place for, first 'encoder.layer.2.adapter.weight'"):
        build(tmp_path)


def test_unknown_start_is_rejected(bert: tuple[str, dict[str, Tensor]]) -> None:
    with pytest.raises(UsageError, match="fusion_init='brt': allowed are bert, random"):
        build(bert[0], fusion_init="brt")


CUSTOM = """import torch
from mmbert import Fused, Fusion, Tokens

class Mapped(Fusion):
    def __init__(self, config):
        super().__init__(config)
        self.dense = torch.nn.Linear(config.hidden_size, config.hidden_size)

    def modules_from_bert(self):
        return {NAME: "encoder.layer.2.attention.output.dense"}

    def forward(self, text: Tokens, image: Tokens) -> Fused:
        return Fused(text, image, self.dense(text.first))
"""


@pytest.mark.parametrize("name", ["dense", "dance"])
def test_custom_fusion_declares_its_modules(
    name: str, bert: tuple[str, dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mapped_fusion.py").write_text(CUSTOM.replace("NAME", repr(name)))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(allowed_imports, "_ALLOWED", ["mapped_fusion"])
    settings: dict[str, Any] = {"fusion": "mapped_fusion.Mapped", "objectives": {"itm": 1.0}}
    try:
        if name == "dance":
            with pytest.raises(UsageError, match=r"modules_from_bert\(\) names 'dance', which the fusion"):
                build(bert[0], **settings)
            return
        model = build(bert[0], **settings)
        assert torch.equal(
            model.mmbert.fusion.get_parameter("dense.weight"),
            bert[1]["bert.encoder.layer.2.attention.output.dense.weight"],
        )
    finally:
        sys.modules.pop("mapped_fusion", None)


def test_start_of_a_saved_model_ignores_the_option_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    MMBertForPreTraining(tiny_config()).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="mmbert"):
        build_model(mmbert.ModelOptions(pretrained=str(tmp_path)))
        assert not caplog.messages
        build_model(mmbert.ModelOptions(pretrained=str(tmp_path), fusion_init="random"))
    assert "model.fusion_init=random has no effect" in caplog.text
