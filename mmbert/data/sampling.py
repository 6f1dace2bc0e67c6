"""The order of samples: a function of (seed, epoch), grouped by length, the same for any number of processes."""

from collections.abc import Callable, Iterator

import numpy as np
from torch.utils.data import Sampler

from mmbert.randomness import permutation

Index = tuple[int, int]  # (epoch, position in the data set)


class TrainBatches(Sampler[list[Index]]):
    """Batches of similar text length, drawn anew every epoch.

    The epoch is shuffled, cut into pools of `pool` global batches, sorted by length within a pool, cut into batches,
    and the batches are shuffled. Each process takes its slice of every global batch, so all see as many steps; the
    remainder of an epoch that fills no batch is left for another epoch's order.

    Args:
        lengths: epoch -> (N,) lengths of the samples' texts, in any unit.
        count: N, number of samples.
        batch_size: Samples a step and process.
        seed: The run's seed.
        rank: Number of this process.
        world_size: Number of processes.
        pool: Global batches that are sorted together; 1 = no grouping by length.
    """

    def __init__(
        self,
        lengths: Callable[[int], np.ndarray],
        count: int,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        pool: int = 50,
    ):
        self.lengths, self.count, self.seed = lengths, count, seed
        self.batch_size, self.rank, self.world_size, self.pool = batch_size, rank, world_size, pool
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next iteration gives; Lightning calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count // (self.batch_size * self.world_size)

    def global_batches(self, epoch: int) -> np.ndarray:
        """(steps, global batch size) positions of one epoch."""
        size = self.batch_size * self.world_size
        order = permutation(self.seed, "order", epoch, self.count)[: len(self) * size]
        lengths = self.lengths(epoch)
        chunks = [order[i : i + self.pool * size] for i in range(0, len(order), self.pool * size)]
        by_length = [chunk[np.argsort(lengths[chunk], kind="stable")] for chunk in chunks]
        batches = np.concatenate(by_length).reshape(len(self), size) if by_length else order.reshape(0, size)
        return batches[permutation(self.seed, "batches", epoch, len(batches))]

    def __iter__(self) -> Iterator[list[Index]]:
        epoch = self.epoch
        start = self.rank * self.batch_size
        for batch in self.global_batches(epoch):
            yield [(epoch, int(i)) for i in batch[start : start + self.batch_size]]
