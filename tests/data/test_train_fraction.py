"""A part of the training images: nested samples that follow from the seed."""

from pathlib import Path

import pytest
from tiny import tiny_examples, tiny_processor

from mmbert.data import datamodule
from mmbert.data.datamodule import PairsDataModule
from mmbert.data.options import DataOptions
from mmbert.errors import UsageError


def used(folder: Path, monkeypatch: pytest.MonkeyPatch, fraction: float, seed: int = 0) -> list[str]:
    """Which of 20 training images are used."""
    examples = tiny_examples(folder, [("a cat",)] * 20)
    monkeypatch.setattr(datamodule, "read_examples", lambda *_, **__: {"train": examples, "test": examples})
    options = DataOptions(annotations="a", images="b", batch_size=1, train_fraction=fraction)
    module = PairsDataModule(options, tiny_processor(), seed=seed)
    assert module.sizes()["test"] == 20
    return [example.image.name for example in module.train_samples.examples]


def test_smaller_samples_are_part_of_larger_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {f: used(tmp_path, monkeypatch, f) for f in (0.01, 0.1, 0.3, 1.0)}
    assert {f: len(names) for f, names in found.items()} == {0.01: 1, 0.1: 2, 0.3: 6, 1.0: 20}
    assert set(found[0.01]) < set(found[0.1]) < set(found[0.3]) < set(found[1.0])
    assert found[0.3] == [name for name in found[1.0] if name in found[0.3]], "in the order of the file"
    assert found[0.3] == used(tmp_path, monkeypatch, 0.3) != used(tmp_path, monkeypatch, 0.3, seed=1)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5])
def test_fraction_is_above_0_up_to_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fraction: float) -> None:
    with pytest.raises(UsageError, match=r"data.train_fraction=.*: a fraction above 0, up to 1"):
        used(tmp_path, monkeypatch, fraction)


def test_evaluation_may_have_a_seed_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = tiny_examples(tmp_path, [("a red cat on the street", "two dogs")] * 8)
    monkeypatch.setattr(datamodule, "read_examples", lambda *_, **__: {"train": examples, "val": examples})

    def shown(seed: int, eval_seed: int | None) -> tuple[str, str]:
        """What training and validation show, as text."""
        options = DataOptions(annotations="a", images="b", batch_size=1, eval_seed=eval_seed, mlm_probability=0.5)
        module = PairsDataModule(options, tiny_processor(), seed=seed)
        assert module.val_samples is not None
        return tuple(str([p[i].mlm_input_ids for i in range(8)]) for p in (module.train_samples, module.val_samples))  # pyright: ignore

    assert shown(1, 0)[1] == shown(2, 0)[1] == shown(0, None)[1] != shown(1, None)[1]
    assert shown(1, 0)[0] == shown(1, None)[0] != shown(2, 0)[0]
