"""Bottleneck fusion written out with transformers' BERT layers, and what may pass through the bottleneck."""

import pytest
import torch
from oracles.test_layers import bert_layer
from tiny import difference, random_tokens, randomize, tiny_config
from torch import Tensor

from mmbert.model.fusion.hybrid_bottleneck import HybridBottleneckFusion
from mmbert.model.tokens import Tokens

TEXT, IMAGE = [[1, 1, 1], [1, 1, 0]], [[1, 1, 1, 1], [1, 1, 1, 1]]


class Cut(HybridBottleneckFusion):
    """No bottleneck at all."""

    num_bottlenecks = 0


def built(layers: int, kind: type[HybridBottleneckFusion] = HybridBottleneckFusion) -> HybridBottleneckFusion:
    fusion = kind(tiny_config(fusion_layers=layers)).double().eval()
    randomize(fusion)
    return fusion


def moved(fusion: HybridBottleneckFusion) -> tuple[bool, bool]:
    """Whether another image moves the text, and another text the image."""
    text, image = random_tokens(TEXT, 32), random_tokens(IMAGE, 32, seed=1)
    own = fusion(text, image)
    of_text = fusion(text, random_tokens(IMAGE, 32, seed=2)).text.hidden_states
    of_image = fusion(random_tokens(TEXT, 32, seed=3), image).image.hidden_states
    return not torch.equal(of_text, own.text.hidden_states), not torch.equal(of_image, own.image.hidden_states)


def test_bottleneck_fusion_equals_equations_8_and_9() -> None:
    fusion = built(3)
    text, image = random_tokens(TEXT, 32), random_tokens(IMAGE, 32, seed=1)
    streams = {"text": text.hidden_states, "image": image.hidden_states}
    masks, layers = {"text": text.mask, "image": image.mask}, {"text": fusion.text_layers, "image": fusion.image_layers}
    shared = fusion.bottlenecks.expand(2, 4, 32)
    for i in range(3):
        outputs = []
        for name, states in streams.items():
            real = torch.cat([masks[name], torch.ones(2, 4, dtype=torch.bool)], dim=1)
            hidden = (~real).double()[:, None, None, :] * torch.finfo(torch.float64).min
            out = bert_layer(layers[name][i])(torch.cat([states, shared], dim=1), attention_mask=hidden)
            out: Tensor = out[0] if isinstance(out, tuple) else out
            streams[name] = out[:, :-4]
            outputs.append(out[:, -4:])
        shared = (outputs[0] + outputs[1]) / 2
    got = fusion(text, image)
    assert difference(got.text.hidden_states[text.mask], streams["text"][text.mask]) < 1e-12
    assert difference(got.image.hidden_states, streams["image"]) < 1e-12
    assert difference(got.pooled, fusion.pooler(streams["text"][:, 0], streams["image"][:, 0])) < 1e-12


@pytest.mark.parametrize(("layers", "kind", "expected"), [
    (3, Cut, (False, False)),  # streams meet nowhere else
    (1, HybridBottleneckFusion, (False, False)),  # what the bottleneck received is read by the next layer
    (2, HybridBottleneckFusion, (True, True)),
])  # fmt: skip
def test_streams_meet_in_the_bottleneck_only(
    layers: int, kind: type[HybridBottleneckFusion], expected: tuple[bool, bool]
) -> None:
    assert moved(built(layers, kind)) == expected


def test_second_layer_sees_nothing_but_the_average() -> None:
    """An image that leaves the same bottleneck behind leaves the same text."""
    fusion, outputs = built(2), []
    text = random_tokens(TEXT, 32)
    keep = torch.randn(2, 4, 32, dtype=torch.float64)

    def replace(_: object, arguments: tuple[Tokens], out: Tokens) -> Tokens:
        outputs.append(out.hidden_states[:, -4:])
        return out._replace(hidden_states=torch.cat([out.hidden_states[:, :-4], keep], dim=1))

    fusion.image_layers[0].register_forward_hook(replace)
    one, other = (fusion(text, random_tokens(IMAGE, 32, seed=seed)) for seed in (1, 2))
    assert not torch.allclose(outputs[0], outputs[1])
    assert torch.equal(one.text.hidden_states, other.text.hidden_states)


def test_an_absent_side_has_no_part_in_the_average() -> None:
    """The text's own copy of the bottleneck goes on where there is no image."""
    fusion = built(2)
    text, image = random_tokens(TEXT, 32), random_tokens([[1, 1], [0, 0]], 32, seed=1)
    alone = text.rows(torch.tensor([1]))
    tokens = Tokens(
        torch.cat([alone.hidden_states, fusion.bottlenecks[None]], dim=1),
        torch.cat([alone.mask, torch.ones(1, 4, dtype=torch.bool)], dim=1),
    )
    for layer in fusion.text_layers:
        tokens = layer(tokens)
    got = fusion(text, image).text.hidden_states[1]
    assert difference(got[:2], tokens.hidden_states[0, :2]) < 1e-12
