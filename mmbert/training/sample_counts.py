"""Counts of training samples: seen, repeated, lost, and skipped with their reasons."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmbert.errors import DataError


class SampleCounts:
    """Count how often each training sample was requested in an epoch.

    Args:
        count: N, training samples.
        per_epoch: Samples that an epoch requests: N less the remainder that fills no batch.
    """

    def __init__(self, count: int, per_epoch: int):
        self.per_epoch = per_epoch
        self.seen = self.repeated = self.lost = 0
        self._epoch = 0
        self._this_epoch = np.zeros(count, dtype=bool)

    def add(self, epoch: int, requested: Sequence[int]) -> None:
        """Add the positions of a batch of all processes."""
        if epoch != self._epoch:
            self.lost += self.per_epoch - int(self._this_epoch.sum())
            self._epoch = epoch
            self._this_epoch[:] = False
        self.repeated += int(self._this_epoch[list(requested)].sum()) + len(requested) - len(set(requested))
        self._this_epoch[list(requested)] = True
        self.seen += len(requested)

    def state_dict(self) -> dict[str, Any]:
        """Counters, and the positions of this epoch as packed bits."""
        return {
            "seen": self.seen,
            "repeated": self.repeated,
            "lost": self.lost,
            "epoch": self._epoch,
            "this_epoch": np.packbits(self._this_epoch).tobytes().hex(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the counters."""
        self.seen, self.repeated, self.lost = state["seen"], state["repeated"], state["lost"]
        self._epoch = state["epoch"]
        bits = np.frombuffer(bytes.fromhex(state["this_epoch"]), dtype=np.uint8)
        self._this_epoch = np.unpackbits(bits, count=len(self._this_epoch)).astype(bool)


class Skipped:
    """Skipped samples of each split: those whose images could not be read, with the reason.

    Args:
        max_fraction: Fraction of a split that may be skipped.
    """

    def __init__(self, max_fraction: float):
        self.max_fraction = max_fraction
        self.why: dict[str, dict[int, list[str]]] = {}
        """Split -> position -> [place, reason]."""

    def add(self, split: str, size: int, why: Mapping[int, list[str]]) -> list[int]:
        """Add the samples that a batch skipped, {position: [place, reason]}.

        Returns:
            The positions that are new.

        Raises:
            DataError: More than `max_fraction` of the split's `size` samples; lists the first ten.
        """
        known = self.why.setdefault(split, {})
        new = [i for i in why if i not in known]
        known.update(why)
        if len(known) > self.max_fraction * size:
            listed = [f"  {': '.join(known[i])}" for i in list(known)[:10]]
            found = f"{len(known)} of {size:,} images can't be read"
            expected = f"at most data.max_bad_fraction={self.max_fraction} of them; `mmbert data check` lists all"
            raise DataError(split, found, expected, others=tuple(listed))
        return new

    def facts(self) -> dict[str, int]:
        """Counts for metrics.json: in total, by split, and by reason."""
        reasons = Counter(
            reason.split("(")[0].split(";")[0].strip() for why in self.why.values() for _, reason in why.values()
        )
        return {
            "run/samples_skipped": sum(len(why) for why in self.why.values()),
            **{f"run/samples_skipped/{split}": len(why) for split, why in self.why.items() if why},
            **{f"run/samples_skipped/{reason}": count for reason, count in sorted(reasons.items())},
        }
