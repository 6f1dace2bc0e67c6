"""Contract of every pretraining objective, and the arithmetic of each."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import MASK, difference, randomize, tiny_batch, tiny_config
from torch import Tensor

from mmbert.errors import UsageError
from mmbert.model.fusion import FUSIONS
from mmbert.model.modeling import MMBertForPreTraining
from mmbert.model.objectives import OBJECTIVES, negatives
from mmbert.model.objectives.base import EncodedBatch, SoftTargets
from mmbert.model.objectives.distill import TeacherDistillation
from mmbert.model.objectives.itc import ImageTextContrast
from mmbert.model.objectives.negatives import HardNegatives, same_pair, sample_negatives
from mmbert.model.objectives.pooling import pool_tokens
from mmbert.model.objectives.rtd import between_real, sample_tokens
from mmbert.model.tokens import IGNORE_INDEX, NO_BOX, NO_NGRAM, NO_TEXT, NOT_COMPUTED, NOT_LABELLED, Reads, Tokens

every_objective = pytest.mark.parametrize("objective", OBJECTIVES)


def model_with(objectives: dict, *, seed: int = 0, **overrides: object) -> MMBertForPreTraining:
    """A random model with the given objectives, without dropout."""
    torch.manual_seed(seed)
    model = MMBertForPreTraining(tiny_config(objectives=objectives, **overrides)).eval()
    randomize(model)
    return model


def with_required(objective: str) -> dict[str, float]:
    """An objective and those whose heads it reads."""
    return dict.fromkeys((*OBJECTIVES[objective].requires, objective), 1.0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def distinguishable_pairs() -> dict[str, Tensor]:
    """8 pairs; image and text are unlike all others, and a masked word follows from the words around it."""
    batch = tiny_batch(8, length=6)
    for i in range(8):
        batch["input_ids"][i] = torch.tensor([2, 6 + 4 * i, 7 + 4 * i, 8 + 4 * i, 9 + 4 * i, 3])
    batch["input_ids"].clamp_(max=39)
    batch["attention_mask"][:] = 1
    batch["mlm_labels"][:] = IGNORE_INDEX
    batch["mlm_labels"][:, 2] = batch["input_ids"][:, 2]
    batch["mlm_input_ids"] = batch["input_ids"].clone()
    batch["mlm_input_ids"][:, 2] = MASK
    return batch


def duplicate_batch(seed: int, size: int = 8, images: int = 4, texts: int = 4) -> dict[str, Tensor]:
    """Keys as in a batch where many rows share an image or a caption."""
    generator = seeded(seed)
    captions_of = torch.randint(0, texts, (images, 3), generator=generator)  # of each image
    image = torch.randint(0, images, (size,), generator=generator)
    shown = torch.randint(0, 3, (size,), generator=generator)
    return {
        "image_key": image + 1000,
        "text_key": captions_of[image, shown],
        "image_text_keys": torch.cat([captions_of[image], torch.full((size, 1), NO_TEXT)], dim=1),
    }


@every_objective
def test_loss_is_a_finite_scalar(objective: str) -> None:
    output = model_with(with_required(objective))(**tiny_batch(), generator=seeded()).objectives[objective]
    assert output.loss.shape == () and output.loss.isfinite() and output.loss > 0
    assert output.logits.shape[0] == output.targets.shape[0] > 0
    assert output.targets.dtype == torch.int64 and output.left_out.shape == ()
    assert not output.logits.requires_grad


def memorise(objectives: dict, steps: int, **overrides: object) -> tuple[MMBertForPreTraining, list[float]]:
    """Trains on 8 pairs, each eight times in the batch so that a text meets several wrong images a step."""
    torch.manual_seed(0)
    settings = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.1}
    model = MMBertForPreTraining(tiny_config(objectives=objectives, **settings, **overrides)).train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    batch = {k: v.repeat(8, *[1] * (v.ndim - 1)) for k, v in distinguishable_pairs().items()}
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * min((step + 1) / 20, (steps - step) / (steps - 20))
        loss = model(**batch, generator=seeded(step)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model.eval(), losses


@every_objective
def test_loss_falls_when_pairs_are_memorised(objective: str) -> None:
    steps = 200 if objective == "mim" else 80  # all pixels of 8 images of noise
    _, losses = memorise(with_required(objective), steps)
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


@pytest.mark.parametrize("fusion", FUSIONS)
def test_eight_pairs_are_learned_by_heart(fusion: str) -> None:
    """MLM below 0.05 and all 64 combinations of text and image judged right."""
    model, _ = memorise({"mlm": 1.0, "itm": 1.0}, 200, fusion=fusion)
    with torch.no_grad():
        encoded = model.encode(distinguishable_pairs())
        text, image = torch.arange(8).repeat_interleave(8), torch.arange(8).repeat(8)
        pooled = model.mmbert.fuse(encoded.text.rows(text), encoded.image.rows(image)).pooled
        judged = model.objectives["itm"].logits(pooled).argmax(dim=1)
        assert torch.equal(judged, (text == image).long())
        assert model.objectives["mlm"](encoded).loss < 0.05


# --- weights and options -------------------------------------------------------------------------------------------


def test_loss_is_the_weighted_sum() -> None:
    model = model_with({"mlm": 0.3, "itm": {"weight": 2.0}, "itc": {"weight": 0.7, "embedding_size": 8}})
    output = model(**tiny_batch(), generator=seeded())
    by_hand = sum(w * output.objectives[n].loss for n, w in (("mlm", 0.3), ("itm", 2.0), ("itc", 0.7)))
    assert math.isclose(output.loss.item(), by_hand.item(), rel_tol=1e-6)


def test_weight_zero_leaves_an_objective_out() -> None:
    model = model_with({"mlm": 1.0, "itm": 0, "itc": {"weight": 0.0}})
    assert list(model.objectives) == ["mlm"]
    output = model(**tiny_batch())
    assert list(output.objectives) == ["mlm"] and torch.equal(output.loss, output.objectives["mlm"].loss)


@pytest.mark.parametrize(
    ("objectives", "message"),
    [
        ({"mln": 1.0}, r"'mln' is no objective; allowed are mlm, itm, itc, ngrams, boxes, distill, rtd, mim\. Did you"),
        ({"itm": {"negative": "hard"}}, r"no option 'negative'; .*Did you mean 'negatives'"),
        ({"itm": {"wieght": 2.0}}, r"no option 'wieght'.*Did you mean 'weight'"),
        ({"itm": -1.0}, r"objectives\.itm: weight -1\.0 is not a number of 0 or more"),
        ({"itm": True}, r"objectives\.itm: weight True is not a number"),
        ({"itm": "much"}, r"objectives\.itm: weight 'much' is not a number"),
        ({"itm": float("nan")}, r"objectives\.itm: weight nan"),
        ({"itm": {"negatives": "harder"}}, r"negatives='harder'; allowed are random, hard and a mapping"),
        ({"itm": {"negatives": {"hard": 1.5}}}, r"objectives\.itm\.negatives\.hard=1\.5: a fraction from 0 to 1"),
        ({"itm": {"negatives": {"warmup": True}}}, r"itm\.negatives\.warmup=True: a fraction from 0 to 1"),
        ({"itm": {"negatives": {"warm": 0.5}}}, r"no key 'warm'; allowed are hard, warmup\. Did you mean 'warmup'"),
        ({"itm": {"negatives": {"hard": 0.5}}}, r"negatives=\{'hard': 0\.5\} draws .*: add the objective itc"),
        ({"itm": {"text": "dirty"}}, r"text='dirty'; allowed are clean, masked"),
        (
            {"itm": {"negatives": "hard"}},
            r"negatives='hard' draws negatives by contrastive similarity: add the objective itc",
        ),
        ({"itm": {"negatives": "hard"}, "itc": 0}, r"add the objective itc"),
        ({"itm": {"edited": 1.5}}, r"objectives\.itm\.edited=1\.5: a fraction from 0 to 1"),
        ({"itm": {"edited": 0.5, "text": "masked"}}, r"itm\.edited=0\.5 does not go with text='masked'"),
        ({"ngrams": {"longest": 0}}, r"objectives\.ngrams\.longest=0: must be a whole number of 1 or more"),
        ({"ngrams": {"min_fraction": 1}}, r"objectives\.ngrams\.min_fraction=1: a fraction above 0, below 1"),
        ({"itc": 1.0, "distill": {"temperature": 0}}, r"distill\.temperature=0: must be a number above 0, or null"),
        ({"itc": 1.0, "distill": {"temperature": "low"}}, r"distill\.temperature='low': must be a number above 0"),
        ({"itc": 1.0, "distill": {"teacher": 3}}, r"distill\.teacher=3: must be the folder of a saved mmbert model"),
        ({"mlm": 1.0, "distill": 1.0}, r"distill reads the head of the objective itc: add itc too"),
        ({"itm": 1.0, "rtd": 1.0}, r"rtd reads the head of the objective mlm: add mlm too"),
        ({"mlm": 1.0, "rtd": {"ratio": 0.5}}, r"objectives\.rtd: no option 'ratio'; allowed are weight"),
        ({"mlm": 0}, r"at least one needs a weight above 0"),
        ({}, r"at least one needs a weight above 0"),
    ],
)
def test_objectives_reject_unknown_names_and_values(objectives: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        model_with(objectives)


@pytest.mark.parametrize("lacking", ["text_layers", "image_layers"])
def test_itc_rejects_encoders_without_layers(lacking: str) -> None:
    with pytest.raises(UsageError, match=f"{lacking}=0.*has no contextual output.*disable itc"):
        model_with({"mlm": 1.0, "itc": 1.0}, fusion="early", **{lacking: 0})


@every_objective
def test_output_is_fp32_under_autocast(objective: str) -> None:
    model = model_with(with_required(objective))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        encoded = model.encode(tiny_batch(), generator=seeded())
        assert encoded.image.hidden_states.dtype == torch.bfloat16  # so the claim is not empty
        output = model.objectives[objective](encoded)
    assert output.logits.dtype == output.loss.dtype == torch.float32
    if objective == "itc":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model.objectives["itc"].similarity(encoded).dtype == torch.float32
            unit = model.objectives["itc"].embed_text(encoded.text)
        assert unit.dtype == torch.float32 and difference(unit.norm(dim=1), torch.ones(4)) < 1e-6


# --- edited captions -----------------------------------------------------------------------------------------------


def test_edited_caption_with_its_own_image_is_the_mismatched_pair() -> None:
    """Rows 0 and 2 are edited: their second pair is the edit with the own image, else the text with another image."""
    model = model_with({"itm": {"edited": 0.5}})
    batch = tiny_batch()
    batch["edited_input_ids"] = batch["input_ids"].clone()
    batch["edited_input_ids"][::2, 2] = 7
    batch["is_edited"] = torch.tensor([True, False, True, False])
    encoded = model.encode(batch, generator=seeded())
    output = model.objectives["itm"](encoded)
    wrong, _ = sample_negatives(~same_pair(batch), generator=seeded())
    text = model.mmbert.encode_text(batch["edited_input_ids"], batch["attention_mask"])
    image = encoded.image.rows(torch.tensor([0, int(wrong[1]), 2, int(wrong[3])]))
    expected = model.objectives["itm"].logits(model.mmbert.fuse(text, image).pooled)
    assert difference(output.logits[4:], expected) < 1e-6 and output.targets.tolist() == [1] * 4 + [0] * 4


# --- mlm -----------------------------------------------------------------------------------------------------------


def test_bias_starts_at_the_log_frequencies_of_tokens() -> None:
    """Counts 3, 1, 0 with half added are 3.5, 1.5 and 0.5 of 5.5; the loss is the mean of the four tokens' -log."""
    head = model_with({"mlm": {"weight": 1.0, "initial_bias": "prior"}}).objectives["mlm"]
    counts = torch.zeros(len(head.bias))
    counts[:2] = torch.tensor([3.0, 1.0])
    total = 4 + 0.5 * len(counts)
    loss = head.start_at_prior(counts)
    assert difference(head.bias[:3].exp(), torch.tensor([3.5, 1.5, 0.5]) / total) < 1e-6
    assert abs(loss + (3 * math.log(3.5 / total) + math.log(1.5 / total)) / 4) < 1e-6


# --- boxes ---------------------------------------------------------------------------------------------------------


def test_boxes_loss_is_the_cross_entropy_of_the_classes_at_each_patch() -> None:
    """By hand: 2 x 2 patches after a class token, 2 classes; a box over the left half, and an image without any.

    The third image is not labelled and left out.
    """
    model = model_with({"boxes": 1.0}, box_classes=["cat", "dog"])
    objective = model.objectives["boxes"]
    with torch.no_grad():
        objective.head.weight.copy_(torch.eye(2, 32))
        objective.head.bias.zero_()
    states = torch.zeros(3, 5, 32)
    states[0, 1:, :2] = torch.tensor([[2.0, -1], [-3, 0], [-1, 1], [0, -2]])
    states[:, 0] = 9.0
    boxes = torch.tensor([[[0.0, 0, 0.5, 1], [0, 0, 0, 0]]]).repeat(3, 1, 1)
    classes = torch.tensor([[0, NO_BOX], [NO_BOX, NO_BOX], [NOT_LABELLED, NO_BOX]])
    encoded = EncodedBatch(model.mmbert, {"boxes": boxes, "box_classes": classes})
    encoded.image = Tokens(states, torch.ones(3, 5, dtype=torch.bool))
    output = objective(encoded)

    def softplus(x: float) -> float:
        return math.log1p(math.exp(x))

    # The cat is at patches 0 and 2; its logits are 2, -3, -1, 0, those of the dog -1, 0, 1, -2.
    cat = softplus(-2) + softplus(-3) + softplus(1) + softplus(0)
    dog = softplus(-1) + softplus(0) + softplus(1) + softplus(-2)
    assert output.loss.item() == pytest.approx((cat + dog + 8 * softplus(0)) / 2, rel=1e-6)
    assert output.logits.tolist() == [[0, 2], [0, -1]] and output.targets.tolist() == [1, 1]
    assert output.left_out == 1


def test_boxes_bias_starts_at_the_log_odds_of_the_covered_fraction() -> None:
    head = model_with({"boxes": 1.0}).objectives["boxes"]
    head.start([0.25, 0.5], std=0.02)
    assert head.head.bias.tolist() == pytest.approx([math.log(1 / 3), 0.0])


def test_boxes_without_classes_or_batch_are_an_error() -> None:
    with pytest.raises(UsageError, match="the model has no classes of boxes"):
        model_with({"boxes": 1.0}, box_classes=[])(**tiny_batch())
    batch = {name: value for name, value in tiny_batch().items() if name != "boxes"}
    with pytest.raises(UsageError, match="the batch has no boxes"):
        model_with({"boxes": 1.0})(**batch)


# --- ngrams --------------------------------------------------------------------------------------------------------


def test_ngrams_loss_is_the_cross_entropy_of_the_best_token() -> None:
    """By hand: 2 images of 3 tokens, 2 n-grams; the logits are the largest of each column, (2, -1) and (0, 1)."""
    model = model_with({"ngrams": 1.0}, ngrams=["red", "two"])
    objective = model.objectives["ngrams"]
    with torch.no_grad():
        objective.head.weight.copy_(torch.eye(2, 32))
        objective.head.bias.zero_()
    states = torch.zeros(2, 3, 32)
    states[:, :, :2] = torch.tensor([[[2.0, -3], [1, -1], [0, -2]], [[-1, 1], [0, 0], [-2, -1]]])
    encoded = EncodedBatch(model.mmbert, {"ngram_ids": torch.tensor([[0, 1], [1, NO_NGRAM]])})
    encoded.image = Tokens(states, torch.ones(2, 3, dtype=torch.bool))
    output = objective(encoded)

    def softplus(x: float) -> float:
        return math.log1p(math.exp(x))

    total = softplus(-2) + softplus(1) + softplus(0) + softplus(-1)  # present: -z, absent: z
    assert float(output.loss.detach()) == pytest.approx(total / 3, rel=1e-6)  # three n-grams are present
    assert output.logits[:, 1].tolist() == [2, -1, 1] and output.targets.tolist() == [1, 1, 1]
    assert int(output.left_out) == 0


def test_ngrams_of_images_without_any_count_as_absent() -> None:
    model = model_with({"ngrams": 1.0})
    batch = tiny_batch() | {"ngram_ids": torch.full((4, 1), NO_NGRAM)}
    output = model(**batch).objectives["ngrams"]
    assert output.loss > 0 and int(output.left_out) == 4 and len(output.targets) == 0


def test_ngrams_head_starts_at_the_frequencies() -> None:
    """Log-odds of 0.5 are 0 and of 0.2 ln(1/4); both less 1."""
    model = model_with({"ngrams": 1.0}, ngrams=[])
    with pytest.raises(UsageError, match=r"objectives.ngrams: the model has no n-grams"):
        model(**tiny_batch())
    model.objectives["ngrams"].start([0.5, 0.2, 0.0], std=0.02)
    bias = model.objectives["ngrams"].head.bias
    assert bias.tolist() == pytest.approx([-1.0, math.log(0.25) - 1, math.log(1e-4 / (1 - 1e-4)) - 1], rel=1e-5)
    assert model.objectives["ngrams"].head.weight.std() < 0.03


def test_ngrams_train_the_image_encoder_only() -> None:
    model = model_with({"mlm": 1.0, "itm": 1.0, "ngrams": 1.0})
    output = model(**tiny_batch(), only="ngrams")
    assert [*output.objectives] == ["ngrams"]
    output.loss.backward()
    touched = {name.split(".")[1] for name, p in model.named_parameters() if p.grad is not None}
    assert touched == {"image_encoder", "image_projection", "ngrams"}


# --- replaced tokens -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", FUSIONS)
def test_rtd_is_the_cross_entropy_of_sampled_texts(fusion: str) -> None:
    """Oracle: one token at a time, drawn by walking along the distribution, one row at a time through the model."""
    model, batch = model_with(with_required("rtd"), fusion=fusion), tiny_batch()
    batch["mlm_labels"][2, 2] = batch["input_ids"][2, 2]
    output = model(**batch, generator=seeded(3)).objectives["rtd"]
    uniform = torch.rand(4, 8, generator=seeded(3), dtype=torch.float64)
    rtd: Any = model.objectives["rtd"]
    with torch.no_grad():
        logits = model(batch["mlm_input_ids"], batch["attention_mask"], pixel_values=batch["pixel_values"]).mlm_logits
        expected, targets = [], []
        for row in range(4):
            length = int(batch["attention_mask"][row].sum())
            ids = batch["input_ids"][row : row + 1, :length].clone()
            for i in range(length):
                if batch["mlm_labels"][row, i] != IGNORE_INDEX:
                    rest = float(uniform[row, i])
                    for token, share in enumerate(logits[row, i].softmax(dim=0).tolist()):
                        rest -= share
                        if rest < 0:
                            ids[0, i] = token
                            break
            kept = (ids[0] == batch["input_ids"][row, :length])[1:-1]
            image = model.mmbert.encode_image(batch["pixel_values"][row : row + 1])
            states = model.mmbert.fuse(model.mmbert.encode_text(ids), image).text.hidden_states[0, 1:-1]
            expected += F.softplus(torch.where(kept, -1, 1) * rtd.head(states)[:, 0]).tolist()
            targets += kept.long().tolist()
    assert output.targets.tolist() == targets and 0 < sum(targets) < len(targets) - 2
    assert float(output.loss.detach()) == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert output.left_out == 0


def test_rtd_counts_a_sample_equal_to_the_original_as_original() -> None:
    """And all tokens are original where none is masked, be there no other tokens than [CLS] and [SEP] in a row."""
    model, batch = model_with(with_required("rtd")), tiny_batch()
    mlm: Any = model.objectives["mlm"]
    mlm.logits = lambda states, embeddings: F.one_hot(batch["input_ids"][:, 1], 40) * 1e4
    assert model(**batch, generator=seeded()).objectives["rtd"].targets.min() == 1
    batch["mlm_labels"][:] = IGNORE_INDEX
    batch["attention_mask"][3, 2:] = 0
    mlm.logits = lambda states, embeddings: torch.zeros(0, 40)
    output = model(**batch, generator=seeded()).objectives["rtd"]
    assert output.targets.tolist() == [1] * (6 + 5 + 4) and output.left_out == 1


def test_sampled_tokens_follow_the_distribution() -> None:
    """Inverse distribution function of 0, 0.2, 0.5, 0.3 by hand, bounds included; more rows than one block."""
    logits = torch.tensor([0.0, 0.2, 0.5, 0.3], dtype=torch.float64).log()
    uniform = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71, 1 - 2**-53], dtype=torch.float64)
    assert sample_tokens(logits.expand(6, 4), uniform).tolist() == [1, 1, 2, 2, 3, 3]
    drawn = sample_tokens(logits.expand(3000, 4), torch.rand(3000, generator=seeded(), dtype=torch.float64))
    assert all(abs(n - 3000 * p) < 140 for n, p in zip(drawn.bincount(), (0, 0.2, 0.5, 0.3), strict=True))


def test_first_and_last_token_are_found_on_either_side_of_padding() -> None:
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [0, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()
    expected = [[0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert between_real(mask).int().tolist() == expected


def test_rtd_trains_no_head_of_mlm() -> None:
    """Nor the encoding of the masked text: no gradient flows through the samples."""
    model = model_with(with_required("rtd"))
    model(**tiny_batch(), generator=seeded(), only="rtd").loss.backward()
    assert all(p.grad is None for p in model.objectives["mlm"].parameters())
    assert not model.mmbert.word_embeddings.grad[MASK].any() and model.mmbert.word_embeddings.grad.any()


# --- negatives -----------------------------------------------------------------------------------------------------


def test_negatives_never_share_image_or_caption() -> None:
    left_out = 0
    for seed in range(200):
        batch = duplicate_batch(seed)
        wrong, valid = sample_negatives(~same_pair(batch), generator=seeded(seed))
        captions = [set(row.tolist()) for row in batch["image_text_keys"]]
        for i in range(8):
            # Independent rule: a negative is another image that has no caption equal to this text.
            choices = [
                j
                for j in range(8)
                if batch["image_key"][i] != batch["image_key"][j] and batch["text_key"][i].item() not in captions[j]
            ]
            assert valid[i] == bool(choices)
            assert not choices or wrong[i] in choices
            left_out += not choices
    assert 0 < left_out < 800  # both cases were met


def test_padding_of_caption_lists_is_no_caption() -> None:
    batch = {
        "image_key": torch.tensor([1, 2]),
        "text_key": torch.tensor([5, 6]),
        "image_text_keys": torch.tensor([[5, NO_TEXT], [6, NO_TEXT]]),
    }
    assert same_pair(batch).tolist() == [[True, False], [False, True]]


def test_rows_of_the_same_image_are_never_negatives_of_each_other() -> None:
    """Even where a loader lists only the caption that a row shows."""
    batch = {
        "image_key": torch.tensor([1, 1, 2]),
        "text_key": torch.tensor([5, 6, 7]),
        "image_text_keys": torch.tensor([[5], [6], [7]]),
    }
    assert same_pair(batch).tolist() == [[True, True, False], [True, True, False], [False, False, True]]


def test_itm_leaves_out_rows_without_a_negative() -> None:
    model = model_with({"itm": 1.0})
    batch = tiny_batch()
    batch["text_key"][:] = 7
    batch["image_text_keys"][:, 0] = 7
    output = model(**batch, generator=seeded()).objectives["itm"]
    assert output.loss == 0 and output.left_out == 4 and output.logits.shape == (0, 2)
    output.loss.backward() if output.loss.requires_grad else None
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_itm_counts_only_rows_that_take_part() -> None:
    """Row 0 describes every image: the loss is the mean over the other rows, each right and wrong."""
    model = model_with({"itm": 1.0})
    batch = tiny_batch()
    batch["image_text_keys"][:, 1] = batch["text_key"][0]
    encoded = model.encode(batch, generator=seeded(3))
    output = model.objectives["itm"](encoded)
    assert output.left_out == 1 and output.targets.tolist() == [1, 1, 1, 0, 0, 0]
    wrong, _ = sample_negatives(~same_pair(batch), generator=seeded(3))
    with torch.no_grad():
        logits = []
        for i, j in [(i, i) for i in (1, 2, 3)] + [(i, int(wrong[i])) for i in (1, 2, 3)]:
            pair = (encoded.text.rows(torch.tensor([i])), encoded.image.rows(torch.tensor([j])))
            logits.append(model.objectives["itm"].logits(model.mmbert.fuse(*pair).pooled))
    expected = F.cross_entropy(torch.cat(logits), output.targets)
    assert difference(output.loss.detach(), expected) < 1e-6


@pytest.mark.parametrize("masked", [False, True])
def test_itm_reads_the_text_that_its_option_names(masked: bool) -> None:
    model = model_with({"itm": {"text": "masked" if masked else "clean"}})
    batch = tiny_batch()
    loss = model(**batch, generator=seeded()).loss
    other = dict(batch, mlm_input_ids=torch.where(batch["mlm_input_ids"] == MASK, 9, batch["mlm_input_ids"]))
    assert (model(**other, generator=seeded()).loss != loss) == masked


def test_random_negatives_are_uniform_over_valid_ones() -> None:
    allowed = torch.tensor([[False, True, True, True]] + [[True, False, False, False]] * 3)
    counts = Counter(int(sample_negatives(allowed, generator=seeded(s))[0][0]) for s in range(3000))
    assert set(counts) == {1, 2, 3}
    assert all(abs(n - 1000) < 130 for n in counts.values())  # 5 standard deviations


def test_hard_negatives_follow_the_softmax_of_similarity() -> None:
    allowed = torch.tensor([[False, True, True, True]]).expand(4, 4)
    logits = torch.tensor([9.0, math.log(1), math.log(3), math.log(6)]).expand(4, 4)
    draws = [sample_negatives(allowed, generator=seeded(s), similarities=logits)[0][0] for s in range(3000)]
    counts = Counter(int(d) for d in draws)
    assert set(counts) == {1, 2, 3}  # the likeliest is not allowed
    for column, expected in ((1, 300), (2, 900), (3, 1800)):
        assert abs(counts[column] - expected) < 140


def test_hard_negatives_use_the_contrastive_similarity() -> None:
    """At the highest temperature scale the most similar valid image is drawn nearly always."""
    model = model_with({"itm": {"negatives": "hard"}, "itc": {"weight": 1.0, "embedding_size": 16}})
    model.objectives["itc"].log_scale.data.fill_(math.log(100.0))
    encoded = model.encode(tiny_batch(), generator=seeded())
    assert encoded.similarities is not None and not encoded.similarities.requires_grad
    seen: list[Tensor] = []
    fuse = model.mmbert.fuse
    model.mmbert.fuse = lambda text, image, **reads: seen.append(image.hidden_states) or fuse(text, image, **reads)  # type: ignore
    model.objectives["itm"](encoded)
    likeliest = encoded.similarities.masked_fill(torch.eye(4, dtype=torch.bool), -torch.inf).topk(2, dim=1)
    clear = likeliest.values[:, 0] - likeliest.values[:, 1] > 15  # else chance has a say
    assert clear.any()
    drawn = encoded.image.hidden_states[likeliest.indices[:, 0]]
    assert torch.equal(seen[-1][clear], drawn[clear])


def test_fraction_of_hard_negatives_rises_linearly() -> None:
    """To 0.5 within the first fifth of training: 0, 0.125 after 5 %, 0.25 after 10 %, then 0.5."""
    ramp = HardNegatives.parse({"hard": 0.5, "warmup": 0.2})
    found = [float(ramp.fraction(torch.tensor(p))) for p in (0.0, 0.05, 0.1, 0.2, 0.9)]
    assert found == pytest.approx([0, 0.125, 0.25, 0.5, 0.5])
    assert ramp.fraction(None) == 0.5 and HardNegatives.parse({}).fraction(torch.tensor(0.0)) == 1.0


@pytest.mark.parametrize("hard", [0.0, 0.3, 1.0])
def test_fraction_of_the_rows_draws_hard_negatives(hard: float) -> None:
    """Row i is most similar to column i + 1, which a uniform draw takes in a third of the cases."""
    similarities, likeliest = 1e3 * torch.eye(4).roll(1, dims=1), torch.tensor([1, 2, 3, 0])
    allowed, count = ~torch.eye(4, dtype=torch.bool), 0
    for seed in range(500):
        wrong, _ = sample_negatives(allowed, generator=seeded(seed), similarities=similarities, hard=hard)
        count += int((wrong == likeliest).sum())
    assert abs(count / 2000 - (hard + (1 - hard) / 3)) < 5 * math.sqrt(0.25 / 2000)


def test_hard_negatives_of_all_rows_are_those_of_the_plain_option() -> None:
    """And of no row, at the start of the warm-up, those of random ones."""
    outputs = {}
    for name, negatives_, progress in (
        ("hard", "hard", None),
        ("random", "random", None),
        ("all", {"hard": 1.0, "warmup": 0.0}, 0.0),
        ("at the end", {"hard": 1.0, "warmup": 0.5}, None),
        ("at the start", {"hard": 1.0, "warmup": 0.5}, 0.0),
    ):
        model = model_with({"itm": {"negatives": negatives_}, "itc": {"embedding_size": 16}})
        model.objectives["itc"].log_scale.data.fill_(math.log(100.0))
        at = None if progress is None else torch.tensor(progress)
        outputs[name] = model(**tiny_batch(8), generator=seeded(), progress=at).objectives["itm"].logits
    assert torch.equal(outputs["all"], outputs["hard"]) and torch.equal(outputs["at the end"], outputs["hard"])
    assert torch.equal(outputs["at the start"], outputs["random"])
    assert not torch.equal(outputs["hard"], outputs["random"])


def test_hard_rows_never_draw_an_equal_caption() -> None:
    for seed in range(50):
        positive = same_pair(duplicate_batch(seed))
        wrong, valid = sample_negatives(~positive, generator=seeded(seed), similarities=100.0 * positive, hard=0.5)
        assert not positive[torch.arange(8), wrong][valid].any()


@pytest.mark.parametrize("hard", [None, 0.5])
def test_negatives_do_not_depend_on_how_rows_are_spread(hard: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = duplicate_batch(1, images=6, texts=9)
    similarities = torch.randn(8, 8, generator=seeded(5))
    allowed = ~same_pair(batch)
    options: dict[str, Any] = {} if hard is None else {"hard": hard}
    wrong, valid = sample_negatives(allowed, generator=seeded(7), similarities=similarities, **options)
    monkeypatch.setattr(negatives, "all_gather", lambda x: batch_of[id(x)])
    monkeypatch.setattr(negatives, "all_gather_ragged", lambda x, pad: batch_of[id(x)])
    for number, rows in enumerate((slice(0, 4), slice(4, 8))):
        monkeypatch.setattr(negatives, "rank", lambda number=number: number)
        share = {name: value[rows] for name, value in batch.items()}
        batch_of = {id(share[name]): batch[name] for name in batch}
        own = ~same_pair(share)
        assert torch.equal(own, allowed[rows])
        got = sample_negatives(own, generator=seeded(7), similarities=similarities[rows], **options)
        assert torch.equal(got[0], wrong[rows]) and torch.equal(got[1], valid[rows])


def test_negatives_depend_on_the_generator_only() -> None:
    allowed = ~torch.eye(16, dtype=torch.bool)
    torch.manual_seed(0)
    first = sample_negatives(allowed, generator=seeded(1))[0]
    torch.manual_seed(1)
    assert torch.equal(sample_negatives(allowed, generator=seeded(1))[0], first)
    assert not torch.equal(sample_negatives(allowed, generator=seeded(2))[0], first)


# --- ITC -----------------------------------------------------------------------------------------------------------


class Vectors(EncodedBatch):
    """An encoded batch whose towers say what the test wants: one token each."""

    def __init__(self, text: Tensor, image: Tensor, batch: dict[str, Tensor], soft_targets: SoftTargets | None = None):
        self.batch, self.soft_targets = batch, soft_targets
        ones = torch.ones(len(text), 1, dtype=torch.bool)
        self.__dict__.update(text=Tokens(text[:, None], ones), image=Tokens(image[:, None], ones))


def plain_itc(scale: float) -> ImageTextContrast:
    """ITC whose projections change nothing, at a given scale."""
    config = tiny_config(hidden_size=2, num_attention_heads=1)
    itc = ImageTextContrast(config, embedding_size=2, temperature=1 / scale).double()
    for projection in (itc.text_projection, itc.image_projection):
        projection.weight.data = torch.eye(2, dtype=torch.float64)
        projection.bias.data.zero_()
    return itc


def unit(*degrees: float) -> Tensor:
    """Unit vectors in the plane, scaled by 3: their length must not matter."""
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return 3 * torch.stack([angle.cos(), angle.sin()], dim=1)


def test_itc_spreads_the_target_over_equal_captions() -> None:
    """Rows 0 and 1 have the same caption. At scale 2 and these angles all logits are 2, 1, 0 or -1, -2."""
    text, image = unit(0, 0, 90), unit(0, 60, 180)
    batch = {
        "image_key": torch.tensor([1, 2, 3]),
        "text_key": torch.tensor([5, 5, 6]),
        "image_text_keys": torch.tensor([[5], [5], [6]]),
    }
    output = plain_itc(2.0)(Vectors(text, image, batch))
    e, s = math.exp, 2 * math.sin(math.radians(60))
    # text 0 and 1: logits (2, 1, -2), half of the target on each of the first two; text 2: logits (0, s, 0).
    text_0 = -((2 + 1) / 2 - math.log(e(2) + e(1) + e(-2)))
    text_2 = -(0 - math.log(1 + e(s) + 1))
    # image 0: logits (2, 2, 0); image 1: (1, 1, s); image 2: (-2, -2, 0).
    image_0 = -(2 - math.log(2 * e(2) + 1))
    image_1 = -(1 - math.log(2 * e(1) + e(s)))
    image_2 = -(0 - math.log(2 * e(-2) + 1))
    expected = (2 * text_0 + text_2 + image_0 + image_1 + image_2) / 2 / 3
    assert math.isclose(output.loss.item(), expected, rel_tol=1e-9)


def test_itc_target_is_symmetric_where_the_relation_is_not() -> None:
    """Text 0 is also a caption of image 1, text 1 is none of image 0: still 0 and 1 belong together both ways."""
    batch = {
        "image_key": torch.tensor([1, 2]),
        "text_key": torch.tensor([5, 6]),
        "image_text_keys": torch.tensor([[5, 8], [6, 5]]),
    }
    output = plain_itc(2.0)(Vectors(unit(0, 60), unit(0, 90), batch))
    logits = torch.tensor([[2.0, 0.0], [1.0, 2 * math.cos(math.radians(30))]], dtype=torch.float64)
    half = torch.full((2, 2), 0.5, dtype=torch.float64)
    expected = (F.cross_entropy(logits, half) + F.cross_entropy(logits.T, half)) / 2
    assert math.isclose(output.loss.item(), expected.item(), rel_tol=1e-9)


def test_itc_mixes_the_similarities_of_a_momentum_model_with_the_labels() -> None:
    """At scale 2: logits of the trained model (2, 1) and (1, 2), of the momentum model (2, 0) and (0, 2) by texts."""
    batch = {
        "image_key": torch.tensor([1, 2]),
        "text_key": torch.tensor([5, 6]),
        "image_text_keys": torch.tensor([[5], [6]]),
    }
    # The other direction differs: image 1 of the momentum model is at 180 degrees, so its logits are (-2, 0).
    soft = SoftTargets(torch.tensor(0.25), {"itc": (unit(0, 90) / 3, unit(0, 180) / 3)})
    output = plain_itc(2.0)(Vectors(unit(0, 60), unit(0, 60), batch, soft))
    e = math.exp
    right, wrong = -math.log(e(2) / (e(2) + e(1))), -math.log(e(1) / (e(2) + e(1)))
    # Probability of the true pair by the momentum model: text 0 has logits (2, -2), text 1 (0, 0); image 0 (2, 0),
    # image 1 (-2, 0).
    probabilities = (e(2) / (e(2) + e(-2)), 0.5, e(2) / (e(2) + 1), 1 / (e(-2) + 1))
    expected = 0.75 * right + 0.25 * sum(p * right + (1 - p) * wrong for p in probabilities) / 4
    assert math.isclose(output.loss.item(), expected, rel_tol=1e-7)  # the scale is fp32


def test_itc_without_duplicates_is_symmetric_cross_entropy() -> None:
    model = model_with({"itc": {"weight": 1.0, "embedding_size": 16, "temperature": 0.1}})
    encoded = model.encode(tiny_batch())
    output = model.objectives["itc"](encoded)
    itc = model.objectives["itc"]
    text, image = (
        F.normalize(x, dim=-1)
        for x in (
            itc.text_projection(encoded.text.hidden_states[:, 0]),
            itc.image_projection(encoded.image.hidden_states[:, 0]),
        )
    )
    logits = text @ image.T * itc.log_scale.exp()
    target = torch.arange(4)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    assert difference(output.loss, expected) < 1e-6
    assert difference(output.logits, logits) < 1e-5 and torch.equal(output.targets, target)


@pytest.mark.parametrize(("start", "bound"), [(9.0, 100.0), (-9.0, 2.0)])
def test_itc_temperature_returns_from_beyond_its_bounds(start: float, bound: float) -> None:
    """CLIP clamps the parameter after the step; clamped in the loss, its gradient beyond a bound would be zero."""
    itc = plain_itc(10.0)
    assert math.isclose(itc.scale.item(), 10.0, rel_tol=1e-6)
    with torch.no_grad():
        itc.log_scale.fill_(start)
    itc.scale.sum().backward()
    assert itc.log_scale.grad is not None and itc.log_scale.grad.item() > 0
    itc.after_step()
    assert math.isclose(itc.scale.item(), bound, rel_tol=1e-5)
    inside = plain_itc(10.0)
    before = inside.log_scale.clone()
    inside.after_step()
    assert torch.equal(inside.log_scale, before)


def test_model_constrains_the_parameters_of_its_objectives() -> None:
    model = model_with({"mlm": 1.0, "itc": 1.0})
    with torch.no_grad():
        model.objectives["itc"].log_scale.fill_(9.0)  # pyright: ignore[reportArgumentType, reportCallIssue]
    model.after_step()
    assert math.isclose(model.objectives["itc"].scale.item(), 100.0, rel_tol=1e-5)  # pyright: ignore


# --- distill -------------------------------------------------------------------------------------------------------


def test_distill_is_the_divergence_from_the_teacher_in_both_directions() -> None:
    """Two pairs; the student's logits are (2, 0; s, 1) in text rows, the teacher's (1, 0; 0, 1), worked out by hand."""
    batch = {"teacher_image": torch.eye(2).double(), "teacher_text": torch.eye(2).double()}
    encoded = Vectors(unit(0, 60), unit(0, 90), batch)
    encoded.contrast = plain_itc(2.0)
    output = TeacherDistillation(tiny_config())(encoded)
    s = 2 * math.sin(math.radians(60))
    own, other = 1 / (1 + math.exp(-1)), 1 / (1 + math.e)  # of the teacher, in every row

    def row(logit: float, wrong: float) -> float:
        norm = math.log(math.exp(logit) + math.exp(wrong))
        return own * (math.log(own) - logit + norm) + other * (math.log(other) - wrong + norm)

    texts, images = row(2, 0) + row(s, 1), row(2, 1) + row(s, 0)
    assert math.isclose(output.loss.item(), (texts + images) / 2 / 2, rel_tol=1e-7)
    assert output.targets.tolist() == [0, 1] and output.left_out == 0


def test_distill_is_zero_for_the_teacher_itself_and_reaches_the_student_only() -> None:
    model, batch = model_with(with_required("distill")), tiny_batch()
    encoded = model.encode(batch)
    itc: Any = model.objectives["itc"]
    own = {"teacher_image": itc.embed_image(encoded.image), "teacher_text": itc.scale * itc.embed_text(encoded.text)}
    same = {**batch, **{name: value.detach() for name, value in own.items()}}
    assert abs(model(**same, only="distill").loss.item()) < 1e-6
    model(**batch, only="distill").loss.backward()
    assert not [*model.objectives["distill"].parameters()]
    assert itc.text_projection.weight.grad.abs().sum() > 0 and itc.log_scale.grad.abs() > 0


def test_distill_without_vectors_of_the_teacher_is_an_error() -> None:
    batch = {name: value for name, value in tiny_batch().items() if not name.startswith("teacher")}
    with pytest.raises(UsageError, match=r"the batch has no vectors of the teacher; mmbert\.fit computes"):
        model_with(with_required("distill"))(**batch)


# --- MLM -----------------------------------------------------------------------------------------------------------


def test_mlm_mixes_the_distribution_of_a_momentum_model_with_the_labels() -> None:
    """The momentum model is sure of word 7 at one position, and has no idea at the others."""
    model, batch = model_with({"mlm": 1.0}), tiny_batch()
    (logits,) = model.objectives["mlm"].predictions(model.encode(batch))
    teacher = torch.zeros_like(logits)
    teacher[0, 7] = 1e4
    soft = SoftTargets(torch.tensor(0.25), {"mlm": (teacher,)})
    found = model(**batch, soft_targets=soft).loss
    negative_log = logits.double().exp().sum(dim=1, keepdim=True).log() - logits.double()  # (K, V)
    labels = batch["mlm_labels"][batch["mlm_labels"] != IGNORE_INDEX]
    of_labels = sum(negative_log[i, label] for i, label in enumerate(labels))
    of_teacher = negative_log[0, 7] + negative_log[1:].mean(dim=1).sum()
    expected = (0.75 * of_labels + 0.25 * of_teacher) / len(labels)
    assert math.isclose(found.item(), expected.item(), rel_tol=1e-6)


def test_mlm_computes_logits_at_masked_positions_only() -> None:
    model = model_with({"mlm": 1.0}, text_hidden_size=16)
    batch = tiny_batch()
    batch["mlm_labels"][2, 2] = batch["input_ids"][2, 2]
    encoded = model.encode(batch)
    output = model.objectives["mlm"](encoded)
    assert output.logits.shape == (5, 40)
    full = model.objectives["mlm"].logits(encoded.masked_fused.text.hidden_states, model.mmbert.word_embeddings)
    assert full.shape == (4, 8, 40)
    expected = F.cross_entropy(full.flatten(0, 1), batch["mlm_labels"].flatten(), ignore_index=IGNORE_INDEX)
    assert difference(output.loss, expected) < 1e-6
    assert torch.equal(output.targets, batch["mlm_labels"][batch["mlm_labels"] != IGNORE_INDEX])


def test_mlm_without_any_mask_is_zero() -> None:
    model = model_with({"mlm": 1.0})
    batch = tiny_batch()
    batch["mlm_labels"][:] = IGNORE_INDEX
    output = model(**batch)
    assert output.loss == 0 and output.objectives["mlm"].left_out == 4
    output.loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_mlm_shares_the_word_embeddings() -> None:
    model = model_with({"mlm": 1.0})
    assert not any(p.shape == (40, 32) for p in model.objectives.parameters())
    model(**tiny_batch()).loss.backward()
    unseen = torch.tensor([i for i in range(5, 40) if i not in tiny_batch()["mlm_input_ids"]])
    assert model.mmbert.word_embeddings.grad[unseen].abs().sum(dim=1).min() > 0  # through the output only


def test_clean_and_masked_texts_are_encoded_in_one_call() -> None:
    """With the values of a call each, padding included."""
    model = model_with({"mlm": 1.0, "itm": 1.0}, fusion="hybrid_bridge", fusion_layers=2, text_layers=2, image_layers=2)
    batch = tiny_batch()
    encoded, alone = model.encode(batch), EncodedBatch(model.mmbert, batch)
    for one, other in ((encoded.text, alone.text), (encoded.masked_text, alone.masked_text)):
        assert torch.equal(one.mask, other.mask) and difference(one.hidden_states, other.hidden_states) < 1e-5
        assert len(one.intermediate) == 1 and difference(one.intermediate[0], other.intermediate[0]) < 1e-5
    assert difference(encoded.text.hidden_states, encoded.masked_text.hidden_states) > 0.1


def test_objectives_read_what_they_declare() -> None:
    """And only that is computed."""
    model = model_with({"mlm": 1.0, "itm": {"text": "masked"}, "itc": 1.0})
    reads = {name: objective.reads for name, objective in model.objectives.items()}
    assert reads == {
        "mlm": {"masked": Reads(text=True)},
        "itm": {"masked": Reads(pooled=True)},
        "itc": {"clean": Reads()},
    }
    assert model_with({"itm": 1.0}).objectives["itm"].reads == {"clean": Reads(pooled=True)}
    encoded = model.encode(tiny_batch())
    text, image, pooled = encoded.masked_fused
    assert text is not NOT_COMPUTED and image is NOT_COMPUTED and pooled is not NOT_COMPUTED
    assert all(output is NOT_COMPUTED for output in encoded.fused)


def test_objectives_share_one_encoding_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_with({"mlm": 1.0, "itm": {"negatives": "hard"}, "itc": {"embedding_size": 8}})
    calls: Counter[str] = Counter()
    for name in ("encode_text", "encode_image", "fuse"):
        original = getattr(model.mmbert, name)

        def counted(*args: object, name: str = name, original: object = original, **reads: object) -> object:
            calls[name] += 1
            return original(*args, **reads)  # type: ignore[operator]

        monkeypatch.setattr(model.mmbert, name, counted)
    model(**tiny_batch(), generator=seeded())
    assert calls == {"encode_text": 1, "encode_image": 1, "fuse": 3}


# --- the contrastive similarity in ITM's head, and negative texts ----------------------------------------------------

RESIDUAL = {"itm": {"residual": True}, "itc": {"embedding_size": 16}}


@pytest.mark.parametrize("negative_texts", [False, True])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_residual_adds_the_contrastive_logit_to_that_of_a_match(fusion: str, negative_texts: bool) -> None:
    """In the loss, with every pair fused and compared by hand; and in the score that evaluation uses."""
    objectives = {**RESIDUAL, "itm": {"residual": True, "negative_texts": negative_texts}}
    model, batch = model_with(objectives, fusion=fusion), tiny_batch(5)
    itm: Any = model.objectives["itm"]
    output = model(**batch, generator=seeded()).objectives["itm"]
    encoded = model.encode(batch)
    generator = seeded()
    uniform = [torch.rand(5, 5, generator=generator, dtype=torch.float64) for _ in range(1 + negative_texts)]
    draws = [-torch.log(-torch.log(u)) for u in uniform]
    others = [draw.fill_diagonal_(-torch.inf).argmax(dim=1) for draw in draws]
    own = torch.arange(5)
    pairs = [(own, own), (own, others[0])] + ([(others[1], own)] if negative_texts else [])
    cosines = model.objectives["itc"].embed_text(encoded.text) @ model.objectives["itc"].embed_image(encoded.image).T
    losses, weights = [], [1.0, 0.5, 0.5] if negative_texts else [1.0, 1.0]
    for (text, image), weight, match in zip(pairs, weights, (1, 0, 0), strict=False):
        pooled = model.mmbert.fuse(encoded.text.rows(text), encoded.image.rows(image)).pooled
        logits = itm.head(pooled)
        logits[:, 1] += itm.residual_factor * model.objectives["itc"].scale * cosines[text, image]
        losses.append(weight * F.cross_entropy(logits, torch.full((5,), match), reduction="sum"))
        scores = model.match_scores(encoded.text.rows(text), encoded.image.rows(image))
        torch.testing.assert_close(scores, logits[:, 1] - logits[:, 0])
    torch.testing.assert_close(output.loss, sum(losses) / (5 * sum(weights)))


def test_residual_teaches_the_factor_but_not_the_projections() -> None:
    model = model_with({"itm": {"residual": True}, "itc": {"weight": 1e-9, "embedding_size": 16}})
    output = model(**tiny_batch(), generator=seeded()).objectives["itm"]
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.objectives.named_parameters()}
    assert gradients["itm.residual_factor"].abs().item() > 0
    assert gradients["itc.text_projection.weight"] is None


def test_negative_texts_never_have_the_caption_of_the_image() -> None:
    batch = tiny_batch(6)
    batch["image_key"][1], batch["image_text_keys"][2, 1] = batch["image_key"][0], batch["text_key"][3]
    is_pair = same_pair(batch)
    assert is_pair[0, 1] and is_pair[3, 2] and not is_pair[2, 3]
    for step in range(50):
        texts, valid = sample_negatives(~is_pair.T, generator=seeded(step))
        assert valid.all() and not is_pair.T[torch.arange(6), texts].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"itm": {"residual": True}},
            "objectives.itm.residual reads the contrastive similarity: add the objective itc",
        ),
        ({"itm": {"residual": 1}}, "objectives.itm.residual=1; allowed are true, false"),
        ({"itm": {"negative_texts": "yes"}}, "objectives.itm.negative_texts='yes'; allowed are true, false"),
        ({"itc": {"pool": "last"}}, "objectives.itc.pool='last'; allowed are first, mean, first_and_mean"),
        (
            {"itc": {"pool": {"text": "mean"}}},
            r"pool=\{'text': 'mean'\}; allowed are first, mean, first_and_mean, or one",
        ),
        ({"itc": {"pool": {"text": "mean", "image": "max"}}}, "'image': 'max'.*; allowed are first, mean"),
        ({"itc": {"normalize": "yes"}}, "objectives.itc.normalize='yes'; allowed are true, false"),
        ({"itc": {"pooler": "tanh"}}, "objectives.itc.pooler='tanh'; allowed are none, text, image, both"),
        ({"itc": {"pooler": "text", "init": "closed_form"}}, "pooler='text' puts another layer before them"),
        ({"itc": {"init": "cca"}}, "objectives.itc.init='cca'; allowed are random, closed_form"),
        ({"itc": {"init_samples": 0}}, "objectives.itc.init_samples=0: must be a whole number of 1 or more, or null"),
    ],
)
def test_options_that_are_not_allowed_are_named(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        model_with(options)


def test_mean_pooling_leaves_padding_out() -> None:
    model = model_with({"itc": {"pool": "first_and_mean", "embedding_size": 16}})
    batch = tiny_batch(4)
    text = model.encode(batch).text
    changed = text._replace(hidden_states=torch.where(text.mask[..., None], text.hidden_states, 1e3))
    assert not text.mask.all()
    assert torch.equal(model.objectives["itc"].embed_text(text), model.objectives["itc"].embed_text(changed))
    features = pool_tokens(text, "first_and_mean")
    row = text.hidden_states[1][text.mask[1]]
    torch.testing.assert_close(features[1], torch.cat([row[0], row.mean(dim=0)]))
    assert torch.equal(pool_tokens(text, "mean"), features[:, row.shape[1] :])


def test_texts_and_images_are_pooled_each_in_its_way() -> None:
    options = {"pool": {"text": "mean", "image": "first_and_mean"}, "normalize": True, "embedding_size": 16}
    model = model_with({"itc": {**options, "pooler": "both"}})
    encoded = model.encode(tiny_batch(4))
    head = model.objectives["itc"]
    width = encoded.image.hidden_states.shape[-1]
    assert (head.text_projection.in_features, head.image_projection.in_features) == (width, 2 * width)
    assert head.poolers["image"].weight.shape == (2 * width, 2 * width)
    states = encoded.image.hidden_states
    pooled = torch.cat([states[:, 0], states.mean(dim=1)], dim=-1)
    expected = torch.tanh(head.poolers["image"](pooled / pooled.norm(dim=-1, keepdim=True)))
    expected = head.image_projection(expected)
    torch.testing.assert_close(head.embed_image(encoded.image), expected / expected.norm(dim=-1, keepdim=True))
    mask = encoded.text.mask[..., None]
    mean = (encoded.text.hidden_states * mask).sum(dim=1) / mask.sum(dim=1)
    expected = head.text_projection(torch.tanh(head.poolers["text"](mean / mean.norm(dim=-1, keepdim=True))))
    torch.testing.assert_close(head.embed_text(encoded.text), expected / expected.norm(dim=-1, keepdim=True))
