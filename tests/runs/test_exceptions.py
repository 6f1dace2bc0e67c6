"""An error anywhere in training ends the run with its place, costs no checkpoint, and the resumed run is the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import failed, fit, results, trace
from lightning.pytorch.loggers import CSVLogger

from mmbert.data.pairs import Collate
from mmbert.data.processor import MMBertProcessor
from mmbert.model.modeling import MMBertForPreTraining
from mmbert.training.checkpoints import is_complete, latest_complete_checkpoint, step_of


def raising(original: Callable[..., Any], *, after: int, in_training: Callable[..., bool]) -> Callable[..., Any]:
    """`original` that raises in a call, counted from 1 over the calls of training."""
    seen = [0]

    def wrapped(*arguments: Any, **options: Any) -> Any:
        seen[0] += in_training(*arguments)
        if seen[0] == after:
            raise ZeroDivisionError("injected")
        return original(*arguments, **options)

    return wrapped


def backward_fails(original: Callable[..., Any]) -> Callable[..., Any]:
    """A model whose seventh loss has a gradient that raises."""
    seen = [0]

    def forward(model: MMBertForPreTraining, *arguments: Any, **options: Any) -> Any:
        output = original(model, *arguments, **options)
        seen[0] += model.training
        if seen[0] == 7:
            output.loss.register_hook(raising(lambda gradient: gradient, after=1, in_training=lambda _: True))
        return output

    return forward


def always(*_: Any) -> bool:
    return True


# Where it strikes -> (owner, name, what takes its place, what the message says). Twelve steps of 16 samples.
PLACES: dict[str, tuple[type, str, Callable[..., Any], str]] = {
    "data set": (
        MMBertProcessor, "load",
        lambda f: staticmethod(raising(f, after=100, in_training=always)),
        "mmbert: in sample ",
    ),
    "collate": (
        Collate, "__call__",
        lambda f: raising(f, after=7, in_training=lambda _, samples: samples[0].wrong_pixel_values is None),
        "optimizer steps done, in or after batch ",
    ),
    "forward": (
        MMBertForPreTraining, "forward",
        lambda f: raising(f, after=7, in_training=lambda model, *_: model.training),
        "6 optimizer steps done, in or after batch 3 of epoch 1, samples ",
    ),
    "backward": (MMBertForPreTraining, "forward", backward_fails, "6 optimizer steps done, in or after batch 3 of"),
    "optimizer step": (
        torch.optim.AdamW, "step", lambda f: raising(f, after=7, in_training=always), "6 optimizer steps done"
    ),
    "logger": (
        CSVLogger, "log_metrics",
        lambda f: raising(f, after=9, in_training=always),
        "optimizer steps done, in or after batch ",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run without an error."""
    root = tmp_path_factory.mktemp("whole")
    fit(tiny, root, "--name=run")
    return root


@pytest.mark.parametrize("place", PLACES)
def test_error_ends_the_run_with_its_place_and_the_resumed_run_is_bit_identical(
    place: str, whole: Path, tiny: list[str], tmp_path: Path
) -> None:
    owner, name, replace, said = PLACES[place]

    def run() -> None:
        setattr(owner, name, replace(getattr(owner, name)))
        fit(tiny, tmp_path, "--name=run")

    code, errors = failed(run, tmp_path / "stderr.txt")
    assert code == 1
    assert "ZeroDivisionError: injected" in errors
    assert said in errors
    newest = latest_complete_checkpoint(tmp_path / "run/checkpoints")
    assert newest is not None and 4 <= step_of(newest) <= 8
    assert all(is_complete(path) for path in (tmp_path / "run/checkpoints").glob("*.ckpt"))
    fit(tiny, tmp_path, "--name=run", "--resume=auto")
    assert trace(tmp_path) == trace(whole)
    assert results(tmp_path) == results(whole)


def test_error_in_a_loader_process_names_the_sample(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = staticmethod(raising(MMBertProcessor.load, after=20, in_training=always))
    monkeypatch.setattr(MMBertProcessor, "load", load)
    code, errors = failed(lambda: fit(tiny, tmp_path, "--data.num_workers=1"), tmp_path / "stderr.txt")
    assert code == 1
    assert "captions_train.json:images[" in errors and " of epoch 0: " in errors
