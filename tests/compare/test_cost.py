"""Cost of models: FLOPs against hand-counted products, equal on both attention paths; counting has no side effects."""

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny import WORDS, randomize, tiny_batch, tiny_config, tiny_processor
from torch import Tensor, nn

from mmbert.compare import cost
from mmbert.compare.cost import (
    cached_batches,
    count_flops,
    count_parameters,
    first_batches,
    flops_per_cached_image,
    flops_per_pair,
    flops_per_step,
    milliseconds_per_pair,
    parameters,
)
from mmbert.data.datamodule import PairsDataModule
from mmbert.data.options import DataOptions
from mmbert.errors import UsageError
from mmbert.model import encoders, layers
from mmbert.model.configuration import MMBertConfig
from mmbert.model.fusion import FUSIONS
from mmbert.model.modeling import MMBertForPreTraining, MMBertForTask

every_fusion = pytest.mark.parametrize("fusion", FUSIONS)

# The sizes of `tiny_batch` and `tiny_config`: 4 texts of 8 tokens, images of a class token and 4 patches.
B, T, P = 4, 8, 5
D, INNER = 32, 48  # text encoder and fusion part
VIT, PATCH = 24, 3 * 8 * 8


def model(fusion: str = "hybrid", **overrides: object) -> MMBertForPreTraining:
    torch.manual_seed(0)
    built = MMBertForPreTraining(tiny_config(fusion=fusion, **overrides))
    randomize(built)
    return built


def set_attention(monkeypatch: pytest.MonkeyPatch, *, fused: bool) -> None:
    for module in (layers, encoders):
        monkeypatch.setattr(module, "fused_attention_is_faster", lambda device: fused)


# --- by hand -------------------------------------------------------------------------------------------------------


def linear(rows: int, width: int, out: int) -> int:
    return 2 * rows * width * out


def attention(length: int, context: int, width: int) -> int:
    """Projections of B queries and contexts, scores, weighted values, output projection."""
    projections = 2 * linear(B * length, width, width) + 2 * linear(B * context, width, width)
    return projections + 2 * 2 * B * length * context * width


def feed_forward(length: int, width: int, inner: int) -> int:
    return 2 * linear(B * length, width, inner)


TEXT = attention(T, T, D) + feed_forward(T, D, INNER)
PATCHES = linear(B * (P - 1), PATCH, VIT)
VIT_LAYER = attention(P, P, VIT) + feed_forward(P, VIT, 4 * VIT)
PROJECTION = linear(B * P, VIT, D)
POOLER = linear(B, D, D)
# One layer, of which the joint vector reads the first position of each stream: a query and a feed-forward block each.
FUSION = {
    "early": attention(1, T + P, D) + feed_forward(1, D, INNER) + POOLER,
    "late": linear(B, 2 * D, 2 * D) + 2 * POOLER,
    "hybrid": sum(attention(1, n, D) + attention(1, m, D) + feed_forward(1, D, INNER) for n, m in ((T, P), (P, T)))
    + 2 * POOLER,
}
ITM_HEAD = linear(B, D, 2)


@pytest.mark.parametrize("fusion", FUSION)
def test_flops_per_pair_are_those_of_its_matrix_products(fusion: str) -> None:
    expected = TEXT + PATCHES + VIT_LAYER + PROJECTION + FUSION[fusion] + ITM_HEAD
    assert flops_per_pair(model(fusion), tiny_batch()) == expected / B


def test_flops_of_a_convolution_are_those_of_a_matrix_product() -> None:
    pixels, patches = torch.zeros(B, 3, 16, 16), nn.Conv2d(3, VIT, kernel_size=8, stride=8)
    assert count_flops(lambda: patches(pixels)) == PATCHES


def step_of_late(**overrides: object) -> dict[str, int]:
    """Forward FLOPs of a step of late fusion with ITM alone, by part: a text and an image once, two fusions."""
    return {
        "text": TEXT * int(overrides.get("text_layers", 1)),
        "patches": PATCHES,
        "image": VIT_LAYER,
        "projection": PROJECTION,
        "fusion": 2 * FUSION["late"],
        "head": 2 * ITM_HEAD,
    }


@pytest.mark.parametrize("part", ["none", "text", "image", "half of text"])
def test_flops_per_step_are_those_of_its_products_without_backward_of_frozen_parts(part: str) -> None:
    """Backward, a product costs two, one per factor; one if its input requires no gradient."""
    options = {"objectives": {"itm": 1.0}, "text_layers": 2}
    built, forward = model("late", **options), step_of_late(**options)
    backward = {name: 2 * flops for name, flops in forward.items()}
    backward["patches"] = forward["patches"]  # pixels need no gradient
    if part == "text":
        built.mmbert.text_encoder.freeze("all")
        backward["text"] = 0
    elif part == "half of text":
        built.mmbert.text_encoder.freeze(1)
        # The second layer's queries, keys and values come from frozen states.
        backward["text"] = 2 * TEXT - 3 * linear(B * T, D, D)
    elif part == "image":
        built.mmbert.image_encoder.freeze("all")
        backward["patches"] = backward["image"] = 0
        backward["projection"] = forward["projection"]
    assert flops_per_step(built, [tiny_batch()]) == sum(forward.values()) + sum(backward.values())


@pytest.mark.parametrize(("depth", "charged"), [("all", 0), (1, 0), (1, 1)])
def test_cached_step_leaves_out_what_the_cache_computes_once(depth: str | int, charged: int) -> None:
    built = model("late", image_layers=1 + charged)
    built.mmbert.image_encoder.freeze(depth)
    batch = tiny_batch()
    uncached, (cached,) = flops_per_step(built, [batch]), cached_batches(built, [dict(batch)])
    once = PATCHES + VIT_LAYER + (depth == "all") * charged * VIT_LAYER
    assert flops_per_cached_image(built) * B == once
    assert uncached - flops_per_step(built, [cached]) == once


def test_flops_of_masked_tokens_include_the_vocabulary() -> None:
    built = model("late", objectives={"mlm": 1.0})
    batch = tiny_batch()
    one = flops_per_step(built, [batch])
    batch["mlm_labels"][:, 2] = 7  # four more
    per_word = linear(1, D, D) + linear(1, D, 40)
    assert flops_per_step(built, [batch]) - one == 4 * 3 * per_word


def test_step_is_a_mean_over_batches() -> None:
    built = model()
    short, long = tiny_batch(length=6), tiny_batch(length=12)
    one, two = flops_per_step(built, [short]), flops_per_step(built, [long])
    assert one < two and flops_per_step(built, iter([short, long])) == (one + two) / 2


def test_flops_of_a_step_leave_out_what_no_objective_reads() -> None:
    """MLM reads the text positions of early fusion, ITM on that pass the first, on the wrong images the first only."""
    built = model("early", objectives={"mlm": 1.0, "itm": {"text": "masked"}})
    over_text = attention(T, T + P, D) + feed_forward(T, D, INNER)
    over_first = attention(1, T + P, D) + feed_forward(1, D, INNER)
    words = linear(B, D, D) + linear(B, D, 40)  # one masked token in each text
    forward = TEXT + PATCHES + VIT_LAYER + PROJECTION + over_text + over_first + 2 * POOLER + 2 * ITM_HEAD + words
    assert flops_per_step(built, [tiny_batch()]) == 3 * forward - PATCHES  # pixels need no gradient


@every_fusion
def test_flops_per_step_are_those_that_the_profiler_counts(fusion: str) -> None:
    """An independent count: torch.profiler's, of the matrix products that ran."""
    built = model(fusion, fusion_layers=2, text_layers=2, image_layers=2)
    batch = tiny_batch()
    with torch.profiler.profile(record_shapes=True, with_flops=True) as profile:
        built(**batch, generator=torch.Generator().manual_seed(0)).loss.backward()
    counted = sum(e.flops for e in profile.key_averages() if e.key in ("aten::mm", "aten::addmm", "aten::bmm"))
    assert counted == pytest.approx(flops_per_step(built, [batch]), rel=0.02)


@every_fusion
def test_flops_do_not_depend_on_the_weights(fusion: str) -> None:
    objectives = {"mlm": 1.0, "itm": {"negatives": "hard"}, "itc": {"embedding_size": 16}}
    built, counted = model(fusion, objectives=objectives), set()
    for seed in range(3):
        randomize(built, seed)
        torch.manual_seed(seed)
        counted.add(flops_per_step(built, [tiny_batch(), tiny_batch(seed=1)]))
    assert len(counted) == 1


# --- both attention paths, precisions, recomputation ---------------------------------------------------------------


def kernels(work: Callable[[], object]) -> set[str]:
    """Fused attention that runs in `work`."""
    with torch.profiler.profile() as profile:
        work()
    return {e.key for e in profile.key_averages() if "scaled_dot_product" in e.key and e.key.count("_for_cpu")}


@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])  # with dropout torch's CPU takes no fused kernel
@every_fusion
def test_both_attention_paths_have_equal_flops(
    fusion: str, dropout: float, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = model(fusion, fusion_layers=2, attention_probs_dropout_prob=dropout)
    counted = []
    for fused in (False, True):
        set_attention(monkeypatch, fused=fused)
        counted.append(
            flops_per_step(built, [tiny_batch()]) if mode == "train" else flops_per_pair(built, tiny_batch())
        )
    assert counted[0] == counted[1] > 0


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("part", ["text", "image", "attend"])
def test_each_part_has_equal_flops_on_both_paths(part: str, gradient: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    built, batch = model(attention_probs_dropout_prob=0.0, text_layers=2, image_layers=2), tiny_batch()
    query, key, value = (torch.randn(B, 4, n, D // 4, requires_grad=True) for n in (T, P, P))
    mask = torch.ones(B, P, dtype=torch.bool)

    def run() -> Tensor:
        if part == "text":
            return built.mmbert.encode_text(batch["input_ids"], batch["attention_mask"]).hidden_states
        if part == "image":
            return built.mmbert.encode_image(batch["pixel_values"]).hidden_states
        return layers.attend(query, key, value, mask)

    def work() -> None:
        with torch.set_grad_enabled(gradient):
            out = run()
        if gradient:
            out.sum().backward()

    counted, ran = [], []
    for fused in (False, True):
        set_attention(monkeypatch, fused=fused)
        counted.append(count_flops(work))
        ran.append(kernels(work))
    assert counted[0] == counted[1] > 0
    assert not ran[0] and len(ran[1]) == 1 + gradient, "the two paths were not what was compared"
    if part == "attend":
        assert counted[0] == (3 if gradient else 1) * 2 * 2 * B * T * P * D


@every_fusion
@pytest.mark.parametrize("fused", [False, True])
def test_bf16_has_the_flops_of_fp32(fusion: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    set_attention(monkeypatch, fused=fused)
    built = model(fusion)
    expected = flops_per_step(built, [tiny_batch()]), flops_per_pair(built, tiny_batch())
    with torch.autocast("cpu", torch.bfloat16):
        assert built(**tiny_batch(), generator=torch.Generator()).objectives["mlm"].loss.isfinite()
        assert (flops_per_step(built, [tiny_batch()]), flops_per_pair(built, tiny_batch())) == expected


@every_fusion
def test_activation_checkpointing_adds_no_flops_and_stays_on(fusion: str) -> None:
    built = model(fusion, text_layers=2, image_layers=2, fusion_layers=2)
    expected = flops_per_step(built, [tiny_batch()])
    built.gradient_checkpointing_enable()

    def trained() -> None:
        built(**tiny_batch(), generator=torch.Generator()).loss.backward()

    recomputed = count_flops(trained)
    assert recomputed > expected
    assert flops_per_step(built, [tiny_batch()]) == expected
    assert count_flops(trained) == recomputed


def test_compiled_model_has_the_flops_of_its_eager_code() -> None:
    built = model()
    expected = flops_per_step(built, [tiny_batch()])
    built._compiled_call_impl = refuse  # what `compile` sets and a call of the module then runs
    assert flops_per_step(built, [tiny_batch()]) == expected


def refuse(*_: object, **__: object) -> None:
    """Fail if it is called."""
    raise AssertionError


def test_formulas_are_local() -> None:
    q = torch.zeros(1, 1, 4, 8)

    def fused() -> object:
        return F.scaled_dot_product_attention(q, q, q)

    assert count_flops(fused) == 2 * 2 * 4 * 4 * 8
    with torch.utils.flop_counter.FlopCounterMode(display=False) as torchs_own:
        fused()
    # Where this fails, torch has a formula of its own by now: ours for the CPU may go if it counts the same.
    assert torchs_own.get_total_flops() == 0


# --- tasks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [0, 1, 2])
def test_task_counts_text_images_and_head(images: int) -> None:
    torch.manual_seed(0)
    built = MMBertForTask(tiny_config(fusion="late", task="vqa", labels=["a", "b", "c"], num_images=images))
    batch = tiny_batch()
    batch["pixel_values"] = batch["pixel_values"].repeat_interleave(images, dim=0)
    batch["label_scores"] = torch.eye(3)[[0, 1, 2, 0]]
    head = linear(B, max(1, images) * D, 2 * D) + linear(B, 2 * D, 3)
    fused = max(1, images) * FUSION["late"]
    assert flops_per_pair(built, batch) * B == TEXT + images * (PATCHES + VIT_LAYER + PROJECTION) + fused + head
    assert flops_per_step(built, [batch]) > 2 * flops_per_pair(built, batch) * B
    assert milliseconds_per_pair(built, batch, repeats=1) > 0


@pytest.mark.parametrize("objectives", [{"mlm": 1.0}, {"itc": {"embedding_size": 8}}])
def test_pair_without_matching_head_ends_at_the_joint_vector(objectives: dict) -> None:
    built = model("late", objectives=objectives)
    assert flops_per_pair(built, tiny_batch()) * B == TEXT + PATCHES + VIT_LAYER + PROJECTION + FUSION["late"]


# --- parameters ----------------------------------------------------------------------------------------------------


def test_parameters_total_and_trained() -> None:
    built = model("late")
    text = sum(p.numel() for p in built.mmbert.text_encoder.parameters())
    total = parameters(built).total
    assert parameters(built) == (total, total)
    built.mmbert.text_encoder.freeze("all")
    assert parameters(built) == (total, total - text)
    tied = nn.ModuleList([nn.Linear(3, 4), nn.Linear(3, 4)])
    tied[1].weight = tied[0].weight
    assert parameters(tied) == (3 * 4 + 4 + 4, 20)


@every_fusion
def test_parameters_are_counted_without_building(fusion: str) -> None:
    config = tiny_config(fusion="late", text_hidden_size=16)
    state = torch.get_rng_state()
    counted = count_parameters(config, fusion, 3, 40)
    assert torch.equal(torch.get_rng_state(), state)
    assert counted == parameters(model(fusion, text_hidden_size=16, fusion_layers=3, intermediate_size=40)).total
    assert (config.fusion, config.fusion_layers, config.intermediate_size) == ("late", 1, 48)


def test_counting_parameters_keeps_the_random_state(monkeypatch: pytest.MonkeyPatch) -> None:
    class Drawing(FUSIONS["late"]):
        def __init__(self, config: MMBertConfig):
            super().__init__(config)
            self.fixed = torch.randn(3, device="cpu")

    monkeypatch.setitem(FUSIONS, "drawing", Drawing)
    state = torch.get_rng_state()
    count_parameters(tiny_config(), "drawing", 1, 48)
    assert torch.equal(torch.get_rng_state(), state)


def test_parameters_of_a_task_and_of_an_unknown_strategy() -> None:
    config = tiny_config(task="vqa", labels=["a", "b", "c"])
    assert (
        count_parameters(config, "early", 1, 48)
        == parameters(MMBertForTask(tiny_config(fusion="early", task="vqa", labels=["a", "b", "c"]))).total
    )
    with pytest.raises(UsageError, match="fusion='erly' is no fusion strategy"):
        count_parameters(config, "erly", 1, 48)


# --- counting leaves no trace --------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", [flops_per_step, flops_per_pair, milliseconds_per_pair])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_counting_has_no_side_effects(what: Callable, gradients: bool, training: bool) -> None:
    built = model(hidden_dropout_prob=0.5).train(training)
    built.mmbert.text_encoder.freeze("all")
    built.objectives["itm"].train(not training)  # one that stands apart
    if gradients:
        built(**tiny_batch(), generator=torch.Generator()).loss.backward()
    batch = tiny_batch()

    def state() -> dict[str, object]:
        return copy.deepcopy({
            "weights": built.state_dict(),
            "gradients": [p.grad for p in built.parameters()],
            "trained": [p.requires_grad for p in built.parameters()],
            "modes": [module.training for module in built.modules()],
            "asked": built.mmbert.text_encoder._requested_training,
            "random": torch.get_rng_state(),
            "batch": batch,
            "grad": torch.is_grad_enabled(),
            "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in built.modules()],
        })  # fmt: skip

    before = state()
    what(built, [batch] if what is flops_per_step else batch)
    after = state()
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=0, msg=name)


def test_counting_does_not_change_the_training() -> None:
    """Three steps with dropout, with and without counting between them: equal to the bit."""
    weights = []
    for counts in (False, True):
        built = model()
        optimizer = torch.optim.AdamW(built.parameters())
        for seed in range(3):
            if counts:
                flops_per_step(built, [tiny_batch(seed=9)])
                milliseconds_per_pair(built, tiny_batch(seed=9), repeats=1)
            built(**tiny_batch(seed=seed)).loss.backward()  # negatives and dropout from torch's own state
            optimizer.step()
            optimizer.zero_grad()
        weights.append(torch.cat([p.detach().flatten() for p in built.parameters()]))
    assert torch.equal(*weights)


def test_flops_are_counted_where_gradients_are_off() -> None:
    built = model()
    expected = flops_per_step(built, [tiny_batch()])
    with torch.no_grad():
        assert flops_per_step(built, [tiny_batch()]) == expected


# --- milliseconds, batches -----------------------------------------------------------------------------------------


def test_milliseconds_are_the_median_without_the_first_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock on which the batches take 50, 4, 100, 2, 8, 3 seconds."""
    ticks = iter(itertools.accumulate(x for seconds in (50, 4, 100, 2, 8, 3) for x in (1, seconds)))
    monkeypatch.setattr(cost.time, "perf_counter", lambda: next(ticks))
    assert milliseconds_per_pair(model(), tiny_batch(4), repeats=5) == 1000 * 4 / 4


def test_milliseconds_are_measured_in_evaluation_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    built, modes = model(), []
    built.mmbert.fusion.register_forward_hook(
        lambda module, *_: modes.append((module.training, torch.is_grad_enabled()))
    )
    milliseconds_per_pair(built, tiny_batch(), repeats=2)
    assert modes == [(False, False)] * 3


@pytest.fixture
def data(tmp_path: Path) -> PairsDataModule:
    """Eleven pairs in batches of three, texts of different lengths, two captions each."""
    rng = np.random.default_rng(0)
    records = []
    for i in range(11):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        captions = [" ".join(rng.choice(WORDS, 1 + i)) for _ in range(2)]
        records += [json.dumps({"image": f"{i}.png", "caption": caption}) for caption in captions]
    (tmp_path / "pairs.jsonl").write_text("\n".join(records))
    options = DataOptions(
        format="jsonl", annotations={"train": str(tmp_path / "pairs.jsonl")}, images=str(tmp_path), batch_size=3,
        num_workers=0, length_pool=2,
    )  # fmt: skip
    return PairsDataModule(options, tiny_processor(), seed=5)


def test_first_batches_are_those_of_training(data: PairsDataModule) -> None:
    loader = data.train_dataloader()
    trained = [data.on_after_batch_transfer(batch, 0) for _ in range(3) for batch in loader]
    state = torch.get_rng_state()
    data.loader_state = {"epoch": 1, "step": 1, "batches_per_epoch": 7}  # of a run that goes on: no matter here
    data.loader_state["batches_per_epoch"] = data.steps_per_epoch()
    first = list(first_batches(data, 8))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(first) == 8 > data.steps_per_epoch()
    for got, expected in zip(first, trained, strict=False):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert len({batch["input_ids"].shape[1] for batch in first}) > 1


def test_first_batches_have_the_flops_of_the_batches_of_a_run(data: PairsDataModule) -> None:
    built = model()
    one_by_one = [flops_per_step(built, [batch]) for batch in first_batches(data, 4)]
    assert flops_per_step(built, first_batches(data, 4)) == pytest.approx(sum(one_by_one) / 4, rel=1e-12)
    assert len(set(one_by_one)) > 1
