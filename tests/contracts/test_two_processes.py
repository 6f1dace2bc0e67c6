"""Every combination of fusion and objectives trains in two processes (DDP) with the losses of one process."""

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import in_processes
from tiny import randomize, tiny_batch, tiny_config
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmbert.errors import UsageError
from mmbert.model.fusion import FUSIONS
from mmbert.model.modeling import MMBertForPreTraining
from mmbert.model.objectives import OBJECTIVES
from mmbert.model.objectives.itm import gather_tokens
from mmbert.model.tokens import Tokens
from mmbert.training.optim import build_optimizer
from mmbert.training.options import OptimOptions

ROWS, STEPS = 6, 3
COMBINATIONS = [
    (fusion, names)
    for fusion in FUSIONS
    for count in range(1, len(OBJECTIVES) + 1)
    for names in combinations(OBJECTIVES, count)
    if not any(OBJECTIVES[name].requires or name in ("boxes", "mim") for name in names)
]

WITH_OPTIONS: dict[str, dict[str, Any]] = {
    "residual": {"itm": {"residual": True, "negative_texts": True, "negatives": "hard"}, "itc": {"pool": "mean"}},
    "hard_rows": {"itm": {"negatives": {"hard": 0.9, "warmup": 0.5}, "negative_texts": True}, "itc": 1.0},
    "distill": {"itc": 1.0, "distill": 1.0},
    "rtd": {"mlm": 1.0, "itm": 1.0, "rtd": 2.0},
    "boxes": {"itm": 1.0, "boxes": 1.0},
    "tokens": {"itm": {"residual": True, "negatives": "hard"}, "itc": {"interaction": "tokens"}},
    "mim": {"mim": {"mask_ratio": 0.5}},
    "mim_beside_others": {"mlm": 1.0, "itm": 1.0, "itc": 1.0, "ngrams": 1.0, "mim": 0.5},
}
"""Name -> objectives with options that gather more over the processes, or that read each other's heads; and mim and
boxes, which read the image encoder alone."""
COMBINATIONS += [(fusion, (name,)) for fusion in FUSIONS for name in WITH_OPTIONS]


class Loss(nn.Module):
    """Returns the loss alone, as `TrainingModule.training_step` does."""

    def __init__(self, model: MMBertForPreTraining):
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor], step: int) -> Tensor:
        progress = torch.tensor(step / STEPS)
        loss = self.model(**batch, generator=torch.Generator().manual_seed(step), progress=progress).loss
        assert loss is not None
        return loss


def losses(fusion: str, names: tuple[str, ...], batch: dict[str, Tensor], processes: int) -> list[float]:
    """Loss of each step, as the mean over processes."""
    torch.manual_seed(0)
    objectives = WITH_OPTIONS.get(names[0]) or dict.fromkeys(names, 1.0)
    config = tiny_config(
        fusion=fusion, objectives=objectives, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    model = MMBertForPreTraining(config).double()
    randomize(model)
    step: nn.Module = Loss(model)
    if processes > 1:  # as training.trainer asks Lightning for
        step = DistributedDataParallel(step, find_unused_parameters=True, broadcast_buffers=False)
    optimizer, schedule = build_optimizer(model, OptimOptions(lr=1e-2, warmup=0.0), STEPS)
    found = []
    for number in range(STEPS):
        loss = step(batch, number)
        loss.backward()
        optimizer.step()
        model.after_step()
        optimizer.zero_grad()
        schedule.step()
        total = loss.detach().clone()
        if processes > 1:
            torch.distributed.all_reduce(total)
        found.append(float(total) / processes)
    return found


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    """A batch of `ROWS` rows in double precision."""
    return {k: v.double() if v.is_floating_point() else v for k, v in tiny_batch(ROWS, length=9).items()}


def part_of(batch: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Half of the rows, padded to their own longest text."""
    own = {k: v[rank * ROWS // 2 : (rank + 1) * ROWS // 2] for k, v in batch.items()}
    longest = int(own["attention_mask"].sum(dim=1).max())
    texts = ("input_ids", "attention_mask", "mlm_input_ids", "mlm_labels")
    assert longest == {0: 9, 1: 6}[rank], "texts of different length are gathered"
    return {k: v[:, :longest] if k in texts else v for k, v in own.items()}


@pytest.fixture(scope="module")
def of_two(batch: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Combination -> losses of two processes with half of the batch each, all in one pair of processes."""

    def work(rank: int) -> dict[str, list[float]]:
        own, found = part_of(batch, rank), {}
        for fusion, names in COMBINATIONS:
            try:
                found[f"{fusion} {names}"] = losses(fusion, names, own, 2)
            except UsageError:
                found[f"{fusion} {names}"] = []
        return found

    one, two = in_processes(2, work, tmp_path_factory.mktemp("group"), seconds=240)
    assert one == two
    return one


@pytest.mark.parametrize(("fusion", "names"), COMBINATIONS, ids=lambda x: x if isinstance(x, str) else "+".join(x))
def test_two_processes_give_the_losses_of_one(
    fusion: str, names: tuple[str, ...], batch: dict[str, Tensor], of_two: dict[str, list[float]]
) -> None:
    try:
        expected = losses(fusion, names, batch, 1)
    except UsageError:
        expected = []
    assert of_two[f"{fusion} {names}"] == pytest.approx(expected, rel=1e-9)
    assert len(set(expected)) == STEPS, "it learns something"


def test_texts_of_different_length_are_gathered_with_padding(tmp_path: Path) -> None:
    def work(rank: int) -> tuple[Tensor, Tensor]:
        length = 2 + rank
        tokens = Tokens(torch.full((1, length, 4), 1.0 + rank), torch.ones(1, length, dtype=torch.bool))
        gathered = gather_tokens(tokens)
        return gathered.hidden_states, gathered.mask

    for states, mask in in_processes(2, work, tmp_path):
        assert mask.tolist() == [[True, True, False], [True, True, True]]
        assert states[..., 0].tolist() == [[1, 1, 0], [2, 2, 2]]
