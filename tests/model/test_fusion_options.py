"""Options of the architecture that fusion strategies share: place of the norms, pooler, epsilons, projections."""

import pytest
import torch
from tiny import difference, inputs, randomize, tiny_batch, tiny_config
from torch import nn

from mmbert.errors import UsageError
from mmbert.model.configuration import MMBertConfig
from mmbert.model.fusion import FUSIONS, joint_size
from mmbert.model.modeling import MMBertForPreTraining, MMBertForTask, MMBertModel
from mmbert.model.tokens import Tokens


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("pooler", ["tanh", "separate", "none"])
def test_every_strategy_trains_with_pre_norm_and_each_pooler(fusion: str, pooler: str) -> None:
    config = tiny_config(fusion=fusion, fusion_norm="pre", fusion_final_norm=True, pooler=pooler, fusion_layers=2)
    model = MMBertForPreTraining(config)
    randomize(model)
    pooled = model.mmbert.encode_and_fuse(**inputs(tiny_batch())).pooled
    assert pooled.shape[1] == joint_size(config)
    model.train()
    loss = model(**tiny_batch(), generator=torch.Generator().manual_seed(0)).loss
    loss.backward()
    unused = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert not {name for name in unused if "norm" in name or "pooler" in name or "head" in name}, unused


@pytest.mark.parametrize("fusion", FUSIONS)
def test_pre_norm_ignores_padding(fusion: str) -> None:
    model = MMBertModel(tiny_config(fusion=fusion, fusion_norm="pre", fusion_final_norm=True, fusion_layers=2)).eval()
    randomize(model)
    batch = inputs(tiny_batch())
    longer = {**batch, "input_ids": nn.functional.pad(batch["input_ids"], (0, 3), value=9)}
    longer["attention_mask"] = nn.functional.pad(batch["attention_mask"], (0, 3))
    assert difference(model.encode_and_fuse(**batch).pooled, model.encode_and_fuse(**longer).pooled) < 1e-5


def test_pre_norm_layer_is_that_of_a_vit() -> None:
    """Written out: x + attention(norm(x)), then x + feed_forward(norm(x)), then the final norm."""
    model = MMBertModel(tiny_config(fusion="early", fusion_norm="pre", fusion_final_norm=True)).double().eval()
    randomize(model)
    layer = model.fusion.layers[0]
    x = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    attention = layer.attention
    theirs = nn.MultiheadAttention(32, 4, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([m.weight for m in (attention.query, attention.key, attention.value)]))
        theirs.in_proj_bias.copy_(torch.cat([m.bias for m in (attention.query, attention.key, attention.value)]))
    theirs.out_proj.load_state_dict(attention.output.state_dict())
    normed = attention.norm(x)
    y = x + theirs(normed, normed, normed)[0]
    forward = layer.feed_forward
    y = layer.final_norm(y + forward.down(nn.functional.gelu(forward.up(forward.norm(y)))))
    assert difference(layer(Tokens(x, torch.ones(2, 5, dtype=torch.bool))).hidden_states, y) < 1e-12


def test_epsilons_reach_their_part_only() -> None:
    config = tiny_config(
        layer_norm_eps=1e-3, text_layer_norm_eps=1e-4, image_layer_norm_eps=1e-5, objectives={}, task="vqa",
        labels=["yes", "no"], task_options={"head_norm_eps": 1e-6},
    )  # fmt: skip
    model = MMBertForTask(config)
    found = {
        (name.removeprefix("mmbert.").split(".")[0], module.eps)
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
    }
    assert found == {("fusion", 1e-3), ("text_encoder", 1e-4), ("image_encoder", 1e-5), ("task", 1e-6)}


def test_projections_of_equal_width_are_built_where_they_are_requested() -> None:
    config = tiny_config(image_hidden_size=32, project_text=True, project_image=True)
    model = MMBertModel(config)
    assert isinstance(model.text_projection, nn.Linear) and isinstance(model.image_projection, nn.Linear)
    plain = MMBertModel(tiny_config(image_hidden_size=32))
    assert isinstance(plain.text_projection, nn.Identity) and isinstance(plain.image_projection, nn.Identity)


@pytest.mark.parametrize("kind", ["gelu", "relu", "linear"])
def test_task_heads(kind: str) -> None:
    config = tiny_config(objectives={}, task="decision", labels=["a", "b"], task_options={"head": kind})
    model = MMBertForTask(config)
    batch = inputs(tiny_batch())
    assert model(**batch, labels=torch.tensor([0, 1, 0, 1])).logits.shape == (4, 2)
    assert len(model.task.head) == {"gelu": 4, "relu": 3, "linear": 1}[kind]


def test_untied_matrix_is_resized_with_the_word_embeddings() -> None:
    model = MMBertForPreTraining(tiny_config(objectives={"mlm": {"weight": 1.0, "tied": False}}))
    before = model.objectives["mlm"].decoder.weight.detach().clone()
    model.resize_token_embeddings(45)
    assert torch.equal(model.objectives["mlm"].decoder.weight[:40], before)
    assert model(**inputs(tiny_batch())).mlm_logits.shape[-1] == 45


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"pooler": "seperate"}, "pooler='seperate'; allowed are tanh, separate, none. Did you mean 'separate'?"),
        ({"fusion_norm": "both"}, "fusion_norm='both'; allowed are post, pre."),
        ({"image_features": 24}, "image_features=24 have no encoder: set image_layers=0."),
        ({"shared_text_layers": True}, "shared_text_layers: needs fusion=hybrid_cross; it is hybrid."),
        (
            {"shared_text_layers": True, "fusion": "hybrid_cross"},
            "shared_text_layers: needs text_layers=0; it is 1.",
        ),
        ({"text_layer_norm_eps": 0.0}, "text_layer_norm_eps=0.0: must be a number above 0."),
        ({"objectives": {"mlm": {"tied": "no"}}}, "objectives.mlm.tied='no'; allowed are true, false."),
        ({"objectives": {"mlm": {"initial_bias": 1}}}, "objectives.mlm.initial_bias=1; allowed are prior, zero."),
    ],
)
def test_bad_values_are_rejected(overrides: dict, message: str) -> None:
    with pytest.raises(UsageError) as error:
        tiny_config(**overrides)
    assert message in str(error.value)


def test_configurations_without_the_new_keys_load() -> None:
    new = {"pooler", "fusion_norm", "fusion_final_norm", "bridge_text_norm", "early_image_norm", "image_features"}
    new |= {"text_tower", "shared_text_layers", "early_class_token", "early_inputs", "text_model_args"}
    saved = tiny_config().to_dict()
    assert new <= saved.keys()
    assert MMBertConfig.from_dict({k: v for k, v in saved.items() if k not in new}).pooler == "tanh"


def test_shared_text_layers_are_trained_by_every_objective() -> None:
    objectives = {"mlm": 1.0, "itm": {"negatives": "hard"}, "itc": {"embedding_size": 16}}
    shared = {"fusion": "hybrid_cross", "shared_text_layers": True, "text_layers": 0, "fusion_layers": 2}
    model = MMBertForPreTraining(tiny_config(**shared, objectives=objectives))
    for only in objectives:
        model.zero_grad()
        model(**tiny_batch(), generator=torch.Generator().manual_seed(0), only=only).loss.backward()
        layer = model.mmbert.fusion.layers[0]  # pyright: ignore
        assert layer.attention.query.weight.grad.abs().sum() > 0  # pyright: ignore
        crossed = layer.cross_attention.query.weight.grad  # pyright: ignore
        assert (only == "itc") == (crossed is None or not crossed.abs().sum())
