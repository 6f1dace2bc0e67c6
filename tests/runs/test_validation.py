"""Validation neither changes training nor depends on batches, order or padding."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interrupted import fit, trace, weights
from tiers import tier
from tiny import tiny_batch, tiny_config

from mmbert.evaluation.pairs import PairEvaluation
from mmbert.model.modeling import MMBertForPreTraining


def test_training_is_the_same_with_and_without_validation(tiny: list[str], tmp_path: Path) -> None:
    """Dropout, augmentation and drawn negatives are on: a random number spent in validation would show."""
    short = "--trainer.max_epochs=2"
    fit(tiny, tmp_path, short, "--name=with")
    fit(tiny, tmp_path, short, "--name=twice", "--trainer.val_check_interval=0.5")
    fit(tiny, tmp_path, short, "--name=without", "--trainer.limit_val_batches=0")
    fit(tiny, tmp_path, short, "--name=sanity", "--trainer.num_sanity_val_steps=1", "--evaluation.val_scorer=itm")
    for name in ("twice", "without", "sanity"):
        assert trace(tmp_path, name) == trace(tmp_path, "with"), name
        for key, value in weights(tmp_path, "with").items():
            assert torch.equal(value, weights(tmp_path, name)[key]), (name, key)


def evaluation_batch(size: int = 12) -> dict[str, torch.Tensor]:
    batch = tiny_batch(size, dtype=torch.float64)
    return {**batch, "wrong_pixel_values": batch["pixel_values"].roll(1, 0), "requested_index": batch["index"]}


@pytest.fixture(scope="module")
def model() -> MMBertForPreTraining:
    torch.manual_seed(0)
    objectives = {"mlm": 1.0, "itm": 1.0, "itc": {"embedding_size": 8}}
    return MMBertForPreTraining(tiny_config(objectives=objectives, initializer_range=0.2)).double().eval()


def judged(model: MMBertForPreTraining, batches: list[dict[str, torch.Tensor]], scorer: str) -> dict[str, float]:
    evaluation = PairEvaluation(model, frozenset(range(9)), scorer=scorer)
    for batch in batches:
        evaluation.step(batch)
    return evaluation.metrics()


@settings(max_examples=tier(20, 500))
@given(st.permutations(range(12)), st.integers(1, 12), st.integers(0, 5), st.sampled_from(["itc", "itm"]))
def test_results_do_not_depend_on_batches_order_or_padding(
    model: MMBertForPreTraining, order: list[int], size: int, padding: int, scorer: str
) -> None:
    whole = evaluation_batch()
    batches = []
    for first in range(0, 12, size):
        batch = {name: value[order[first : first + size]] for name, value in whole.items()}
        for name, fill in (("input_ids", 0), ("mlm_input_ids", 0), ("mlm_labels", -100), ("attention_mask", 0)):
            batch[name] = torch.nn.functional.pad(batch[name], (0, padding), value=fill)
        batches.append(batch)
    expected, found = judged(model, [whole], scorer), judged(model, batches, scorer)
    assert expected.keys() == found.keys() and "rsum" in found and "itm_auroc" in found
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-9), name
