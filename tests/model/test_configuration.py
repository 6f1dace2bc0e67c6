"""MMBertConfig: rejected values, derived values, saving."""

import json
from pathlib import Path

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from tiny import tiny_config

from mmbert.errors import UsageError
from mmbert.model.configuration import MMBertConfig
from mmbert.model.modeling import MMBertModel
from mmbert.model.options import KEYS, Architecture


@pytest.mark.parametrize(
    ("key", "meant"),
    [("fusoin", "fusion"), ("text_layer", "text_layers"), ("imagesize", "image_size"), ("objective", "objectives")],
)
def test_config_rejects_unknown_keys_with_a_suggestion(key: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"MMBertConfig has no key '{key}'. Did you mean '{meant}'?"):
        MMBertConfig(**{key: 1})


def test_loading_a_configuration_leaves_unknown_keys_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config()
    config.use_cache, config.tie_word_embeddings, config.text_layer = False, True, 7  # as transformers' Trainer sets
    config.save_pretrained(tmp_path)
    loaded = MMBertConfig.from_pretrained(tmp_path)
    assert loaded.tie_word_embeddings and loaded.text_layers == 1 and not hasattr(loaded, "text_layer")
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == ["text_layer"]


def test_labels_and_id2label_agree() -> None:
    config = tiny_config(task="vqa", labels=["yes", "no"], objectives={})
    assert config.id2label == {0: "yes", 1: "no"} and config.label2id == {"yes": 0, "no": 1}
    assert tiny_config(task="vqa", id2label={"1": "no", "0": "yes"}, objectives={}).labels == ["yes", "no"]
    assert tiny_config(task="vqa", num_labels=3, objectives={}).labels == []  # numbered labels are no names
    assert MMBertConfig.from_dict(config.to_dict()).labels == ["yes", "no"]


@pytest.mark.parametrize(
    "overrides", [{"text_layers": "six"}, {"fusion": 3}, {"hidden_size": 1.5}, {"objectives": ["mlm"]}]
)
def test_config_rejects_wrong_types(overrides: dict) -> None:
    with pytest.raises(StrictDataclassFieldValidationError, match=next(iter(overrides))):
        MMBertConfig(**overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"hidden_size": 20, "num_attention_heads": 3},
            "num_attention_heads=3 does not divide hidden_size=20; allowed are 1, 2, 4, 5, 10, 20",
        ),
        (
            {"text_hidden_size": 20, "text_num_attention_heads": 6},
            "text_num_attention_heads=6 does not divide text_hidden_size=20",
        ),
        (
            {"image_hidden_size": 20, "image_num_attention_heads": 6},
            "image_num_attention_heads=6 does not divide image_hidden_size=20",
        ),
        ({"text_layers": -1}, "text_layers=-1: the number of layers must be 0 or more"),
        ({"hidden_size": 0}, "hidden_size=0: must be 1 or more"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob=1.0: must be a fraction"),
        ({"attention_probs_dropout_prob": -0.1}, "attention_probs_dropout_prob=-0.1: must be a fraction"),
    ],
)
def test_config_rejects_values_that_can_not_be_built(overrides: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        tiny_config(**overrides)


def test_unknown_fusion_is_rejected_with_a_suggestion() -> None:
    with pytest.raises(UsageError, match=r"fusion='lat' is no fusion strategy; allowed are .*Did you mean 'late'\?"):
        MMBertModel(tiny_config(fusion="lat"))


def test_config_fills_what_follows() -> None:
    config = MMBertConfig(hidden_size=96, num_attention_heads=4, fusion_layers=3)
    assert config.intermediate_size == 384
    assert (config.text_hidden_size, config.text_num_attention_heads, config.text_intermediate_size) == (96, 4, 384)
    assert config.num_hidden_layers == 3
    config = MMBertConfig(hidden_size=96, num_attention_heads=4, text_hidden_size=48)
    assert config.text_intermediate_size == 192


def test_config_survives_dicts_and_files(tmp_path: Path) -> None:
    config = tiny_config(
        fusion="late",
        text_hidden_size=16,
        objectives={"itm": {"weight": 0.5, "negatives": "hard"}, "itc": 1.0, "mlm": 0},
    )
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "mmbert"
    for other in (MMBertConfig.from_dict(config.to_dict()), MMBertConfig.from_pretrained(tmp_path)):
        for key in KEYS:
            assert getattr(other, key) == getattr(config, key), key
        assert other.to_diff_dict().keys() >= {"fusion", "objectives"}


def test_config_copies_do_not_share_objectives() -> None:
    first = MMBertConfig()
    first.objectives["mlm"] = 5.0
    assert MMBertConfig().objectives["mlm"] == 1.0


def test_objective_options_include_the_weights() -> None:
    given = {"mlm": 2, "itm": {"negatives": "hard"}, "itc": {"weight": 0.5}}
    config = tiny_config(objectives=given)
    assert config.objective_options() == {
        "mlm": {"weight": 2},
        "itm": {"weight": 1.0, "negatives": "hard"},
        "itc": {"weight": 0.5},
    }
    disabled = tiny_config(objectives={"mlm": 1, "itm": 0, "itc": {"weight": 0.0}})
    assert disabled.objective_options() == {"mlm": {"weight": 1}}
    config.objective_options()["itm"].pop("weight")
    assert config.objectives["itm"] == given["itm"] == {"negatives": "hard"}  # what callers pop is a copy


def test_architecture_holds_no_run_settings() -> None:
    """The same keys serve the command line and the file that goes with a model: no path, no seed, no learning rate."""
    forbidden = ("path", "folder", "seed", "lr", "pretrained", "device")
    assert not [key for key in KEYS if any(word in key.split("_") for word in forbidden)]
    assert set(KEYS) <= set(MMBertConfig().to_dict())
    assert Architecture().fusion == MMBertConfig().fusion
