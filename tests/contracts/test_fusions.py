"""Contract of every entry of `FUSIONS`: shapes, masks, gradients, absent modalities, saving."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
from tiny import difference, inputs, random_tokens, randomize, tiny_batch, tiny_config
from torch import Tensor, nn
from transformers import BertModel

from mmbert.compare.cost import count_flops
from mmbert.errors import UsageError
from mmbert.model.fusion import FUSIONS, build_fusion
from mmbert.model.fusion.base import Fusion
from mmbert.model.modeling import MMBertForPreTraining, MMBertModel
from mmbert.model.tokens import NOT_COMPUTED, READ_ALL, Fused, Reads, Tokens

# Strategies whose tokens never meet, so that their text cannot see the image; a new one is expected to let it.
ONLY_POOLED_VECTORS_MEET = {"late", "late_bilinear"}
# Parameters that a batch with text and image in every row does not train, by design.
UNUSED = ("fusion.absent_text", "fusion.absent_image")
# Without layers early fusion pools [CLS] as it came: nothing trains what prepares the image for the joint sequence;
# and nobody attends to the bottleneck.
UNUSED_WITHOUT_LAYERS = {"hybrid_bottleneck": ("fusion.bottlenecks",)}
LEARNED = ("absent_text", "absent_image", "image_type", "bottlenecks")
"""Vectors that are no weights of a layer."""
TWO_LAYERS = {"text_layers": 2, "image_layers": 2, "fusion_layers": 2}
"""The least at which every strategy does all that it does: bottlenecks carry nothing and bridges are none with one."""
EXACT = 1e-9  # float64; float32 would need a tolerance that hides small leaks

every_fusion = pytest.mark.parametrize("fusion", FUSIONS)


def double_model(fusion: str, **overrides: object) -> MMBertModel:
    """A random model in float64 and evaluation mode."""
    torch.manual_seed(0)
    model = MMBertModel(tiny_config(fusion=fusion, **{**TWO_LAYERS, **overrides})).double().eval()
    randomize(model)
    return model


def encoded(module: Fusion, text: list[list[int]], image: list[list[int]]) -> tuple[Tokens, Tokens]:
    """Random tokens with the given masks, 1 = real token, and the unimodal layers that the strategy reads."""
    config, found = module.config, []
    asked = ((text, module.reads_text_layers, config.text_hidden_size),)
    asked += ((image, module.reads_image_layers, config.image_hidden_size),)
    for seed, (mask, layers, width) in enumerate(asked):
        tokens = random_tokens(mask, config.hidden_size, seed=seed)
        lower = tuple(random_tokens(mask, width, seed=10 * layer + seed).hidden_states for layer in layers)
        found.append(tokens._replace(intermediate=lower))
    return found[0], found[1]


def outputs(fused: Fused) -> dict[str, Tensor]:
    """What a caller can see: states of real tokens, masks, pooled vector."""
    return {
        "text": fused.text.hidden_states * fused.text.mask.unsqueeze(-1),
        "image": fused.image.hidden_states * fused.image.mask.unsqueeze(-1),
        "text_mask": fused.text.mask.double(),
        "image_mask": fused.image.mask.double(),
        "pooled": fused.pooled,
    }


def assert_equal_outputs(a: Fused, b: Fused, tolerance: float = EXACT) -> None:
    """Every visible output agrees."""
    for (name, x), y in zip(outputs(a).items(), outputs(b).values(), strict=True):
        assert difference(x, y) < tolerance, name


def rows(fused: Fused, index: Tensor) -> Fused:
    """Picks samples of an output."""
    return Fused(fused.text.rows(index), fused.image.rows(index), fused.pooled[index])


def grow(tokens: Tokens, by: int, scale: float = 1e3) -> Tokens:
    """Appends `by` padding tokens full of garbage."""
    batch = len(tokens.mask)

    def longer(states: Tensor) -> Tensor:
        garbage = torch.randn(batch, by, states.shape[-1], dtype=states.dtype) * scale
        return torch.cat([states, garbage], dim=1)

    return Tokens(
        longer(tokens.hidden_states),
        torch.cat([tokens.mask, tokens.mask.new_zeros(batch, by)], dim=1),
        tuple(longer(x) for x in tokens.intermediate),
    )


def with_padding(tokens: Tokens, value: float) -> Tokens:
    """Every state of a padding token becomes `value`."""
    real = tokens.mask[..., None]
    lower = tuple(torch.where(real, x, value) for x in tokens.intermediate)
    return Tokens(torch.where(real, tokens.hidden_states, value), tokens.mask, lower)


def test_every_fusion_has_its_yaml() -> None:
    configs = Path(__file__).parents[2] / "configs/fusion"
    assert {path.stem for path in configs.glob("*.yaml")} == set(FUSIONS)
    assert set(FUSIONS) >= ONLY_POOLED_VECTORS_MEET


@every_fusion
@pytest.mark.parametrize("layers", [0, 2])
def test_fusion_keeps_shapes_and_masks(fusion: str, layers: int) -> None:
    module = build_fusion(tiny_config(fusion=fusion, **{**TWO_LAYERS, "fusion_layers": layers})).double()
    text, image = encoded(module, [[1] * 7, [1] * 3 + [0] * 4], [[1] * 4, [1] * 4])
    fused = module(text, image)
    assert fused.text.hidden_states.shape == (2, 7, 32)
    assert fused.image.hidden_states.shape == (2, 4, 32)
    assert fused.pooled.shape == (2, 32)
    assert torch.equal(fused.text.mask, text.mask) and torch.equal(fused.image.mask, image.mask)


@every_fusion
@pytest.mark.parametrize("layers", [0, 1, 2, 3])
def test_every_parameter_gets_a_gradient(fusion: str, layers: int) -> None:
    settings = {**TWO_LAYERS, "fusion_layers": layers, "text_hidden_size": 16}
    if layers < build_fusion(tiny_config(fusion=fusion)).min_layers:
        with pytest.raises(UsageError, match=f"fusion_layers={layers}: the joint vector of fusion='{fusion}'"):
            MMBertForPreTraining(tiny_config(fusion=fusion, **settings))
        return
    model = MMBertForPreTraining(tiny_config(fusion=fusion, **settings)).double()
    randomize(model)
    loss = model(**tiny_batch(dtype=torch.float64), generator=torch.Generator().manual_seed(0)).loss
    loss.backward()
    without = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # A key's bias shifts all scores of a query alike, which softmax does not see: its gradient is rounding noise.
    without = {n for n in without if not n.endswith("key.bias")}
    declared = UNUSED + (UNUSED_WITHOUT_LAYERS.get(fusion, ()) if layers == 0 else ())
    assert without == {n for n, _ in model.named_parameters() if n.endswith(declared)}


@every_fusion
def test_absent_vectors_get_a_gradient_where_a_side_is_absent(fusion: str) -> None:
    model = double_model(fusion)
    batch = inputs(tiny_batch(dtype=torch.float64))
    image_only = model.encode_and_fuse(pixel_values=batch.pop("pixel_values")).pooled.sum()
    (image_only + model.encode_and_fuse(**batch).pooled.sum()).backward()
    declared = [p for n, p in model.named_parameters() if n.endswith(UNUSED)]
    assert declared and all(p.grad is not None and p.grad.any() for p in declared)


@every_fusion
def test_fusion_ignores_text_padding(fusion: str) -> None:
    model = double_model(fusion)
    batch = inputs(tiny_batch(dtype=torch.float64))
    expected = model.encode_and_fuse(**batch)
    padding = batch["attention_mask"] == 0
    garbage = dict(batch, input_ids=torch.where(padding, 17, batch["input_ids"]))
    assert_equal_outputs(model.encode_and_fuse(**garbage), expected)
    longer = dict(
        batch,
        input_ids=torch.cat([batch["input_ids"], torch.full((4, 3), 21)], dim=1),
        attention_mask=torch.cat([batch["attention_mask"], torch.zeros(4, 3, dtype=torch.int64)], dim=1),
    )
    got = model.encode_and_fuse(**longer)
    assert not got.text.mask[:, 8:].any()
    text = Tokens(got.text.hidden_states[:, :8], got.text.mask[:, :8])
    assert_equal_outputs(got._replace(text=text), expected)


@every_fusion
def test_fusion_ignores_padded_states_of_either_side(fusion: str) -> None:
    module = double_model(fusion).fusion
    text, image = encoded(module, [[1, 1, 1], [1, 1, 0]], [[1, 1], [1, 0]])
    expected = module(text, image)
    got = module(grow(text, 2), grow(image, 3))
    short = Fused(
        Tokens(got.text.hidden_states[:, :3], got.text.mask[:, :3]),
        Tokens(got.image.hidden_states[:, :2], got.image.mask[:, :2]),
        got.pooled,
    )
    assert_equal_outputs(short, expected)
    assert_equal_outputs(module(with_padding(text, 1e3), with_padding(image, 1e3)), expected)


@every_fusion
def test_a_sample_alone_equals_the_sample_in_a_batch(fusion: str) -> None:
    model = double_model(fusion)
    batch = inputs(tiny_batch(dtype=torch.float64))
    together = model.encode_and_fuse(**batch)
    for i in range(4):
        length = int(batch["attention_mask"][i].sum())
        alone = model.encode_and_fuse(
            input_ids=batch["input_ids"][i : i + 1, :length],
            attention_mask=batch["attention_mask"][i : i + 1, :length],
            pixel_values=batch["pixel_values"][i : i + 1],
        )
        row = rows(together, torch.tensor([i]))
        text = Tokens(row.text.hidden_states[:, :length], row.text.mask[:, :length])
        assert_equal_outputs(alone, row._replace(text=text))


@every_fusion
def test_batch_order_does_not_matter(fusion: str) -> None:
    model = double_model(fusion)
    batch = inputs(tiny_batch(dtype=torch.float64))
    order = torch.tensor([2, 0, 3, 1])
    assert_equal_outputs(
        model.encode_and_fuse(**{k: v[order] for k, v in batch.items()}), rows(model.encode_and_fuse(**batch), order)
    )


@every_fusion
def test_saving_and_loading_is_bit_exact(fusion: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = MMBertForPreTraining(tiny_config(fusion=fusion, **TWO_LAYERS)).eval()
    randomize(model)
    batch = tiny_batch()
    first = model(**batch, generator=torch.Generator().manual_seed(0)).loss
    model.save_pretrained(tmp_path)
    loaded = MMBertForPreTraining.from_pretrained(tmp_path).eval()
    assert loaded.config.to_dict()["fusion"] == fusion
    own, other = model.state_dict(), loaded.state_dict()
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)
    for _ in range(2):  # twice: buffers that no file holds are computed lazily in some ViTs
        assert torch.equal(loaded(**batch, generator=torch.Generator().manual_seed(0)).loss, first)
    assert torch.equal(
        MMBertModel.from_pretrained(tmp_path).eval()(**inputs(batch)).pooler_output,
        model.mmbert(**inputs(batch)).pooler_output,
    )


@every_fusion
def test_either_modality_may_be_absent(fusion: str) -> None:
    model = double_model(fusion)
    batch = inputs(tiny_batch(dtype=torch.float64))
    text_only = model.encode_and_fuse(batch["input_ids"], batch["attention_mask"])
    assert text_only.text.hidden_states.shape == (4, 8, 32) and text_only.image.hidden_states.shape == (
        4,
        0,
        32,
    )
    image_only = model.encode_and_fuse(pixel_values=batch["pixel_values"])
    assert image_only.text.hidden_states.shape == (4, 0, 32) and image_only.image.hidden_states.shape == (
        4,
        5,
        32,
    )
    for fused in (text_only, image_only, model.encode_and_fuse(**batch)):
        assert fused.pooled.shape == (4, 32) and all(x.isfinite().all() for x in outputs(fused).values())
    with pytest.raises(ValueError, match="neither input_ids nor pixel_values"):
        model.encode_and_fuse()
    with pytest.raises(ValueError, match="4 texts and 3 images"):
        model.encode_and_fuse(**dict(batch, pixel_values=batch["pixel_values"][:3]))


@every_fusion
def test_no_tokens_equals_all_masked_tokens(fusion: str) -> None:
    module = double_model(fusion).fusion
    text, image = encoded(module, [[1, 1, 1], [1, 1, 0]], [[1, 1], [1, 1]])
    none = Tokens.absent(2, 32, like=text.hidden_states)

    def hidden(tokens: Tokens) -> Tokens:
        return tokens._replace(mask=torch.zeros_like(tokens.mask))

    for absent, masked in (
        (module(text, none), module(text, hidden(image))),
        (module(none, image), module(hidden(text), image)),
    ):
        assert difference(absent.pooled, masked.pooled) < EXACT
        for a, b in ((absent.text, masked.text), (absent.image, masked.image)):
            if a.mask.shape[1]:
                real = a.mask[..., None]
                assert difference(a.hidden_states * real, b.hidden_states * real) < EXACT


@every_fusion
@pytest.mark.parametrize("text_rows", ["all", "some", "none"])
@pytest.mark.parametrize("image_rows", ["all", "some", "none"])
def test_fully_masked_rows_stay_finite_and_alone(fusion: str, text_rows: str, image_rows: str) -> None:
    """Rows of one batch may lack a side; each gives what it gives alone, without NaN in outputs or gradients."""
    module = double_model(fusion).fusion
    masks = {"all": [[1, 1], [1, 1], [1, 0]], "some": [[1, 1], [0, 0], [1, 0]], "none": [[0, 0]] * 3}
    text, image = encoded(module, masks[text_rows], masks[image_rows][::-1])
    given = [text.hidden_states, image.hidden_states, *text.intermediate, *image.intermediate]
    for states in given:
        states.requires_grad_()
    fused = module(text, image)
    states = (fused.text.hidden_states, fused.image.hidden_states, fused.pooled)
    assert all(x.isfinite().all() for x in states)
    gradients = torch.autograd.grad(
        sum(x.sin().sum() for x in states),
        [*given, *module.parameters()],
        allow_unused=True,
    )
    assert all(g.isfinite().all() for g in gradients if g is not None)
    for i in range(3):
        one = torch.tensor([i])
        assert_equal_outputs(module(text.rows(one), image.rows(one)), rows(fused, one))


@every_fusion
def test_fully_masked_rows_stay_finite_in_half_precision(fusion: str) -> None:
    """Weights and states in fp16, whose largest number is 65,504: a mask added as -1e9 would be -inf there, and NaN."""
    module = double_model(fusion).fusion
    masks = [[1, 1], [0, 0], [1, 0], [0, 0]], [[1, 1, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0]]
    text, image = encoded(module, *masks)
    expected = module(text, image)
    module = module.half()
    text, image = (
        Tokens(x.hidden_states.half().requires_grad_(), x.mask, tuple(y.half() for y in x.intermediate))
        for x in (text, image)
    )
    found = module(text, image)
    for (name, x), y in zip(outputs(found).items(), outputs(expected).values(), strict=True):
        assert x.isfinite().all() and difference(x.double(), y) < 2e-2, name
    states = (found.text.hidden_states, found.image.hidden_states, found.pooled)
    sum(x.float().sin().sum() for x in states).backward()
    gradients = [p.grad for p in [text.hidden_states, image.hidden_states, *module.parameters()] if p.grad is not None]
    assert len(gradients) >= 10 and all(g.isfinite().all() for g in gradients)


@every_fusion
def test_text_only_without_fusion_layers_is_bert(fusion: str) -> None:
    torch.manual_seed(0)
    model = MMBertModel(tiny_config(fusion=fusion, fusion_layers=0, text_layers=2)).eval()
    randomize(model)
    oracle = BertModel(model.text_encoder.bert.config, add_pooling_layer=False).eval()
    oracle.load_state_dict(model.text_encoder.bert.state_dict())
    batch = tiny_batch()
    got = model.encode_and_fuse(batch["input_ids"], batch["attention_mask"]).text.hidden_states
    expected = oracle(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    real = batch["attention_mask"].bool()
    assert difference(got[real], expected[real]) < 1e-5


@every_fusion
def test_evaluation_is_deterministic_and_training_is_not(fusion: str) -> None:
    model = double_model(fusion)
    batch = inputs(tiny_batch(dtype=torch.float64))
    assert torch.equal(model.encode_and_fuse(**batch).pooled, model.encode_and_fuse(**batch).pooled)
    model.train()
    assert not torch.equal(
        model.encode_and_fuse(**batch).pooled, model.encode_and_fuse(**batch).pooled
    )  # dropout is there


@every_fusion
def test_text_depends_on_the_image_where_the_strategy_fuses_tokens(fusion: str) -> None:
    model = double_model(fusion)
    batch = inputs(tiny_batch(dtype=torch.float64))
    own = model.encode_and_fuse(**batch)
    other = model.encode_and_fuse(**dict(batch, pixel_values=batch["pixel_values"].roll(1, 0)))
    moved = (own.text.hidden_states - other.text.hidden_states).abs().amax(dim=(1, 2))  # (B,)
    if fusion not in ONLY_POOLED_VECTORS_MEET:
        assert moved.min() > 1e-4
    else:
        assert moved.max() == 0
    assert (own.pooled - other.pooled).abs().amax(dim=1).min() > 1e-4


@every_fusion
def test_gradients_equal_finite_differences(fusion: str) -> None:
    widths = {"hidden_size": 6, "image_hidden_size": 4, "num_attention_heads": 2, "intermediate_size": 8}
    module = build_fusion(tiny_config(fusion=fusion, **widths, **TWO_LAYERS)).double().eval()
    randomize(module)
    names = [n for n, _ in module.named_parameters() if n in LEARNED]
    text, image = encoded(module, [[1, 1, 0], [0, 0, 0]], [[0, 0], [1, 1]])
    lower = [*text.intermediate, *image.intermediate]
    learned = [module.get_parameter(n).detach().requires_grad_() for n in names]

    def run(text_states: Tensor, image_states: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        of_text, of_image = others[: len(text.intermediate)], others[len(text.intermediate) : len(lower)]
        arguments = (Tokens(text_states, text.mask, of_text), Tokens(image_states, image.mask, of_image))
        vectors = dict(zip(names, others[len(lower) :], strict=True))
        fused = torch.func.functional_call(module, vectors, arguments)
        return fused.text.hidden_states, fused.image.hidden_states, fused.pooled

    states = [x.requires_grad_() for x in (text.hidden_states, image.hidden_states, *lower)]
    assert torch.autograd.gradcheck(run, (*states, *learned))


@every_fusion
def test_activation_checkpointing_changes_nothing_but_memory(fusion: str) -> None:
    torch.manual_seed(0)
    plain = MMBertForPreTraining(tiny_config(fusion=fusion, **TWO_LAYERS)).train()
    recomputed = copy.deepcopy(plain)
    recomputed.activation_checkpointing_enable()
    batch = tiny_batch()

    def train_step(model: MMBertForPreTraining) -> tuple[Tensor, list[int]]:
        """The loss, and how often the forward of each layer ran."""
        bert, vit = model.mmbert.text_encoder.bert, model.mmbert.image_encoder.vit
        inner = [bert.encoder.layer[0].intermediate, vit.blocks[0].mlp]
        inner += [m.feed_forward for m in model.mmbert.fusion.modules() if hasattr(m, "feed_forward")]
        calls = [0] * len(inner)
        for i, module in enumerate(inner):
            module.register_forward_pre_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
        torch.manual_seed(3)  # dropout
        loss = model(**batch, generator=torch.Generator().manual_seed(0)).loss
        loss.backward()
        return loss.detach(), calls

    loss, calls = train_step(plain)
    recomputed_loss, recomputed_calls = train_step(recomputed)
    assert difference(loss, recomputed_loss) < 1e-6
    # Once more each, but where no gradient arrives: the image stream of the pass over masked text.
    assert all(n < again <= 2 * n for n, again in zip(calls, recomputed_calls, strict=True))
    for (name, p), q in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or difference(p.grad, q.grad) < 1e-6, name
    recomputed.activation_checkpointing_disable()
    assert train_step(recomputed)[1] == calls


READ = [Reads(*chosen) for chosen in itertools.product([False, True], repeat=3)]
MASKS = {
    "padding": ([[1, 1, 1], [1, 1, 0]], [[1, 1], [1, 0]]),
    "rows without a side": ([[0, 0, 0], [1, 1, 0]], [[1, 1], [0, 0]]),
    "no text": ([[], []], [[1, 1], [1, 0]]),
    "no image": ([[1, 1, 1], [1, 1, 0]], [[], []]),
}


def read_states(fused: Fused, reads: Reads) -> list[Tensor]:
    """The outputs that are read, without the states of padding."""
    found = [fused.text, fused.image]
    states = [x.hidden_states * x.mask[..., None] for x, is_read in zip(found, reads, strict=False) if is_read]
    return [*states, *([fused.pooled] if reads.pooled else [])]


@every_fusion
@pytest.mark.parametrize("case", MASKS)
@pytest.mark.parametrize("layers", [0, 1, 2])
def test_outputs_that_are_read_equal_those_of_the_full_computation(fusion: str, case: str, layers: int) -> None:
    """Values and gradients; a parameter has a gradient in both or in neither, and outputs not read are none."""
    module = double_model(fusion, fusion_layers=max(layers, build_fusion(tiny_config(fusion=fusion)).min_layers)).fusion
    text, image = encoded(module, *MASKS[case])
    states = [text.hidden_states, image.hidden_states, *text.intermediate, *image.intermediate]
    given = [*(x.requires_grad_() for x in states), *module.parameters()]
    full = module(text, image)
    for reads in READ:
        fused = module(text, image, reads=reads)
        for name, is_read in reads._asdict().items():
            assert (getattr(fused, name) is not NOT_COMPUTED) == is_read
        got, expected = read_states(fused, reads), read_states(full, reads)
        assert all(difference(x, y) < EXACT for x, y in zip(got, expected, strict=True))
        if not any(reads):
            continue
        found, wanted = (
            torch.autograd.grad(sum(x.sin().sum() for x in out), given, allow_unused=True, retain_graph=True)
            for out in (got, expected)
        )
        for x, y in zip(found, wanted, strict=True):
            assert y is not None or x is None, "a gradient where the full computation has none"
            assert difference(torch.zeros_like(y) if x is None else x, y) < EXACT if y is not None else True


@every_fusion
def test_what_is_not_read_is_not_computed(fusion: str) -> None:
    """FLOPs of the fusion: the joint vector costs less than all outputs, and nothing costs nothing."""
    module = double_model(fusion, fusion_layers=1).fusion
    text, image = encoded(module, [[1] * 9] * 2, [[1] * 9] * 2)
    flops = {reads: count_flops(lambda reads=reads: module(text, image, reads=reads)) for reads in READ}
    everything = flops[READ_ALL]
    if fusion in ONLY_POOLED_VECTORS_MEET:
        assert flops[Reads(text=True, image=True)] == 0 and flops[Reads(pooled=True)] == everything
    else:
        assert flops[Reads(pooled=True)] < flops[Reads(text=True, pooled=True)] <= everything
        assert flops[Reads(text=True, pooled=True)] < everything or fusion == "hybrid_cross"  # its image is the input
        assert flops[Reads(text=True)] < flops[Reads(text=True, pooled=True)]


def test_using_an_output_that_was_not_read_raises() -> None:
    module = double_model("hybrid").fusion
    fused = module(*encoded(module, [[1, 1]], [[1, 1]]), reads=Reads(text=True))
    with pytest.raises(AttributeError, match="no 'dtype': this output was not computed; name it in `reads`"):
        fused.pooled.dtype  # noqa: B018
    assert Reads.union([Reads(text=True), Reads(pooled=True)]) == Reads(text=True, pooled=True)
    assert Reads.union([]) == Reads()


def test_custom_fusion_may_take_no_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FUSIONS, "reads", ReadsLayers)
    model = double_model("reads")
    batch = inputs(tiny_batch(dtype=torch.float64))
    text, image = (
        model.encode_text(batch["input_ids"], batch["attention_mask"]),
        model.encode_image(batch["pixel_values"]),
    )
    fused = model.fuse(text, image, reads=Reads(pooled=True))
    assert torch.equal(fused.pooled, model.encode_and_fuse(**batch).pooled) and fused.text is text


class ReadsLayers(Fusion):
    """A strategy that asks for intermediate layers and hands out what it got."""

    reads_text_layers = (1,)
    reads_image_layers = (1, 2)

    def forward(self, text: Tokens, image: Tokens) -> Fused:
        self.seen = (text, image)
        return Fused(text, image, text.first)


# A ViT with a class token, one with registers, and one without any prefix, which takes another way through timm.
VITS = ("vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_base_patch16_siglip_224")


@pytest.mark.parametrize("image_model", VITS)
def test_strategy_gets_the_unimodal_layers_it_asks_for(image_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FUSIONS, "reads", ReadsLayers)
    model = double_model("reads", text_layers=2, image_layers=2, text_hidden_size=16, image_model=image_model)
    layers = [model.text_encoder.bert.encoder.layer[0], *model.image_encoder.vit.blocks]
    kept: dict[nn.Module, Tensor] = {}
    for layer in layers:
        layer.register_forward_hook(lambda module, _, out: kept.update({module: out}))
    model.encode_and_fuse(**inputs(tiny_batch(dtype=torch.float64)))
    text, image = model.fusion.seen
    assert [x.shape for x in text.intermediate] == [(4, 8, 16)]
    length = image.hidden_states.shape[1]
    assert [x.shape for x in image.intermediate] == [(4, length, 24)] * 2
    assert difference(text.intermediate[0], kept[layers[0]]) < EXACT
    for got, layer in zip(image.intermediate, layers[1:], strict=True):
        expected = kept[layer]
        if model.image_encoder.has_class_token:
            assert difference(got, expected) < EXACT
        else:  # the mean of the patches stands first
            assert difference(got[:, 1:], expected) < EXACT
            assert difference(got[:, 0], expected.mean(dim=1)) < EXACT
    picked = image.rows(torch.tensor([3, 3]))
    assert torch.equal(picked.intermediate[1], image.intermediate[1][[3, 3]])


@every_fusion
def test_strategy_gets_no_layers_but_those_it_asks_for(fusion: str) -> None:
    model = double_model(fusion)
    batch = inputs(tiny_batch(dtype=torch.float64))
    assert len(model.encode_text(batch["input_ids"]).intermediate) == len(model.fusion.reads_text_layers)
    assert len(model.encode_image(batch["pixel_values"]).intermediate) == len(model.fusion.reads_image_layers)
