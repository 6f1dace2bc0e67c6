"""Late interaction of ITC: its arithmetic by hand and by loops over tokens, every fusion, evaluation, refusals."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranking import CAPTIONS, encoded_with, tiny_model
from tiny import difference, tiny_batch, tiny_examples, tiny_processor
from torch import Tensor

from mmbert.compare.cost import cached_batches
from mmbert.errors import UsageError
from mmbert.evaluation.pairs import PairEvaluation
from mmbert.evaluation.retrieval import SCORERS, Candidates
from mmbert.inference.export import export_program
from mmbert.inference.indexing import build_index
from mmbert.inference.loaded import LoadedModel
from mmbert.metrics.retrieval import recall_at_k
from mmbert.model.fusion import FUSIONS
from mmbert.model.modeling import MMBertForPreTraining
from mmbert.model.objectives import late_interaction as module
from mmbert.model.objectives.late_interaction import late_interaction, pair_similarities, similarities
from mmbert.model.options import ModelOptions
from mmbert.training.distillation import find_teacher
from mmbert.training.momentum import MomentumDistillation
from mmbert.training.options import MomentumOptions

TOKENS = {"interaction": "tokens", "embedding_size": 8, "temperature": 0.2}
BOTH = {"itm": {"residual": True, "negatives": "hard"}, "itc": TOKENS}


def directions(*degrees: float) -> Tensor:
    """Unit vectors in the plane; NaN stands for padding."""
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], dim=1).nan_to_num(0.0)


def mean_of_best(queries: Tensor, keys: Tensor) -> Tensor:
    """Oracle for one query and one key, tokens without padding."""
    return torch.stack([torch.stack([q @ k for k in keys]).max() for q in queries]).mean()


def by_pair(texts: list[Tensor], images: list[Tensor], *, of_texts: bool) -> Tensor:
    """Oracle: texts x images."""
    return torch.stack(
        [torch.stack([mean_of_best(t, i) if of_texts else mean_of_best(i, t) for i in images]) for t in texts]
    )


def test_mean_of_the_best_product_by_hand() -> None:
    """Text at 0 and 60 degrees, image at 30, 90 and padding; a text that is opposite to the image scores below 0."""
    pad = math.nan
    texts = torch.stack([directions(0, 60), directions(pad, 240)])
    image = directions(30, 90, pad)[None]
    c30, c60 = math.cos(math.radians(30)), 0.5
    found = late_interaction(texts, image)
    # Token at 0: 30 is nearest. At 60: 30 and 90 are equally near. At 240: 90 is, with the cosine of 150.
    assert found[:, 0].tolist() == pytest.approx([c30, -c30])
    # Image token at 30: 0 and 60 are equally near; at 90: 60 is. Of the other text there is one token.
    other = late_interaction(image, texts)
    assert other[0].tolist() == pytest.approx([c30, (math.cos(math.radians(210)) + math.cos(math.radians(150))) / 2])
    both = similarities(texts, image)[:, 0]
    assert both.tolist() == pytest.approx(((found[:, 0] + other[0]) / 2).tolist())
    assert pair_similarities(texts, image.expand(2, -1, -1)).tolist() == pytest.approx(both.tolist())
    assert c60 < both[0] < 1
    nothing = torch.zeros(1, 2, 2, dtype=torch.float64)
    assert late_interaction(texts, nothing).tolist() == [[0], [0]] and late_interaction(nothing, texts).tolist() == [
        [0, 0]
    ]


def test_blocks_and_padding_change_neither_values_nor_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = ([3, 5, 1, 4], [6, 6, 2])
    rows = [
        [F.normalize(torch.randn(n, 4, generator=generator, dtype=torch.float64), dim=1) for n in x] for x in lengths
    ]
    leaves = [row.requires_grad_() for side in rows for row in side]
    padded = [torch.nn.utils.rnn.pad_sequence(x, batch_first=True) for x in rows]
    factors = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    expected = by_pair(*rows, of_texts=True)
    gradients = torch.autograd.grad((factors * expected).sum(), leaves, retain_graph=True)
    for block in (1, 60, 180, 2**25):  # a pair, a text with 2 images, 2 texts with 3 images, all
        monkeypatch.setattr(module, "BLOCK", block)
        found = late_interaction(*padded)
        assert difference(found, expected) < 1e-12
        own = torch.autograd.grad((factors * found).sum(), leaves, retain_graph=True)
        assert all(difference(one, other) < 1e-12 for one, other in zip(own, gradients, strict=True))
    longer = [F.pad(x, (0, 0, 0, 2)) for x in padded]
    assert difference(late_interaction(*longer), expected) < 1e-12
    vectors = torch.randn(4, 3, generator=generator), torch.randn(5, 3, generator=generator)
    assert torch.equal(similarities(*vectors), vectors[0] @ vectors[1].T), "of one vector each it is the product"


def alone(model: MMBertForPreTraining, batch: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Vectors of all tokens of each text and image, encoded alone, by the projections themselves."""
    itc: Any = model.objectives["itc"]
    texts, images = [], []
    for ids, mask, pixels in zip(batch["input_ids"], batch["attention_mask"], batch["pixel_values"], strict=True):
        states = model.mmbert.encode_text(ids[None, : int(mask.sum())]).hidden_states[0]
        texts.append(F.normalize(itc.text_projection(states), dim=1))
        states = model.mmbert.encode_image(pixels[None]).hidden_states[0]
        images.append(F.normalize(itc.image_projection(states), dim=1))
    return texts, images


@pytest.mark.parametrize("fusion", FUSIONS)
def test_losses_and_scores_are_those_of_loops_over_tokens(fusion: str) -> None:
    """ITC's loss in both directions, what draws hard negatives, ITM's residual, and the outputs of the model."""
    model, batch = tiny_model(fusion, objectives=BOTH), tiny_batch()
    texts, images = alone(model, batch)
    scale, target = 1 / 0.2, torch.arange(4)
    itc: Any = model.objectives["itc"]
    itc.log_scale.data.fill_(math.log(scale))
    of_texts, of_images = (scale * by_pair(texts, images, of_texts=way) for way in (True, False))
    output = model(**batch, generator=torch.Generator().manual_seed(0))
    expected = (F.cross_entropy(of_texts, target) + F.cross_entropy(of_images.T, target)) / 2
    assert difference(output.objectives["itc"].loss, expected) < 1e-5
    encoded = model.encode(batch)
    both = (of_texts + of_images) / 2
    assert encoded.similarities is not None and difference(encoded.similarities, both.detach()) < 1e-5
    assert difference(itc.pair_logits(encoded.text, encoded.image), both.diagonal().detach()) < 1e-5
    itm: Any = model.objectives["itm"]
    logits = itm.head(encoded.fused.pooled)
    assert (
        difference(
            model.match_scores(encoded.text, encoded.image),
            logits[:, 1] - logits[:, 0] + itm.residual_factor * both.diagonal(),
        )
        < 1e-5
    )
    given = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    found = model(**given, return_loss=True)
    assert difference(found.logits_per_text, of_texts) < 1e-5 and difference(found.logits_per_image, of_images.T) < 1e-5
    assert difference(found.loss, expected) < 1e-5


def test_pairs_are_learned_by_their_tokens() -> None:
    torch.manual_seed(0)
    model, batch = tiny_model(objectives={"itc": TOKENS}).train(), tiny_batch(8)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(40):
        losses.append(model(**batch).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(losses[-1].detach()) < 0.3 * float(losses[0].detach())


def test_soft_targets_and_the_encoder_cache_compare_tokens() -> None:
    """Momentum distillation mixes the softmax of the momentum model's tokens, whose images come from the cache."""
    model, batch, alpha, scale = tiny_model(objectives={"itc": TOKENS}), tiny_batch(), 0.4, 1 / 0.2
    model.mmbert.image_encoder.freeze("all")
    itc: Any = model.objectives["itc"]
    itc.log_scale.data.fill_(math.log(scale))
    momentum = MomentumDistillation(model, MomentumOptions(alpha=alpha, decay=0.5))
    momentum.start()
    for name, parameter in model.named_parameters():
        parameter.data += 0.3 * (name == "objectives.itc.text_projection.weight")
    momentum.update()
    (cached,) = cached_batches(model, [dict(batch)])
    assert "pixel_values" not in cached and momentum.model is not None
    loss = model(**cached, soft_targets=momentum.soft_targets(cached, step=0)).loss
    hard = soft = torch.zeros(())
    sides, soft_sides = (
        [scale * by_pair(*alone(x, batch), of_texts=True), scale * by_pair(*alone(x, batch), of_texts=False).T]
        for x in (model, momentum.model)
    )
    for logits, targets in zip(sides, soft_sides, strict=True):
        hard = hard + F.cross_entropy(logits, torch.arange(4)) / 2
        soft = soft + F.cross_entropy(logits, targets.softmax(dim=1)) / 2
    assert difference(loss, (1 - alpha) * hard + alpha * soft) < 1e-5
    assert difference(soft, hard) > 0.01


# --- evaluation ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_retrieval_ranks_by_tokens(tmp_path: Path) -> None:
    """Texts of different length, encoded in batches; the score of a pair is the mean of both directions."""
    model = tiny_model(objectives=BOTH)
    candidates = Candidates.from_examples(tiny_examples(tmp_path, CAPTIONS))
    encoded = encoded_with(model, candidates, batch_size=3)
    found = SCORERS["itc"](model, encoded, 1, 0.0).scores[:, encoded.text_index]
    processor, itc = tiny_processor(), model.objectives["itc"]
    expected = torch.empty_like(found)
    for j, text in enumerate(candidates.texts):
        inputs = processor(text=text, images=candidates.images)
        words = model.mmbert.encode_text(inputs["input_ids"], inputs["attention_mask"])
        of_text = F.normalize(itc.text_projection(words.hidden_states[0]), dim=1)  # pyright: ignore
        patches = model.mmbert.encode_image(inputs["pixel_values"]).hidden_states
        for i, of_image in enumerate(F.normalize(itc.image_projection(patches), dim=2)):  # pyright: ignore
            expected[i, j] = (mean_of_best(of_text, of_image) + mean_of_best(of_image, of_text)) / 2
    assert difference(found, expected) < 1e-5
    chosen = torch.cartesian_prod(torch.arange(len(found)), encoded.text_index)
    assert difference(encoded.pair_similarities(chosen).view(found.shape), expected) < 1e-5
    loaded = LoadedModel(tiny_model(objectives={"itc": TOKENS}), processor)
    matches = loaded.match(candidates.images[0], [*candidates.texts[:3]])
    assert matches.kind == "cosine" and len(matches.scores) == 3


def test_validation_ranks_by_tokens() -> None:
    """In two batches whose texts are padded to different lengths."""
    model = tiny_model(objectives={"itc": TOKENS})
    evaluation = PairEvaluation(model, frozenset(range(6)))
    batches = [tiny_batch(3, seed=0), tiny_batch(3, seed=1, length=6)]
    for number, batch in enumerate(batches):
        for name in ("index", "image_key", "text_key"):
            batch[name] = batch[name] + 3 * number
        batch["image_text_keys"] = batch["text_key"][:, None]
        batch["wrong_pixel_values"] = batch["pixel_values"].flip(0)
        evaluation.step(batch)
    texts, images = ([x for batch in batches for x in alone(model, batch)[side]] for side in (0, 1))
    scores = (by_pair(texts, images, of_texts=True) + by_pair(texts, images, of_texts=False)).T
    found = evaluation.metrics()
    for name, value in recall_at_k(scores, torch.arange(6)).items():
        assert found[name] == pytest.approx(value), name
    assert 0 < found["image_to_text/R@5"] < 1


# --- what needs one vector -----------------------------------------------------------------------------------------


def test_what_needs_one_vector_is_refused(tmp_path: Path) -> None:
    model = tiny_model(objectives={"itc": TOKENS})
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    loaded = LoadedModel(model, tiny_processor())
    tiny_examples(tmp_path, [("a red cat",)])
    why = r"needs one vector of each image and text, but objectives\.itc\.interaction='tokens'"
    for name, use in {
        "embedding": lambda: loaded.embed(texts="a cat"),
        "an image index": lambda: build_index(loaded, tmp_path, tmp_path / "index"),
        "an export": lambda: export_program(folder, tmp_path / "out"),
    }.items():
        with pytest.raises(UsageError, match=f"^{name} {why}"):
            use()
    assert {path.name for path in tmp_path.iterdir()} == {"model", "0.png"}, "nothing is left half-written"
    objectives = {"itc": 1.0, "distill": {"teacher": str(folder)}}
    with pytest.raises(UsageError, match=r"teacher=.* compares the vectors of all tokens .* name another model"):
        find_teacher(ModelOptions(objectives=objectives))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interaction": "words"}, "objectives.itc.interaction='words'; allowed are pooled, tokens"),
        ({"interaction": "tokens", "pool": "mean"}, "compares all tokens, .* pool='mean'; leave one of the two out"),
        ({"interaction": "tokens", "pooler": "text"}, "but pooler='text'; leave one"),
        ({"interaction": "tokens", "init": "closed_form", "refit": True}, "but init='closed_form'; leave one"),
        ({"interaction": "tokens", "refit": True}, "refit solves the closed form again, but init='random'"),
    ],
)
def test_options_that_contradict_are_named(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        tiny_model(objectives={"itc": options})
