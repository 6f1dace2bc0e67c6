"""Coverage of an evaluation: the number of items that it saw and that the split has."""

import logging
from typing import NamedTuple

from mmbert.runtime.distributed import rank

log = logging.getLogger("mmbert")


class Coverage(NamedTuple):
    """Number of items that the metrics are over; images that can't be read and were skipped count as seen."""

    num_seen: int
    num_total: int

    @property
    def fraction(self) -> float:
        """Seen items as a fraction of the split."""
        return self.num_seen / self.num_total if self.num_total else 1.0


def log_partial_coverage(coverage: Coverage, split: str) -> None:
    """Log a warning if the metrics of a split are over a part of it."""
    if coverage.num_seen < coverage.num_total and rank() == 0:
        log.warning(
            "%s: metrics are over %s of %s items (%.1f %%), as trainer.limit_%s_batches stops the evaluation early",
            split, f"{coverage.num_seen:,}", f"{coverage.num_total:,}", 100 * coverage.fraction,
            "val" if split == "val" else "test",
        )  # fmt: skip
