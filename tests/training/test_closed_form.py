"""Start of ITC's projections from their closed form: which pairs, which weights, resumed runs, two processes."""

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processes import in_processes
from tiny import tiny_config, tiny_processor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mmbert.data.datamodule import PairsDataModule
from mmbert.data.examples import Example
from mmbert.data.options import DataOptions
from mmbert.data.samples import View
from mmbert.errors import UsageError
from mmbert.evaluation.closed_form import MAX_PAIRS, PooledFeatures, choose_pairs, solve_closed_form
from mmbert.model.initialization import build_model
from mmbert.model.modeling import MMBertForPreTraining
from mmbert.model.objectives.closed_form import LinearMaps
from mmbert.model.objectives.pooling import Pooling
from mmbert.model.options import ModelOptions
from mmbert.model.tokens import Tokens
from mmbert.training.closed_form import recall_at_1, refit_closed_form, start_from_closed_form, wants_closed_form
from mmbert.training.sharding import copy_full, full_tensor

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
ITC = {"init": "closed_form", "embedding_size": 4, "pool": "first_and_mean"}


def model_with(itc: dict, **overrides: object) -> MMBertForPreTraining:
    torch.manual_seed(0)
    return MMBertForPreTraining(tiny_config(objectives={"itc": itc}, initializer_range=0.1, **overrides)).train()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PairsDataModule:
    """Plain images of three colors in 12 shades, each with two captions that name the color."""
    folder = tmp_path_factory.mktemp("colors")
    lines = []
    for split, count in (("train", 12), ("val", 3)):
        for i in range(count):
            name = f"{split}{i}.png"
            color, value = [*COLORS.items()][i % 3]
            shade = np.array(value) * (12 - i // 3) // 12
            Image.fromarray(np.tile(shade.astype(np.uint8), (16, 16, 1))).save(folder / name)
            captions = [f"a {color} cat", f"the {color} bird and a car"]
            lines.append(f'{{"image": "{name}", "caption": ["{captions[0]}", "{captions[1]}"], "split": "{split}"}}')
    (folder / "captions.jsonl").write_text("\n".join(lines))
    options = DataOptions(
        format="jsonl", annotations=str(folder / "captions.jsonl"), images=str(folder), split_key="split",
        batch_size=4, num_workers=0,
    )  # fmt: skip
    return PairsDataModule(options, tiny_processor(), seed=0)


def start(model: MMBertForPreTraining, data: PairsDataModule) -> dict[str, torch.Tensor]:
    start_from_closed_form(model, data, val_images=3, seed=0)
    return {name: x.detach().clone() for name, x in model.objectives["itc"].named_parameters()}


@pytest.mark.parametrize("pooling", [{}, {"pool": {"text": "mean", "image": "first_and_mean"}, "normalize": True}])
def test_closed_form_ranks_validation_images(
    pooling: dict, data: PairsDataModule, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_with(ITC | pooling)
    assert wants_closed_form(model)
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    with caplog.at_level(logging.INFO, "mmbert"):
        start(model, data)
    changed = {name for name, x in model.named_parameters() if not torch.equal(x, before[name])}
    sides = {f"objectives.itc.{side}_projection.{part}" for side in ("text", "image") for part in ("weight", "bias")}
    assert changed == sides
    assert model.training, "the mode is restored"
    line = next(r.getMessage() for r in caplog.records if "closed_form" in r.getMessage())
    assert "4 directions from 24 training pairs in" in line
    assert "1.000 after, text to image" in line and line.endswith("1.000 after")


def test_near_cosines_do_not_tie_under_autocast() -> None:
    """Vectors at angles of 0.02: in bf16 all cosines are 1, in fp32 each pair is nearest to itself."""
    angles = torch.arange(4) * 0.02
    vectors = torch.stack([angles.cos(), angles.sin()], dim=1)
    maps = LinearMaps(*(torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)) * 2)
    features = PooledFeatures(vectors, vectors, torch.ones(4, dtype=torch.bool))
    val: Any = SimpleNamespace(text_keys=[(i,) for i in range(4)], image_keys=[*range(4)])
    with torch.autocast("cpu", torch.bfloat16):
        assert recall_at_1(maps, features, val, [*range(4)]) == (1, 1)


def test_same_weights_in_two_processes_and_in_every_run(data: PairsDataModule, tmp_path: Path) -> None:
    alone = start(model_with(ITC), data)
    again = start(model_with(ITC), data)
    assert all(torch.equal(alone[name], again[name]) for name in alone)

    def work(rank: int) -> dict[str, torch.Tensor]:
        return start(model_with(ITC), data)

    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
    (of_one,) = in_processes(1, work, tmp_path / "one")
    for found in in_processes(2, work, tmp_path / "two"):
        assert all(torch.equal(of_one[name], found[name]) for name in of_one)


def test_evaluation_reads_the_refit_and_training_does_not(data: PairsDataModule) -> None:
    model = model_with({**ITC, "refit": True})
    start_from_closed_form(model, data, val_images=0, seed=0)
    itc, states = model.objectives["itc"], torch.randn(2, 5, model.config.hidden_size)
    tokens = Tokens(states, torch.ones(2, 5, dtype=torch.bool))
    trained = itc.train().embed_text(tokens)  # pyright: ignore
    torch.testing.assert_close(itc.eval().embed_text(tokens), trained)  # pyright: ignore - the start is both
    with torch.no_grad():
        for parameter in model.mmbert.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.eval()
    refit_closed_form(model, data, seed=0)
    assert torch.equal(itc.train().embed_text(tokens), trained)  # pyright: ignore
    found = itc.eval().embed_text(tokens)  # pyright: ignore
    again = model_with({**ITC, "refit": True})
    again.load_state_dict(model.state_dict())
    start_from_closed_form(again, data, val_images=0, seed=0)  # solved from the same encoders
    torch.testing.assert_close(again.objectives["itc"].train().embed_text(tokens), found)  # pyright: ignore
    assert not torch.allclose(found, trained, atol=1e-2)


def test_refit_needs_the_closed_form() -> None:
    with pytest.raises(UsageError, match="refit solves the closed form again, but init='random': add init: closed_fo"):
        model_with({"refit": True})
    with pytest.raises(UsageError, match=r"objectives\.itc\.refit='yes'; allowed are true, false"):
        model_with({**ITC, "refit": "yes"})


def test_only_new_projections_are_replaced(tmp_path: Path) -> None:
    assert not wants_closed_form(model_with({"embedding_size": 4}))
    assert not wants_closed_form(MMBertForPreTraining(tiny_config(objectives={"mlm": 1.0})))
    model_with(ITC).save_pretrained(tmp_path)
    assert not wants_closed_form(build_model(ModelOptions(pretrained=str(tmp_path), objectives={"itc": ITC})))
    wider = {**ITC, "embedding_size": 8}
    assert wants_closed_form(build_model(ModelOptions(pretrained=str(tmp_path), objectives={"itc": wider})))


def test_every_cached_view_is_a_pair_with_each_caption(data: PairsDataModule) -> None:
    class Views:
        """Encoder cache whose views are shades of the image."""

        def __init__(self) -> None:
            self.read: list[tuple[str, View | None]] = []

        def hidden_states(self, file: Path, view: View | None = None) -> torch.Tensor:
            self.read.append((file.name, view))
            pixels = data.processor.pixel_values(file)
            return pixels if view is None else (pixels // (1 + view.number))

    options = replace(data.options, crop=0.5, flip=True)
    augmented = PairsDataModule(options, data.processor, seed=0)
    cache = augmented.train_samples.cache = Views()
    augmented.train_samples.views = 2
    found, plain = start(model_with(ITC), augmented), start(model_with(ITC), data)
    files = [file for file, _ in augmented.train_samples.cache_requests()]
    assert len(files) == 24 and sorted(cache.read, key=str) == sorted(
        ((file.name, view) for file, view in augmented.train_samples.cache_requests()), key=str
    )
    assert not torch.equal(found["image_projection.weight"], plain["image_projection.weight"])
    augmented.train_samples.views = 1  # whose shade is that of the file
    assert torch.equal(start(model_with(ITC), augmented)["image_projection.weight"], plain["image_projection.weight"])


@pytest.mark.parametrize("ridge", [0, -1.0, float("inf"), "a", True])
def test_a_ridge_that_is_not_positive_is_refused(ridge: object) -> None:
    with pytest.raises(UsageError, match=r"objectives\.itc\.ridge=.*: must be a number above 0"):
        model_with({**ITC, "ridge": ridge})


def test_pairs_are_a_fixed_sample_of_all_captions() -> None:
    examples = [Example(Path(f"{i}.png"), ("a", "b"), str(i), "train", "") for i in range(10)]
    assert choose_pairs(examples, None, seed=0) == [(i, j) for i in range(10) for j in range(2)]
    chosen = choose_pairs(examples, 7, seed=0)
    assert len(set(chosen)) == 7 and chosen == sorted(chosen) == choose_pairs(examples, 7, seed=0)
    assert chosen != choose_pairs(examples, 7, seed=1)
    many = [Example(Path("0.png"), ("a",) * (MAX_PAIRS + 1), "0", "train", "")]
    assert len(choose_pairs(many, None, seed=0)) == MAX_PAIRS


def test_more_pairs_than_there_are_is_an_error(data: PairsDataModule) -> None:
    message = "init_samples=25: the training data has 24 pairs; choose at most as many, or null for all"
    with pytest.raises(UsageError, match=message):
        start(model_with({**ITC, "init_samples": 25}), data)


def test_fewer_pairs_than_directions_is_an_error(data: PairsDataModule) -> None:
    with pytest.raises(UsageError, match="can't find as many directions in 3 training pairs; choose at most 3"):
        start(model_with({**ITC, "init_samples": 3}), data)


def test_an_encoder_without_layers_is_an_error(data: PairsDataModule) -> None:
    config = tiny_config(fusion="early", text_layers=0, objectives={"itm": 1.0})
    message = (
        "compares the outputs of the two encoders, but text_layers=0 and image_layers=1: both need at least 1 layer"
    )
    with pytest.raises(UsageError, match=message):
        solve_closed_form(
            MMBertForPreTraining(config), data.processor, data.examples["train"], [(0, 0)],
            pooling=Pooling("mean", "mean"), directions=1, ridge=0.3,
        )  # fmt: skip


def test_sharded_projections_get_the_full_weights(tmp_path: Path) -> None:
    value = torch.arange(12.0).view(6, 2)

    def work(rank: int) -> torch.Tensor:
        linear = torch.nn.Linear(2, 6)
        fully_shard(linear, mesh=init_device_mesh("cpu", (2,)))
        with torch.no_grad():
            copy_full(linear.weight, value.double())
        assert len(linear.weight.to_local()) == 3  # pyright: ignore[reportCallIssue]
        return full_tensor(linear.weight.detach())

    assert all(torch.equal(found, value) for found in in_processes(2, work, tmp_path))
