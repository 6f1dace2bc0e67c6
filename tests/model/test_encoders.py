"""Text and image encoder: supported ViTs, freezing, rejected inputs."""

from pathlib import Path

import pytest
import timm
import torch
from tiny import difference, inputs, randomize, tiny_batch, tiny_config
from torch import nn

from mmbert.errors import UsageError
from mmbert.model import encoders
from mmbert.model.encoders import ImageEncoder, TextEncoder, create_vit, use_fused_attention
from mmbert.model.modeling import MMBertForPreTraining, MMBertModel

# timm name -> prefix tokens
VITS = {
    "vit_base_patch16_siglip_224": 0,
    "vit_tiny_patch16_224": 1,
    "vit_base_patch16_clip_224": 1,
    "deit_tiny_distilled_patch16_224": 2,
    "vit_small_patch14_reg4_dinov2": 5,
}
every_vit = pytest.mark.parametrize("name", VITS)


def image_encoder(**overrides: object) -> ImageEncoder:
    torch.manual_seed(0)
    return ImageEncoder(tiny_config(**{"image_layers": 2, **overrides}))


def text_encoder(**overrides: object) -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(tiny_config(**{"text_layers": 2, **overrides}))


def trainable(module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if p.requires_grad}


def named(module: nn.Module, *prefixes: str) -> set[str]:
    return {name for name, _ in module.named_parameters() if name.startswith(prefixes)}


@every_vit
def test_any_vit_builds_and_keeps_its_prefix(name: str) -> None:
    encoder = image_encoder(image_model=name).eval()
    images = tiny_batch()["pixel_values"]
    tokens = encoder(images)
    prefix = max(1, VITS[name])  # without any, the mean of the patches stands first
    assert tokens.hidden_states.shape == (4, prefix + 4, 24) == (*tokens.mask.shape, encoder.width)
    assert tokens.mask.dtype == torch.bool and tokens.mask.all()
    assert difference(tokens.hidden_states[:, prefix - VITS[name] :], encoder.vit.forward_features(images)) < 1e-6
    assert difference(encoder(images[:1]).first, tokens.first[:1]) < 1e-5
    assert not any(n.startswith(("head", "attn_pool", "fc_norm")) for n, _ in encoder.vit.named_parameters())


def test_vit_without_class_token_starts_with_the_mean_of_its_patches() -> None:
    tokens = image_encoder(image_model="vit_base_patch16_siglip_224").eval()(tiny_batch()["pixel_values"])
    assert difference(tokens.first, tokens.hidden_states[:, 1:].mean(dim=1)) < 1e-6


@every_vit
def test_any_vit_trains_inside_a_model(name: str) -> None:
    model = MMBertModel(tiny_config(image_model=name, fusion="late"))
    model.encode_and_fuse(**inputs(tiny_batch())).pooled.sum().backward()
    without = {n for n, p in model.image_encoder.vit.named_parameters() if p.grad is None}
    assert without == set()


@pytest.mark.parametrize("name", VITS)
def test_fused_attention_is_set_in_every_block(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "fused_attention_is_faster", lambda device: True)
    encoder = image_encoder(image_model=name).eval()
    images = tiny_batch()["pixel_values"]
    fused = encoder(images).hidden_states
    assert all(block.attn.fused_attn for block in encoder.vit.blocks)
    monkeypatch.setattr(encoders, "fused_attention_is_faster", lambda device: False)
    assert difference(encoder(images).hidden_states, fused) < 1e-5
    assert not any(block.attn.fused_attn for block in encoder.vit.blocks)
    use_fused_attention(encoder.vit, True)
    assert all(block.attn.fused_attn for block in encoder.vit.blocks)


@every_vit
def test_a_fresh_vit_keeps_the_weights_that_timm_drew(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers redraws what it finds in a model; timm knows better how its ViTs start."""
    drawn: dict[str, torch.Tensor] = {}

    def create(*args: object, **kwargs: object) -> nn.Module:
        vit = create_vit(*args, **kwargs)  # type: ignore[arg-type]
        drawn.update({key: value.clone() for key, value in vit.state_dict().items()})
        return vit

    monkeypatch.setattr(encoders, "create_vit", create)
    kept = MMBertForPreTraining(tiny_config(image_model=name)).mmbert.image_encoder.vit.state_dict()
    assert drawn.keys() == kept.keys()
    assert all(torch.equal(drawn[key], kept[key]) for key in kept)


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "eva02_tiny_patch14_224"])
def test_vits_with_computed_buffers_survive_saving(name: str, tmp_path: Path) -> None:
    """Rotary positions are in no file: after loading they must be computed again."""
    torch.manual_seed(0)
    encoder = {"image_model": name, "image_hidden_size": 32, "image_num_attention_heads": 2}
    model = MMBertModel(tiny_config(**encoder)).eval()
    randomize(model)
    model.save_pretrained(tmp_path)
    loaded = MMBertModel.from_pretrained(tmp_path).eval()
    batch = inputs(tiny_batch())
    assert torch.equal(
        loaded.encode_and_fuse(**batch).image.hidden_states, model.encode_and_fuse(**batch).image.hidden_states
    )


def test_encoders_without_layers_give_embeddings() -> None:
    assert image_encoder(image_layers=0)(tiny_batch()["pixel_values"]).hidden_states.shape == (4, 5, 24)
    encoder = text_encoder(text_layers=0).eval()
    ids = tiny_batch()["input_ids"]
    assert difference(encoder(ids).hidden_states, encoder.bert.embeddings(input_ids=ids)) == 0


def test_text_encoder_takes_all_tokens_for_real_without_a_mask() -> None:
    encoder = text_encoder().eval()
    ids = tiny_batch()["input_ids"]
    tokens = encoder(ids)
    assert tokens.mask.all() and tokens.mask.dtype == torch.bool
    assert difference(tokens.hidden_states, encoder(ids, torch.ones_like(ids)).hidden_states) == 0


# --- freezing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [text_encoder, image_encoder])
def test_freeze_none_and_all(make: object) -> None:
    encoder = make()  # type: ignore[operator]
    everything = named(encoder, "")
    assert trainable(encoder) == everything
    encoder.freeze("all")
    assert trainable(encoder) == set()
    encoder.freeze("none")
    assert trainable(encoder) == everything


@pytest.mark.parametrize("layers", [1, 2])
def test_freeze_n_takes_embeddings_and_first_layers_of_text(layers: int) -> None:
    encoder = text_encoder()
    encoder.freeze(layers)
    frozen = named(encoder, "bert.embeddings.", *(f"bert.encoder.layer.{i}." for i in range(layers)))
    assert frozen and trainable(encoder) == named(encoder, "") - frozen


@every_vit
def test_freeze_n_takes_embeddings_and_first_layers_of_image(name: str) -> None:
    encoder = image_encoder(image_model=name)
    encoder.freeze(1)
    assert trainable(encoder) == named(encoder, "vit.blocks.1.", "vit.norm.")


@pytest.mark.parametrize("what", ["all", 1])
def test_frozen_parts_stay_in_evaluation_mode(what: str | int) -> None:
    model = MMBertModel(tiny_config(text_layers=2, image_layers=2, hidden_dropout_prob=0.5))
    model.text_encoder.freeze(what)
    model.image_encoder.freeze(what)
    for mode in (True, False, True):
        model.train(mode)
    frozen = [model.text_encoder.bert.embeddings, model.text_encoder.bert.encoder.layer[0]]
    frozen += [model.image_encoder.vit.patch_embed, model.image_encoder.vit.blocks[0]]
    modules = [m for part in frozen for m in part.modules()]
    assert not any(m.training for m in modules)
    assert model.fusion.training and model.text_encoder.bert.encoder.layer[1].training == (what == 1)
    ids = tiny_batch()["input_ids"]
    seen = [model.text_encoder(ids, layers=(1,)).intermediate[0] for _ in range(2)]
    assert torch.equal(*seen)
    assert torch.equal(*(model.text_encoder(ids).hidden_states for _ in range(2))) == (what == "all")
    model.text_encoder.freeze("none")
    model.train()
    assert all(m.training for m in model.text_encoder.modules())


@pytest.mark.parametrize("what", ["some", 0, -1, 3, None, 1.5])
@pytest.mark.parametrize("make", [text_encoder, image_encoder])
def test_freeze_rejects_other_values(make: object, what: object) -> None:
    encoder = make()  # type: ignore[operator]
    with pytest.raises(UsageError, match=r"freeze=.*allowed are none, all, or a number of layers from 1 to 2"):
        encoder.freeze(what)
    assert trainable(encoder) == named(encoder, "")


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 3, 32, 32), (4, 1, 16, 16), (3, 16, 16), (4, 16, 16, 3)])
def test_image_encoder_rejects_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"pixel_values has shape \(.*this model takes \(B, 3, 16, 16\)"):
        image_encoder()(torch.zeros(shape))


def test_text_encoder_rejects_long_texts() -> None:
    assert text_encoder()(torch.ones(1, 16, dtype=torch.int64)).mask.shape == (1, 16)
    with pytest.raises(UsageError, match="17 tokens, but max_position_embeddings=16; truncate"):
        text_encoder()(torch.ones(1, 17, dtype=torch.int64))


def test_create_vit_rejects_a_size_that_the_patch_does_not_divide() -> None:
    with pytest.raises(UsageError, match=r"image_size=20 is not a multiple of the patch size 8 .*next are 16 and 24"):
        image_encoder(image_size=20)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_tiny_patch16_225", "timm can't build image_model='vit_tiny_patch16_225'"),
        ("resnet18", "image_model='resnet18'"),
    ],
)
def test_create_vit_rejects_what_is_no_vit(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        create_vit(name)


def test_encoder_that_is_thawed_trains_again() -> None:
    encoder = TextEncoder(tiny_config()).train()
    encoder.freeze("all")
    assert not encoder.training
    encoder.freeze("none")
    assert all(module.training for module in encoder.modules())
    assert all(parameter.requires_grad for parameter in encoder.parameters())


def test_stem_with_pooling_equals_timm() -> None:
    """The pooling of a convolutional stem runs in another memory format, which changes no value."""
    name, sizes = (
        "vit_tiny_r_s16_p8_224",
        {"img_size": 64, "patch_size": 4, "embed_dim": 32, "num_heads": 2, "depth": 1},
    )
    torch.manual_seed(0)
    expected = timm.create_model(name, num_classes=0, **sizes).eval()
    torch.manual_seed(0)
    vit = create_vit(name, **sizes).eval()
    images = torch.randn(2, 3, 64, 64)
    assert vit.state_dict().keys() == expected.state_dict().keys()
    pooled = [x.patch_embed.backbone(images) for x in (vit, expected)]
    assert torch.equal(*pooled) and pooled[0].is_contiguous(memory_format=torch.channels_last)
    outputs = [x.forward_features(images) for x in (vit, expected)]
    assert difference(*outputs) < 1e-5
    for output in outputs:
        output.square().sum().backward()
    for (path, parameter), reference in zip(vit.named_parameters(), expected.parameters(), strict=True):
        assert difference(parameter.grad, reference.grad) < 1e-4 * reference.grad.abs().max().clamp(min=1), path


@torch.no_grad()
def test_ngrams_do_not_read_regions_that_are_padding() -> None:
    config = tiny_config(fusion="late", image_features=24, image_layers=0, objectives={"ngrams": 1})
    model = MMBertForPreTraining(config).eval()
    randomize(model)
    batch, regions = tiny_batch(2), torch.randn(2, 3, 24, generator=torch.manual_seed(0))
    batch = {name: batch[name] for name in ("input_ids", "attention_mask", "ngram_ids")}
    batch["image_mask"] = torch.tensor([[1, 1, 0], [1, 1, 1]])
    expected = model(**batch, pixel_values=regions).loss
    regions[0, 2] = 50
    assert torch.equal(model(**batch, pixel_values=regions).loss, expected)
