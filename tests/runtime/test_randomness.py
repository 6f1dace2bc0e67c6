"""Stateless random numbers: they depend on seed, purpose and numbers only, and are uniformly distributed."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmbert.runtime.randomness import mix, numpy_generator, permutation, torch_generator, torch_seed

MASK = (1 << 64) - 1


def splitmix(start: int, numbers: list[int]) -> int:
    """SplitMix64 with Python's integers."""
    state = start
    for number in numbers:
        state = ((state ^ ((number + 0x9E3779B97F4A7C15) & MASK)) * 0x9E3779B97F4A7C15) & MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
        state ^= state >> 31
    return state


@given(st.integers(0, 2**31), st.lists(st.integers(0, 2**40), max_size=3))
def test_mix_equals_splitmix_with_python_integers(seed: int, numbers: list[int]) -> None:
    assert int(mix(seed, "x", *numbers)) == splitmix(int(mix(seed, "x")), numbers)


def test_mix_of_an_array_equals_mix_of_each_element() -> None:
    together = mix(3, "order", 5, np.arange(10))
    assert together.dtype == np.uint64 and together.shape == (10,)
    assert together.tolist() == [int(mix(3, "order", 5, i)) for i in range(10)]


def test_mix_differs_by_seed_purpose_and_every_number() -> None:
    values = {
        int(mix(seed, purpose, epoch, sample))
        for seed in range(5)
        for purpose in ("mask", "crop")
        for epoch in range(20)
        for sample in range(50)
    }
    assert len(values) == 5 * 2 * 20 * 50
    assert mix(0, "a", 1, 2) != mix(0, "a", 2, 1)
    assert mix(1, "2/a") != mix(12, "a")


def test_every_bit_of_mix_is_uniform_and_neighbours_are_uncorrelated() -> None:
    values = mix(0, "bits", np.arange(40_000))
    for bit in range(64):
        share = ((values >> np.uint64(bit)) & np.uint64(1)).mean()
        assert abs(share - 0.5) < 0.0125, bit  # 5 standard deviations
    neighbours = np.corrcoef((values >> np.uint64(11)).astype(float)[:-1], (values >> np.uint64(11)).astype(float)[1:])
    assert abs(neighbours[0, 1]) < 0.025


@given(st.integers(0, 100), st.integers(0, 5), st.integers(0, 300))
def test_permutation_contains_every_number_once(seed: int, epoch: int, count: int) -> None:
    order = permutation(seed, "order", epoch, count)
    assert sorted(order.tolist()) == list(range(count))
    assert np.array_equal(order, permutation(seed, "order", epoch, count))


def test_permutation_is_uniform_and_differs_by_epoch() -> None:
    first = np.array([permutation(0, "order", epoch, 4)[0] for epoch in range(4000)])
    assert all(abs((first == i).sum() - 1000) < 140 for i in range(4))
    assert not np.array_equal(permutation(0, "order", 0, 100), permutation(0, "order", 1, 100))


def test_generators_depend_on_their_numbers_only() -> None:
    np.random.seed(0)
    torch.manual_seed(0)
    a, b = numpy_generator(1, "mask", 2, 3).random(4), torch.rand(4, generator=torch_generator(1, "step", 7))
    np.random.seed(1)
    torch.manual_seed(1)
    assert np.array_equal(a, numpy_generator(1, "mask", 2, 3).random(4))
    assert torch.equal(b, torch.rand(4, generator=torch_generator(1, "step", 7)))
    assert not np.array_equal(a, numpy_generator(1, "mask", 3, 2).random(4))
    assert not torch.equal(b, torch.rand(4, generator=torch_generator(1, "step", 8)))


def test_torch_seeds_are_not_negative() -> None:
    seeds = [torch_seed(0, "step", i) for i in range(1000)]
    assert all(0 <= seed < 2**63 for seed in seeds) and len(set(seeds)) == 1000
