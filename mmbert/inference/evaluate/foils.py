"""Score true captions against false ones with a saved model: `mmbert evaluate foils`."""

from collections.abc import Sequence
from pathlib import Path

import torch

from mmbert.data.processor import MMBertProcessor
from mmbert.data.readers.base import ImageFolder
from mmbert.data.readers.foils import Foil, read_foils
from mmbert.errors import UsageError, printable
from mmbert.evaluation.foils import choose_foil_scorer, foil_metrics
from mmbert.inference.cached_images import cached_images, image_loader
from mmbert.inference.evaluate.source import ModelSource, align_columns, check_sizes, ready_model, require_images


class FoilReport(dict[str, dict[str, float | None]]):
    """Metrics by category and "overall": count, accuracy, blank, shuffled (see `foil_metrics`); printed as a table."""

    def __repr__(self) -> str:
        """Format one row for each category, "overall" first."""
        columns = ["count", "accuracy", "blank", "shuffled"]
        table = [["category", *columns]]
        for category, row in sorted(self.items(), key=lambda item: item[0] != "overall"):
            fractions = ["-" if row[name] is None else f"{row[name]:.4f}" for name in columns[1:]]
            table.append([printable(category), f"{row['count']:,}", *fractions])
        return "\n".join(align_columns(table))


def evaluate_foils(
    model: ModelSource,
    foils: Sequence[Foil] | str | Path | Sequence[str | Path],
    images: str | Path | None = None,
    *,
    scorer: str = "auto",
    seed: int = 0,
    batch_size: int = 64,
    num_workers: int = 0,
    device: str | torch.device | None = None,
    processor: MMBertProcessor | None = None,
    cache: str | Path | None = None,
    precision: str | None = None,
) -> FoilReport:
    """Compute how often a true caption scores above a false one, by category.

    Args:
        model: As in `evaluate_retrieval`.
        foils: One or several files in SugarCrepe's format, or the records that `read_foils` returns.
        images: Folder of the images, for files.
        scorer: itm, itc, or "auto": itm if the model has it, else itc.
        seed: Seed of the shuffled images.
        batch_size: As in `evaluate_retrieval`, and so are `num_workers`, `device` and `processor`.
        num_workers: Processes that decode images.
        device: For a folder.
        processor: For an `MMBertForPreTraining`.
        cache: As in `evaluate_retrieval`, and so is `precision`.
        precision: By default the run's.

    Raises:
        UsageError: An option that is not allowed, or the model has not the objective of the scorer.
        DataError: Something is wrong with a file, an image or the saved weights.
    """
    check_sizes(batch_size, num_workers)
    with ready_model(model, processor, device, precision) as (ready, own_processor, computation):
        scorer = choose_foil_scorer(ready, scorer)
        given = [foils] if isinstance(foils, str | Path) else [*foils]
        records = [record for record in given if isinstance(record, Foil)]
        files = [Path(file) for file in given if not isinstance(file, Foil)]
        if files:
            records += read_foils(files, ImageFolder(require_images(images)))
        if not records:
            raise UsageError("foils is empty; give at least one file or record.")
        every_image = [record.image for record in records]
        with cached_images(
            ready.mmbert, own_processor, cache, every_image, computation, batch_size=batch_size, num_workers=num_workers
        ) as opened:
            return FoilReport(
                foil_metrics(
                    ready,
                    own_processor,
                    records,
                    scorer=scorer,
                    seed=seed,
                    batch_size=batch_size,
                    num_workers=num_workers,
                    load=image_loader(opened, own_processor),
                )
            )
