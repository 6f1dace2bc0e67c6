"""Batch sampler and resumable loader; the order depends on (seed, epoch) only, not on the number of processes."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Sampler

from mmbert.errors import UsageError
from mmbert.runtime.randomness import permutation

Index = tuple[int, int]  # (epoch, position in the data set)


class TrainBatches(Sampler[list[Index]]):
    """Batch sampler that groups texts of similar length and shuffles every epoch.

    The epoch is shuffled, cut into pools of `pool` global batches, sorted by length within a pool, cut into batches,
    and the batches are shuffled. Each process takes its slice of every global batch, so all have as many steps; the
    remainder of an epoch that fills no batch is dropped.

    Args:
        lengths: epoch -> (N,) lengths of the samples' texts, in any unit.
        count: N, number of samples.
        batch_size: Samples a step and process.
        seed: The run's seed.
        rank: Rank of this process.
        world_size: Number of processes.
        pool: Global batches that are sorted together; 1 = no grouping by length.
        limit: Batches after which an epoch ends, or a fraction of them (`trainer.limit_train_batches`); None: all.
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
        limit: int | float | None = None,
    ):
        self.lengths, self.count, self.seed = lengths, count, seed
        self.batch_size, self.rank, self.world_size, self.pool = batch_size, rank, world_size, pool
        self.steps = len(self) if limit is None else limited_steps(len(self), limit)
        """Batches of each process until the epoch ends; `len` is without the limit, which Lightning applies."""
        self.position: Index = (0, 0)
        """Epoch and step at which the next iteration starts."""

    def __len__(self) -> int:
        return self.count // (self.batch_size * self.world_size)

    def global_batches(self, epoch: int) -> np.ndarray:
        """Compute the (steps, global batch size) positions of one epoch."""
        size = self.batch_size * self.world_size
        order = permutation(self.seed, "order", epoch, self.count)[: len(self) * size]
        lengths = self.lengths(epoch)
        chunks = [order[i : i + self.pool * size] for i in range(0, len(order), self.pool * size)]
        by_length = [chunk[np.argsort(lengths[chunk], kind="stable")] for chunk in chunks]
        batches = np.concatenate(by_length).reshape(len(self), size) if by_length else order.reshape(0, size)
        return batches[permutation(self.seed, "batches", epoch, len(batches))]

    def __iter__(self) -> Iterator[list[Index]]:
        epoch, step = self.position
        start = self.rank * self.batch_size
        for batch in self.global_batches(epoch)[step : self.steps]:
            yield [(epoch, int(i)) for i in batch[start : start + self.batch_size]]


def limited_steps(batches: int, limit: int | float) -> int:
    """Compute the batches of an epoch under `trainer.limit_train_batches`, a number or (float) a fraction of them."""
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


class TrainLoader(DataLoader):
    """Data loader whose position is saved in checkpoints, so that a resumed run continues with the next batch.

    Lightning stops an epoch after `len(loader)` batches without exhausting the iterator, creates the first iterator
    before it sets any epoch, and saves `state_dict()` with a checkpoint. So the position is kept here: it advances
    before a batch is yielded, and the last batch of an epoch, which may be limited, advances it to the next one.
    """

    batch_sampler: TrainBatches

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Iterate over the rest of the epoch."""
        batches = self.batch_sampler
        epoch, step = batches.position
        for batch in super().__iter__():
            step += 1
            batches.position = (epoch, step) if step < batches.steps else (epoch + 1, 0)
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and step of the next batch."""
        epoch, step = self.batch_sampler.position
        return {"epoch": epoch, "step": step, "batches_per_epoch": len(self.batch_sampler)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the position that `state_dict` returned.

        Raises:
            UsageError: The epoch had another number of batches then.
        """
        if state["batches_per_epoch"] != len(self.batch_sampler):
            raise UsageError(
                f"an epoch had {state['batches_per_epoch']} batches at the checkpoint, now {len(self.batch_sampler)}: "
                "the data, data.batch_size or the number of processes changed; start a new run."
            )
        epoch, step = state["epoch"], state["step"]
        # Older checkpoints may lie behind the limit, as the next epoch was the rest of this one.
        self.batch_sampler.position = (epoch, step) if step < self.batch_sampler.steps else (epoch + 1, 0)
