"""The order of training samples, for any number of processes."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmbert.data.sampling import TrainBatches, TrainLoader
from mmbert.errors import UsageError
from mmbert.runtime.randomness import permutation


def lengths(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 60, count)


def batches(
    count: int, batch_size: int, *, rank: int = 0, world_size: int = 1, seed: int = 0, pool: int = 50, epoch: int = 0
) -> list[list[tuple[int, int]]]:
    """All batches of one process and epoch."""
    texts = lengths(count)
    sampler = TrainBatches(
        lambda _: texts, count, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size, pool=pool
    )
    sampler.position = (epoch, 0)
    found = list(sampler)
    assert len(found) == len(sampler)
    return found


shapes = {
    "count": st.integers(0, 150),
    "batch_size": st.integers(1, 9),
    "seed": st.integers(0, 1000),
    "pool": st.integers(1, 6),
    "epoch": st.integers(0, 5),
}


@given(world_size=st.integers(1, 4), **shapes)
def test_epoch_repeats_nothing_and_processes_share_nothing(
    world_size: int, count: int, batch_size: int, **kw: int
) -> None:
    found = [batches(count, batch_size, rank=r, world_size=world_size, **kw) for r in range(world_size)]
    assert len({len(x) for x in found}) == 1  # all see as many steps, or training would hang
    assert all(len(batch) == batch_size for rank in found for batch in rank)
    assert {epoch for rank in found for batch in rank for epoch, _ in batch} <= {kw["epoch"]}
    seen = [i for rank in found for batch in rank for _, i in batch]
    assert len(set(seen)) == len(seen) and set(seen) <= set(range(count))
    assert count - len(seen) < batch_size * world_size  # only the remainder is left out


@given(world_size=st.integers(2, 4), **shapes)
def test_global_batches_do_not_depend_on_the_number_of_processes(
    world_size: int, count: int, batch_size: int, **kw: int
) -> None:
    one = batches(count, batch_size * world_size, **kw)
    many = [batches(count, batch_size, rank=r, world_size=world_size, **kw) for r in range(world_size)]
    assert [[i for rank in step for i in rank] for step in zip(*many, strict=True)] == one


@given(**shapes)
def test_order_follows_from_seed_and_epoch(count: int, batch_size: int, **kw: int) -> None:
    assert batches(count, batch_size, **kw) == batches(count, batch_size, **kw)


def test_order_differs_by_epoch_and_seed() -> None:
    def order(**kw: int) -> list[int]:
        return [i for batch in batches(120, 4, **kw) for _, i in batch]

    assert len({tuple(order(epoch=epoch, seed=seed)) for epoch in range(3) for seed in range(3)}) == 9


def test_seed_moves_samples_between_batches_and_batches_among_themselves() -> None:
    def contents(seed: int, pool: int) -> list[frozenset[int]]:
        texts = np.arange(120)
        sampler = TrainBatches(lambda _: texts, 120, batch_size=4, seed=seed, pool=pool)
        return [frozenset(i for _, i in batch) for batch in sampler]

    assert set(contents(0, 1)).isdisjoint(contents(1, 1))
    # One pool holds all, of different lengths: the same batches for every seed, in another order.
    assert set(contents(0, 30)) == set(contents(1, 30)) and contents(0, 30) != contents(1, 30)


@given(world_size=st.integers(1, 3), **shapes)
def test_order_is_that_of_the_rule(
    world_size: int, count: int, batch_size: int, seed: int, pool: int, epoch: int
) -> None:
    """Shuffle, cut into pools, sort each by length, cut into batches, shuffle these; a resumed run relies on it."""
    texts = np.arange(count) % 3  # equal lengths stay in the order of the shuffle
    size = batch_size * world_size
    steps = count // size
    order = permutation(seed, "order", epoch, count).tolist()[: steps * size]
    pools = [order[i : i + pool * size] for i in range(0, len(order), pool * size)]
    line = [i for pool in pools for i in sorted(pool, key=lambda i: texts[i])]
    expected = [line[n * size : (n + 1) * size] for n in permutation(seed, "batches", epoch, steps).tolist()]
    sampler = TrainBatches(lambda _: texts, count, batch_size=batch_size, seed=seed, world_size=world_size, pool=pool)
    assert sampler.global_batches(epoch).tolist() == expected


def test_remainder_is_another_one_in_another_epoch() -> None:
    left = [set(range(103)) - {i for batch in batches(103, 10, epoch=e) for _, i in batch} for e in range(20)]
    assert all(len(x) == 3 for x in left) and len(set.union(*left)) > 30


def test_batches_are_grouped_by_length() -> None:
    texts = lengths(400)
    grouped = [[texts[i] for _, i in batch] for batch in batches(400, 8, pool=50)]
    # One pool holds everything: sorted by length, no two batches overlap by more than a shared end.
    spans = sorted((min(x), max(x)) for x in grouped)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    assert [(min(x), max(x)) for x in grouped] != spans  # but the batches themselves are shuffled
    ungrouped = [[texts[i] for _, i in batch] for batch in batches(400, 8, pool=1)]
    assert np.mean([max(x) - min(x) for x in grouped]) < 0.1 * np.mean([max(x) - min(x) for x in ungrouped])


def test_batches_read_the_lengths_of_their_epoch() -> None:
    asked = []

    def of_epoch(epoch: int) -> np.ndarray:
        asked.append(epoch)
        return np.arange(40) if epoch % 2 else np.arange(40)[::-1].copy()

    sampler = TrainBatches(of_epoch, 40, batch_size=4, seed=0)
    for epoch in (0, 3):
        sampler.position = (epoch, 0)
        batch = [i for _, i in next(iter(sampler))]
        assert batch == sorted(batch, reverse=epoch == 0)
    assert asked == [0, 3]


class Numbers(torch.utils.data.Dataset):
    """Gives back what it is asked for."""

    def __getitem__(self, index: tuple[int, int]) -> tuple[int, int]:
        return index


@pytest.mark.parametrize("workers", [0, 1])
def test_loader_goes_on_where_its_state_was_taken(workers: int) -> None:
    def loader() -> TrainLoader:
        batches = TrainBatches(lambda epoch: np.arange(10), 10, batch_size=3, seed=0)
        return TrainLoader(Numbers(), batch_sampler=batches, num_workers=workers, collate_fn=list)

    whole = loader()
    epochs = [list(whole) for _ in range(3)]  # 3 batches each; the last of an epoch moves on to the next
    flat = [batch for epoch in epochs for batch in epoch]
    assert [batch[0][0] for batch in flat] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for taken in range(7):
        first, second = loader(), loader()
        for _ in range(taken // 3):
            list(first)
        iterator = iter(first)
        seen = [next(iterator) for _ in range(taken % 3)]
        second.load_state_dict(first.state_dict())
        assert seen + list(second) == epochs[taken // 3]


@given(
    st.integers(1, 40),
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(0, 1000),
    st.integers(1, 4),
    st.integers(0, 60),
)
def test_order_resumed_anywhere_is_that_of_an_uninterrupted_run(
    count: int, batch_size: int, world_size: int, seed: int, pool: int, taken: int
) -> None:
    """Each process on its own; a position after the last batch of an epoch is the start of the next."""
    texts = lengths(count)
    for rank in range(world_size):

        def loader(rank: int = rank) -> TrainLoader:
            batches = TrainBatches(
                lambda epoch: np.roll(texts, epoch), count, batch_size=batch_size, seed=seed, rank=rank,
                world_size=world_size, pool=pool,
            )  # fmt: skip
            return TrainLoader(Numbers(), batch_sampler=batches, collate_fn=list)

        whole, first, second = loader(), loader(), loader()
        steps = len(whole)
        if not steps:
            return
        epochs = 2 + taken // steps
        expected = [batch for _ in range(epochs) for batch in whole]
        assert len(expected) == epochs * steps
        seen = [batch for _ in range(taken // steps) for batch in first]
        iterator = iter(first)
        seen += [next(iterator) for _ in range(taken % steps)]
        second.load_state_dict(first.state_dict())
        while len(seen) < len(expected):
            seen += list(second)
        assert seen == expected


@pytest.mark.parametrize(("limit", "steps"), [(3, 3), (0.75, 3), (1, 1), (1.0, 4), (9, 4)])
def test_limited_epoch_begins_and_resumes_as_a_whole_one(limit: int | float, steps: int) -> None:
    def loader(limit: int | float | None = limit) -> TrainLoader:
        batches = TrainBatches(lambda epoch: np.arange(8), 8, batch_size=2, seed=0, limit=limit)
        return TrainLoader(Numbers(), batch_sampler=batches, collate_fn=list)

    unlimited, limited = loader(None), loader()
    epochs = [list(unlimited)[:steps] for _ in range(3)]
    assert [list(limited) for _ in range(3)] == epochs and len(limited) == 4
    for taken in range(3 * steps):
        first, second = loader(), loader()
        for _ in range(taken // steps):
            list(first)
        iterator = iter(first)
        seen = [next(iterator) for _ in range(taken % steps)]
        second.load_state_dict(first.state_dict())
        assert seen + list(second) == epochs[taken // steps]
    limited.load_state_dict({"epoch": 0, "step": 3, "batches_per_epoch": 4})  # of an older checkpoint, if limited
    assert list(limited) == (epochs[1] if steps <= 3 else epochs[0][3:])


def test_loader_refuses_the_state_of_other_batches() -> None:
    batches = [TrainBatches(lambda epoch: np.arange(10), 10, batch_size=size, seed=0) for size in (3, 2)]
    one, two = (TrainLoader(Numbers(), batch_sampler=b) for b in batches)
    with pytest.raises(UsageError, match="3 batches at the checkpoint, now 5"):
        two.load_state_dict(one.state_dict())
