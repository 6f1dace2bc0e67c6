"""Pretrained weights are loaded into the model and survive saving.

transformers redraws weights that it does not know, so a pretrained ViT can be lost without a word: these tests compare
tensors, not losses.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from tiny import difference, randomize, tiny_batch, tiny_config
from torch import Tensor
from transformers import BertConfig, BertModel

from mmbert.errors import UsageError
from mmbert.model.fusion import FUSIONS
from mmbert.model.initialization import build_model
from mmbert.model.modeling import MMBertForPreTraining, MMBertModel
from mmbert.model.options import KEYS, ModelOptions

MEAN = [0.1, 0.2, 0.3]
OBJECTIVES = {"mlm": 1.0, "itm": 1.0, "itc": {"weight": 1.0, "embedding_size": 16}}


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of 3 layers, 16 wide, with the pooler that real ones have."""
    folder = tmp_path_factory.mktemp("bert")
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=12,
    )
    bert = BertModel(config)
    randomize(bert, seed=1)
    bert.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random ViT of 3 layers, 24 wide, as timm saves one: config.json and model.safetensors."""
    folder = tmp_path_factory.mktemp("vit")
    arguments = {"depth": 3, "embed_dim": 24, "num_heads": 2, "img_size": 16, "patch_size": 8}
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, **arguments)
    randomize(vit, seed=2)
    save_file(vit.state_dict(), folder / "model.safetensors")
    statement = {"input_size": [3, 16, 16], "mean": MEAN, "std": [0.5, 0.5, 0.5], "num_classes": 0}
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "pretrained_cfg": statement}
    (folder / "config.json").write_text(json.dumps({**config, "model_args": arguments}))
    return folder


def options(**overrides: object) -> ModelOptions:
    """`tiny_config` as options, without what follows from pretrained encoders."""
    config = tiny_config()
    derived = ("text_hidden_size", "text_num_attention_heads", "text_intermediate_size", "patch_size")
    chosen = {name: getattr(config, name) for name in KEYS if name not in (*derived, "image_hidden_size")}
    chosen["image_num_attention_heads"] = None
    return ModelOptions(**{**chosen, **overrides})


def bert_state(model: MMBertForPreTraining) -> dict[str, Tensor]:
    return model.mmbert.text_encoder.bert.state_dict()


def vit_state(model: MMBertForPreTraining) -> dict[str, Tensor]:
    return model.mmbert.image_encoder.vit.state_dict()


def assert_holds(state: dict[str, Tensor], file: dict[str, Tensor], *, besides: tuple[str, ...] = ()) -> None:
    """Every tensor of the encoder is in the file, bit for bit."""
    for name, value in state.items():
        if name not in besides:
            assert value.dtype == torch.float32
            assert torch.equal(value, file[name].float()), name


def test_pretrained_encoders_arrive_and_survive_saving(bert_folder: Path, vit_folder: Path, tmp_path: Path) -> None:
    model = build_model(
        options(text_pretrained=str(bert_folder), image_pretrained=str(vit_folder), text_layers=3, image_layers=3)
    )
    bert, vit = load_file(bert_folder / "model.safetensors"), load_file(vit_folder / "model.safetensors")
    model.save_pretrained(tmp_path)
    again = MMBertForPreTraining.from_pretrained(tmp_path)
    body = MMBertModel.from_pretrained(tmp_path)
    for state in (bert_state(model), bert_state(again), body.text_encoder.bert.state_dict()):
        assert len(state) == len(bert) - 2  # all but the pooler
        assert_holds(state, bert)
    for state in (vit_state(model), vit_state(again), body.image_encoder.vit.state_dict()):
        assert state.keys() == vit.keys()
        assert_holds(state, vit)
    assert model.config.vocab_size == 50 and model.config.max_position_embeddings == 12
    assert model.config.text_hidden_size == 16 and model.config.text_intermediate_size == 24
    assert model.config.image_hidden_size == 24 and model.config.image_num_attention_heads == 2
    assert model.mmbert.image_encoder.vit.pretrained_cfg["mean"] == MEAN


def test_pretrained_encoders_compute_what_they_computed_before(bert_folder: Path, vit_folder: Path) -> None:
    """Head counts, epsilons and activations are not in the weights: outputs must agree too."""
    model = build_model(
        options(text_pretrained=str(bert_folder), image_pretrained=str(vit_folder), text_layers=3, image_layers=3)
    ).eval()
    batch = tiny_batch()
    bert = BertModel.from_pretrained(bert_folder, add_pooling_layer=False).eval()
    real = batch["attention_mask"].bool()
    expected = bert(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    got = model.mmbert.text_encoder(batch["input_ids"], batch["attention_mask"]).hidden_states
    assert difference(got[real], expected[real]) < 1e-5
    vit = timm.create_model(f"local-dir:{vit_folder}", pretrained=True).eval()
    got = model.mmbert.image_encoder(batch["pixel_values"]).hidden_states
    assert difference(got, vit.forward_features(batch["pixel_values"])) < 1e-5


def test_fewer_layers_take_the_first_ones(bert_folder: Path, vit_folder: Path) -> None:
    model = build_model(
        options(
            text_pretrained=str(bert_folder),
            image_pretrained=str(vit_folder),
            text_layers=0,
            image_layers=1,
            objectives={"mlm": 1},
        )
    )
    assert not any("encoder.layer" in name for name in bert_state(model))
    assert {name.split(".")[1] for name in vit_state(model) if name.startswith("blocks")} == {"0"}
    assert_holds(bert_state(model), load_file(bert_folder / "model.safetensors"))
    assert_holds(vit_state(model), load_file(vit_folder / "model.safetensors"))


def test_another_image_size_resamples_the_position_table_only(vit_folder: Path) -> None:
    model = build_model(options(image_pretrained=str(vit_folder), image_size=32))
    state, file = vit_state(model), load_file(vit_folder / "model.safetensors")
    assert_holds(state, file, besides=("pos_embed",))
    assert state["pos_embed"].shape == (1, 17, 24) and file["pos_embed"].shape == (1, 5, 24)
    assert torch.equal(state["pos_embed"][:, 0], file["pos_embed"][:, 0])  # the class token's place
    assert abs(state["pos_embed"][:, 1:].mean() - file["pos_embed"][:, 1:].mean()) < 0.05


def test_from_scratch_draws_new_weights() -> None:
    torch.manual_seed(0)
    model = build_model(options(image_hidden_size=24, image_num_attention_heads=2, patch_size=8))
    words = model.mmbert.word_embeddings
    assert abs(words[1:].std() - 0.02) < 0.002
    qkv = model.mmbert.image_encoder.vit.blocks[0].attn.qkv.weight
    assert 0.01 < qkv.std() < 0.03


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"text_layers": 4}, r"text_layers=4, but text_pretrained='.*' has 3"),
        ({"image_layers": 4}, r"image_layers=4, but image_pretrained='.*' has 3"),
        ({"text_hidden_size": 32}, r"text_hidden_size=32, but text_pretrained='.*' has 16; leave it out"),
        ({"text_num_attention_heads": 4}, r"text_num_attention_heads=4, but .* has 2"),
        ({"text_intermediate_size": 64}, r"text_intermediate_size=64, but .* has 24"),
        ({"image_hidden_size": 48}, r"image_hidden_size=48, but image_pretrained='.*' has 24"),
        ({"image_num_attention_heads": 3}, r"image_num_attention_heads=3, but .* has 2"),
        ({"patch_size": 4}, r"patch_size=4, but image_pretrained='.*' has 8"),
        ({"image_size": 20}, r"image_size=20 is not a multiple of the patch size 8"),
        (
            {"text_pretrained": "/no/such/folder"},
            "text_pretrained='/no/such/folder' is no BERT on the hub and no folder",
        ),
        ({"image_pretrained": "/no/such/folder"}, "image_pretrained='/no/such/folder' is no folder"),
        ({"image_pretrained": "vit_tiny_patch16_225"}, "timm has no pretrained weights of that name"),
        ({"image_pretrained": "vit_tiny_patch16_224.nothing"}, "image_pretrained=.*Invalid pretrained tag"),
        ({"image_model_args": {"init_values": 1e-5}}, r"image_model_args=.*, but image_pretrained='.*' has {}"),
    ],
)
def test_options_that_contradict_the_pretrained_encoder_are_rejected(
    overrides: dict, message: str, bert_folder: Path, vit_folder: Path
) -> None:
    settings = {"text_pretrained": str(bert_folder), "image_pretrained": str(vit_folder), **overrides}
    with pytest.raises(UsageError, match=message):
        build_model(options(**settings))


def test_folders_with_something_else_are_rejected(tmp_path: Path, vit_folder: Path) -> None:
    with pytest.raises(UsageError, match="and weights of a timm model found"):
        build_model(options(image_pretrained=str(tmp_path)))
    with pytest.raises(UsageError, match="is no BERT on the hub and no folder with one"):
        build_model(options(text_pretrained=str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "electra", "vocab_size": 50}))
    with pytest.raises(UsageError, match="is a electra; allowed are bert, roberta"):
        build_model(options(text_pretrained=str(tmp_path)))
    (tmp_path / "config.json").write_text((vit_folder / "config.json").read_text())
    with pytest.raises(UsageError, match="and weights of a timm model found"):  # a config without weights
        build_model(options(image_pretrained=str(tmp_path)))


def test_an_unreachable_hub_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="vit_tiny_patch16_224"):
        build_model(options(image_pretrained="vit_tiny_patch16_224.not_in_any_cache"))


def test_real_weights_arrive_and_survive_saving(shared: Path, tmp_path: Path) -> None:
    """MiniLM and DINOv2 as published (fp16), at an image size other than theirs."""
    text, image = shared / "weights/minilm-l6-h384", shared / "weights/vit_small_patch14_dinov2"
    model = build_model(
        ModelOptions(text_pretrained=str(text), image_pretrained=str(image), image_layers=12, image_size=56)
    )
    bert, vit = load_file(text / "model.safetensors"), load_file(image / "model.safetensors")
    assert next(iter(vit.values())).dtype == torch.float16
    model.save_pretrained(tmp_path)
    again = MMBertForPreTraining.from_pretrained(tmp_path)
    for loaded in (model, again):
        state = vit_state(loaded)
        assert len({name.split(".")[1] for name in state if name.startswith("blocks.")}) == 12
        assert state.keys() == vit.keys()
        assert_holds(state, vit, besides=("pos_embed",))
        assert state["pos_embed"].shape == (1, 17, 384)
        assert_holds(bert_state(loaded), bert)
    assert torch.equal(vit_state(model)["pos_embed"], vit_state(again)["pos_embed"])
    assert model.config.vocab_size == 30522 and model.config.text_num_attention_heads == 12


# --- encoders and heads of a run with another fusion -----------------------------------------------------------------


@pytest.mark.parametrize("fusion", [name for name in FUSIONS if name != "hybrid_bridge"])
def test_encoders_and_heads_of_another_fusion_are_taken(fusion: str, tmp_path: Path) -> None:
    saved = build_model(options(fusion="hybrid_cross", image_hidden_size=24))
    randomize(saved)
    saved.save_pretrained(tmp_path)
    torch.manual_seed(1)
    start = ModelOptions(
        pretrained=str(tmp_path), pretrained_parts="encoders", fusion=fusion, fusion_layers=1, objectives=OBJECTIVES
    )
    model = build_model(start)
    assert model.config.fusion == fusion and type(model.mmbert.fusion) is FUSIONS[fusion]
    before, now = saved.state_dict(), model.state_dict()
    taken = [name for name in now if not name.startswith("mmbert.fusion.")]
    assert {"objectives.itm.head.weight", "mmbert.image_projection.weight", "objectives.itc.log_scale"} <= {*taken}
    assert_holds({name: now[name] for name in taken}, {name: before[name] for name in taken})
    common = [name for name in now if name.startswith("mmbert.fusion.") and name in before and now[name].ndim > 1]
    assert all(not torch.equal(now[name], before[name]) for name in common), "the fusion is new"
    other = build_model(replace(start, pretrained_parts="all", fusion="hybrid"))
    assert other.config.fusion == "hybrid_cross", "by default the fusion is the saved one"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretrained": None}, "pretrained_parts=encoders: model.pretrained, which they are taken from, is missing"),
        ({"pretrained_parts": "fusion"}, "pretrained_parts='fusion': allowed are all, encoders"),
        ({"hidden_size": 64}, "model.hidden_size=64, but model.pretrained='.*' has 32; leave it out"),
    ],
)
def test_parts_that_do_not_fit_are_named(changes: dict, message: str, tmp_path: Path) -> None:
    build_model(options()).save_pretrained(tmp_path)
    start = ModelOptions(pretrained=str(tmp_path), pretrained_parts="encoders", fusion="late", objectives=OBJECTIVES)
    with pytest.raises(UsageError, match=message):
        build_model(replace(start, **changes))


def test_new_fusion_has_the_requested_keys_not_those_of_the_saved_one(tmp_path: Path) -> None:
    build_model(options(fusion="early", fusion_norm="pre", intermediate_size=48)).save_pretrained(tmp_path)
    start = ModelOptions(pretrained=str(tmp_path), pretrained_parts="encoders", fusion="early", objectives=OBJECTIVES)
    default = build_model(start).config
    assert (default.fusion_norm, default.intermediate_size, default.early_pool) == ("post", 4 * 32, "first")
    other = build_model(replace(start, early_pool="last", intermediate_size=64)).config
    assert (other.intermediate_size, other.early_pool, other.hidden_size) == (64, "last", 32)
