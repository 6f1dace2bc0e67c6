"""Two processes compute the loss and the gradients that one process computes on the complete batch."""

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import in_processes
from tiny import randomize, tiny_batch, tiny_config
from torch import Tensor

from mmbert.model.modeling import MMBertForPreTraining
from mmbert.runtime.distributed import all_gather, all_gather_ragged, all_reduce_max, exit_together

ROWS = 6
OBJECTIVES = {"mlm": 0.7, "itm": {"weight": 1.3, "negatives": "hard"}, "itc": {"weight": 0.5, "embedding_size": 16}}


def loss_and_gradients(batch: dict[str, Tensor], fusion: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = MMBertForPreTraining(
        tiny_config(
            fusion=fusion,
            objectives=OBJECTIVES,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            text_layers=2,
            image_layers=2,
            fusion_layers=2,
        )
    ).double()
    randomize(model)
    output = model(**batch, generator=torch.Generator().manual_seed(3))
    assert output.loss is not None
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": output.loss.detach(), **gradients}


def doubled(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


@pytest.mark.parametrize("fusion", ["early", "late", "hybrid", "hybrid_bridge"])
def test_two_processes_give_the_loss_and_gradients_of_one(fusion: str, tmp_path: Path) -> None:
    whole = doubled(tiny_batch(ROWS))
    expected = loss_and_gradients(whole, fusion)

    def work(rank: int) -> dict[str, Tensor]:
        own = {k: v[rank * ROWS // 2 : (rank + 1) * ROWS // 2] for k, v in whole.items()}
        # Each process pads to its own longest text, so caption hashes and tokens differ in width.
        carried = own["image_text_keys"]
        own["image_text_keys"] = carried[:, : int((carried >= 0).sum(dim=1).max())]
        return loss_and_gradients(own, fusion)

    one, two = in_processes(2, work, tmp_path)
    assert set(one) == set(expected)
    for name, value in expected.items():
        mean = (one[name] + two[name]) / 2  # what DDP does with gradients
        torch.testing.assert_close(mean, value, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_all_gather_keeps_rank_order_and_pads_ragged_rows(tmp_path: Path) -> None:
    def work(rank: int) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        ragged = torch.full((2, 1 + rank), rank)
        return (
            all_gather(torch.tensor([[rank], [10 + rank]])),
            all_gather_ragged(ragged, pad=-1),
            all_reduce_max(rank, 5 - rank),
        )

    for rows, ragged, largest in in_processes(2, work, tmp_path):
        assert rows.tolist() == [[0], [10], [1], [11]]
        assert ragged.tolist() == [[0, -1], [0, -1], [1, 1], [1, 1]]
        assert largest == (1, 5)


def test_no_process_exits_while_another_still_writes(tmp_path: Path) -> None:
    def work(rank: int) -> tuple[bool, bool]:
        if rank == 0:
            time.sleep(1)
            (tmp_path / "metrics.json").write_text("{}")
        exit_together()
        return (tmp_path / "metrics.json").is_file(), dist.is_initialized()

    assert in_processes(2, work, tmp_path) == [(True, False), (True, False)]


def test_exit_together_needs_no_process_group() -> None:
    exit_together()
    assert not dist.is_initialized()
