"""The images and captions that `mmbert evaluate retrieval` ranks, and those it learns from."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmbert.data.examples import Example
from mmbert.errors import UsageError
from mmbert.evaluation.retrieval import Candidates
from mmbert.inference.evaluate.source import read_split, split_name
from mmbert.runtime.randomness import permutation

BASELINES = ("closed_form",)
"""Allowed values of `baseline` in `evaluate_retrieval`."""
MAX_VAL_IMAGES = 500
"""Validation images, at most, on which itc_weight is chosen."""


@dataclass(frozen=True, slots=True)
class RetrievalFiles:
    """The file to rank, and how this file and others are read."""

    annotations: str | Path | None
    images: str | Path | None
    format: str
    keys: dict[str, Any]

    @property
    def has_splits(self) -> bool:
        """Whether a file holds several splits."""
        return self.format == "karpathy" or "split_key" in self.keys

    def read(self, file: str | Path, splits: str | Sequence[str]) -> list[Example]:
        """The examples of one or several splits, in order."""
        return [e for split in names_of(splits) for e in read_split(file, self.images, self.format, split, self.keys)]

    def read_other(
        self, kind: str, content: str, file: str | Path | None, splits: str | Sequence[str], ranked_split: str
    ) -> list[Example]:
        """Read examples that must not be the ranked ones.

        Args:
            kind: Beginning of the options that name them: train or val.
            content: What they are, for messages.
            file: Annotation file; None: the ranked one.
            splits: Their split or splits.
            ranked_split: Split that is ranked.

        Raises:
            UsageError: The ranked images themselves, or several splits of a file without splits.
        """
        names, file = names_of(splits), file or self.annotations
        if file is None:
            raise UsageError(f"{kind}_annotations is missing: give the file with {content}.")
        if len(names) > 1 and not self.has_splits:
            how = ", or give split_key, the field with the split" if self.format in ("jsonl", "csv") else ""
            raise UsageError(
                f"{kind}_split={', '.join(names)}: a file of format {self.format} is one split; leave {kind}_split "
                f"out{how}."
            )
        if self.annotations is not None and Path(file).resolve() == Path(self.annotations).resolve():
            if not self.has_splits:
                raise UsageError(
                    f"{kind}_annotations: '{file}' is the file to rank, and one split; give another file with "
                    f"{content}."
                )
            if ranked_split in names:
                raise UsageError(
                    f"{kind}_split={', '.join(names)}: '{ranked_split}' of '{file}' is the split to rank; give "
                    f"{kind}_split, another split with {content}, or {kind}_annotations, another file."
                )
        return self.read(file, names)


def check_unused(kind: str, annotations: str | Path | None, splits: str | Sequence[str], needed: str) -> None:
    """Raise where a file or split is given that nothing reads.

    Args:
        kind: Beginning of the options, train or val; also their default split.
        annotations: Value of the first option.
        splits: Value of the second one.
        needed: What would read them.
    """
    given = f"{kind}_annotations='{annotations}'" if annotations is not None else ""
    if not given and names_of(splits) != [kind]:
        given = f"{kind}_split={', '.join(names_of(splits))}"
    if given:
        raise UsageError(f"{given}: only {needed} reads it; give that too, or leave {given.partition('=')[0]} out.")


def names_of(value: str | Sequence[str]) -> list[str]:
    """One name or several as a list."""
    return [value] if isinstance(value, str) else [*value]


def ranked_candidates(
    files: RetrievalFiles, split: str | None, captions: int | None, first_images: int | None
) -> tuple[Candidates, str]:
    """The images and captions to rank, and the name of their split."""
    assert files.annotations is not None
    split = split_name(split, has_splits=files.has_splits, format=files.format)
    examples = files.read(files.annotations, split)
    if first_images is not None and not 1 <= first_images <= len(examples):
        raise UsageError(f"first_images={first_images}: allowed are 1 to {len(examples)}, the images of split {split}.")
    kept = [replace(e, captions=e.captions[:captions]) for e in examples[:first_images]]
    return Candidates.from_examples(kept), split


def training_examples(
    files: RetrievalFiles,
    baseline: str | None,
    annotations: str | Path | None,
    splits: str | Sequence[str],
    ranked_split: str,
) -> list[Example]:
    """The training pairs of the baseline; none without one."""
    if baseline is None:
        check_unused("train", annotations, splits, "baseline")
        return []
    if baseline not in BASELINES:
        raise UsageError(f"baseline='{baseline}'; allowed are {', '.join(BASELINES)}.")
    return files.read_other("train", "the baseline's training pairs", annotations, splits, ranked_split)


def validation_candidates(
    files: RetrievalFiles, annotations: str | Path | None, splits: str | Sequence[str], ranked_split: str
) -> Candidates:
    """At most `MAX_VAL_IMAGES` images of validation, on which the weight is chosen."""
    content = "the validation images of itc_weight='auto'"
    examples = files.read_other("val", content, annotations, splits, ranked_split)
    chosen = permutation(0, "choice of itc_weight", 0, len(examples))[:MAX_VAL_IMAGES]
    return Candidates.from_examples([examples[i] for i in sorted(chosen.tolist())])
