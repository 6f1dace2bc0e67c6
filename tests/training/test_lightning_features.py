"""Features of Lightning with a `TrainingModule` and in runs: one test for each row of docs/lightning.md."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.tuner.tuning import Tuner
from PIL import Image
from tiny import tiny_config, tiny_processor
from torch.utils.data import DataLoader

import mmbert
from mmbert.data.datamodule import PairsDataModule
from mmbert.data.labelled_datamodule import LabelledDataModule, read_task_data
from mmbert.data.options import DataOptions
from mmbert.errors import UsageError
from mmbert.evaluation.options import EvaluationOptions
from mmbert.model.modeling import MMBertForPreTraining, MMBertForTask
from mmbert.runtime.terminal import quiet_lightning
from mmbert.training.lightning_features import validate_callbacks
from mmbert.training.module import TrainingModule
from mmbert.training.options import OptimOptions

OPTIONS: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False, "num_sanity_val_steps": 0,
}  # fmt: skip
SIZES = {"train": 12, "val": 4, "test": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of noise with captions of different lengths, and the tokenizer."""
    folder = tmp_path_factory.mktemp("pairs")
    rng, lines = np.random.default_rng(0), []
    for split, count in SIZES.items():
        for i in range(count):
            name = f"{split}{i}.png"
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / name)
            color, animal = ("red", "blue", "green")[i % 3], ("cat", "dog", "bird", "car")[i % 4]
            caption = f"a {color} {animal}" + " and a tree" * (i % 2)
            lines.append(f'{{"image": "{name}", "caption": "{caption}", "split": "{split}"}}')
    (folder / "captions.jsonl").write_text("\n".join(lines))
    tiny_processor().save_pretrained(folder / "tokenizer")
    return folder


def data_of(folder: Path, **options: Any) -> PairsDataModule:
    settings: dict[str, Any] = {"batch_size": 4, "eval_batch_size": 4, "num_workers": 0, **options}
    options_ = DataOptions(
        format="jsonl", annotations=str(folder / "captions.jsonl"), images=str(folder), split_key="split", **settings
    )
    return PairsDataModule(options_, tiny_processor(), seed=0)


def module_of(data: PairsDataModule, seed: int = 0, **optim: Any) -> TrainingModule:
    torch.manual_seed(seed)
    config = tiny_config(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return TrainingModule(
        MMBertForPreTraining(config), data, optim=OptimOptions(**optim), evaluation=EvaluationOptions(), seed=0
    )


def weights(module: TrainingModule) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def run_options(folder: Path, out: Path, **trainer: Any) -> dict[str, Any]:
    """Sections of `mmbert.fit` for one epoch of 3 steps."""
    config = tiny_config()
    names = (
        "fusion", "text_layers", "image_layers", "fusion_layers", "hidden_size", "num_attention_heads",
        "intermediate_size", "image_model", "image_size", "patch_size", "image_hidden_size",
        "image_num_attention_heads", "max_position_embeddings", "objectives",
    )  # fmt: skip
    return {
        "model": {name: getattr(config, name) for name in names},
        "data": {
            "format": "jsonl", "annotations": str(folder / "captions.jsonl"), "images": str(folder),
            "split_key": "split", "tokenizer": str(folder / "tokenizer"), "batch_size": 4, "num_workers": 0,
            "max_text_length": 16,
        },
        "trainer": {
            "default_root_dir": str(out), "max_epochs": 1, "accelerator": "cpu", "precision": "32-true",
            "enable_progress_bar": False, **trainer,
        },
        "threads": 1,
    }  # fmt: skip


def test_load_from_checkpoint(folder: Path, tmp_path: Path) -> None:
    data = data_of(folder)
    module = module_of(data, lr=0.01)
    checkpoint = ModelCheckpoint(tmp_path, filename="mine")
    trainer = L.Trainer(**{**OPTIONS, "enable_checkpointing": True}, max_steps=2, callbacks=[checkpoint])
    trainer.fit(module, datamodule=data)
    other = module_of(data, seed=1).model
    loaded = TrainingModule.load_from_checkpoint(tmp_path / "mine.ckpt", model=other, data=data)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in module.state_dict().items())
    assert loaded.model is other and loaded.optim_options == OptimOptions(lr=0.01, betas=[0.9, 0.98])  # pyright: ignore
    assert loaded.evaluation_options == EvaluationOptions() and loaded.seed == 0
    with pytest.raises(UsageError, match=r"load_from_checkpoint needs model and data, .* mmbert\.load"):
        TrainingModule.load_from_checkpoint(tmp_path / "mine.ckpt")


def test_predict_and_forward(folder: Path) -> None:
    data = data_of(folder)
    module = module_of(data)
    found: Any = L.Trainer(**OPTIONS).predict(module, datamodule=data)
    assert [tuple(batch["match_scores"].shape) for batch in found] == [(4,), (2,)]  # 6 test samples
    order = torch.cat([batch["index"] for batch in found])
    assert order.tolist() == [*range(6)], "in the order of the file"
    processor, examples = tiny_processor(), data.test_samples["test"].examples
    pairs = [examples[int(i)] for i in order]
    inputs = processor(text=[e.captions[0] for e in pairs], images=[Image.open(e.image) for e in pairs])
    with torch.no_grad():
        output = module(**inputs)
    scores = torch.cat([batch["match_scores"] for batch in found])
    assert torch.allclose(scores, output.itm_logits[:, 1] - output.itm_logits[:, 0], atol=1e-5)
    text, image = (torch.cat([batch[f"{name}_embeddings"] for batch in found]) for name in ("text", "image"))
    scale: Any = (output.logits_per_text / (text @ image.T)).mean()
    assert torch.allclose(scale * text @ image.T, output.logits_per_text, atol=1e-4)
    without = MMBertForPreTraining(tiny_config(objectives={"mlm": 1.0}))
    alone = TrainingModule(without, data, optim=OptimOptions(), evaluation=EvaluationOptions(), seed=0)
    with pytest.raises(UsageError, match="predict needs a task, or the objective itm or itc"):
        L.Trainer(**OPTIONS).predict(alone, datamodule=data)


def test_predict_and_load_a_fine_tuned_model(folder: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    rows = [{**line, "text": line["caption"], "label": i % 2} for i, line in enumerate(lines)]
    (tmp_path / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = DataOptions(
        format="jsonl", annotations=str(tmp_path / "labels.jsonl"), images=str(folder), split_key="split",
        batch_size=4, eval_batch_size=4, num_workers=0,
    )  # fmt: skip
    examples, labels = read_task_data(options, "decision")
    data = LabelledDataModule(options, examples, labels, tiny_processor(), task="decision", seed=0)
    model = MMBertForTask(tiny_config(task="decision", labels=labels, num_images=1))
    module = TrainingModule(model, data, optim=OptimOptions(), evaluation=EvaluationOptions(), seed=0)
    trainer = L.Trainer(**OPTIONS, max_steps=1)
    trainer.fit(module, datamodule=data)
    found: Any = trainer.predict(module, datamodule=data)
    assert torch.cat([batch["index"] for batch in found]).tolist() == [*range(6)]
    assert torch.cat([batch["logits"] for batch in found]).shape == (6, 2)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = TrainingModule.load_from_checkpoint(tmp_path / "a.ckpt", model=model, data=data)
    assert loaded.hparams["model"]["task"] == "decision"


class StubLogger(DummyLogger):
    """Stands for `WandbLogger`: records hyperparameters."""

    def __init__(self) -> None:
        super().__init__()
        self.received: list[dict[str, Any]] = []

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        self.received.append(dict(params))


def test_hyperparameters_of_a_module(folder: Path) -> None:
    data, logger = data_of(folder), StubLogger()
    module = module_of(data, lr=0.01)
    L.Trainer(**{**OPTIONS, "logger": logger}, max_steps=1).fit(module, datamodule=data)
    assert logger.received == [dict(module.hparams)]
    assert module.hparams["optim"]["lr"] == 0.01 and module.hparams["model"]["fusion"] == "hybrid"
    assert module.hparams["data"]["batch_size"] == 4 and module.hparams["seed"] == 0


def test_a_logger_of_a_run_receives_its_configuration(folder: Path, tmp_path: Path) -> None:
    logger = StubLogger()
    run = mmbert.fit(**run_options(folder, tmp_path, logger=logger), name="run", seed=3)
    received = logger.received[0]
    assert received["trainer"]["max_epochs"] == 1 and received["name"] == "run" and received["seed"] == 3
    assert received["model"]["text_pretrained"] is None and received["model"]["vocab_size"] == 32
    assert received["data"]["images"] == str(folder) and received["checkpoint"]["monitor"] == "val/itm_auroc"
    assert not (run.folder / "hparams.yaml").exists(), "config.yaml has the options"


def test_tuner_finds_a_learning_rate(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = data_of(folder)
    module = module_of(data, head_lr_factor=2.0)
    before = weights(module)
    trainer = L.Trainer(**OPTIONS, default_root_dir=tmp_path, max_epochs=9, limit_val_batches=0)
    finder: Any = Tuner(trainer).lr_find(module, datamodule=data, num_training=20, min_lr=1e-5, max_lr=0.1)
    assert len(finder.results["lr"]) >= 19 and module.lr == module.hparams["optim"]["lr"] != 1e-4
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in before.items()), "weights are restored"
    assert "without optim.head_lr_factor=2.0" in caplog.text
    trainer.fit(module, datamodule=data)
    peaks = {group["name"]: group["initial_lr"] for group in trainer.optimizers[0].param_groups}
    assert peaks["text/0"] == module.lr and peaks["head/0"] == 2 * module.lr


def test_tuner_finds_a_batch_size(folder: Path, tmp_path: Path) -> None:
    data = data_of(folder, batch_size=2)
    module = module_of(data)
    trainer = L.Trainer(**OPTIONS, default_root_dir=tmp_path, max_epochs=1, limit_val_batches=0)
    found = Tuner(trainer).scale_batch_size(module, datamodule=data, steps_per_trial=1, init_val=2)
    assert found == data.options.batch_size == module.hparams["data"]["batch_size"] == 12, "12 training samples"
    trainer = L.Trainer(**OPTIONS, max_epochs=2, limit_val_batches=0)
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 2 == module.total_steps()


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (LearningRateFinder, r"LearningRateFinder would search after .* call Tuner\(trainer\)\.lr_find"),
        (BatchSizeFinder, r"BatchSizeFinder would search after .* Tuner\(trainer\)\.scale_batch_size"),
        (lambda: GradientAccumulationScheduler({0: 2}), "use accumulate_grad_batches"),
    ],
)
def test_callback_that_the_schedule_can_not_follow_is_refused(
    folder: Path, callback: Callable[[], Any], message: str
) -> None:
    data = data_of(folder)
    with pytest.raises(UsageError, match=message):
        L.Trainer(**OPTIONS, max_steps=1, callbacks=[callback()]).fit(module_of(data), datamodule=data)


def test_learning_rate_search_is_refused_with_muon(folder: Path, tmp_path: Path) -> None:
    data = data_of(folder)
    trainer = L.Trainer(**OPTIONS, default_root_dir=tmp_path, max_epochs=1)
    with pytest.raises(UsageError, match=r"lr_find tries one learning rate .* optim\.name=muon has two"):
        Tuner(trainer).lr_find(module_of(data, name="muon"), datamodule=data)


def changed_parts(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Parts of the model, backbone or heads, of which a weight differs."""
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    return {"backbone" if name.startswith("model.mmbert.") else "heads" for name in changed}


def test_backbone_finetuning(folder: Path) -> None:
    data = data_of(folder)
    module = module_of(data, lr=0.01)
    before, seen = weights(module), []

    class Look(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
            seen.append((changed_parts(before, weights(module)), rates))

    callbacks = [BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=1e-3), Look()]
    L.Trainer(**OPTIONS, max_epochs=3, callbacks=callbacks, limit_val_batches=0).fit(module, datamodule=data)
    assert [parts for parts, _ in seen] == [{"heads"}, {"heads", "backbone"}, {"heads", "backbone"}]
    assert len(seen[1][1]) == len(seen[0][1]) + 1 and seen[1][1][-1] == 1e-3, "the group keeps the callback's rate"


class UnfreezeFusion(BaseFinetuning):
    """Freezes the fusion for the first epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.model.mmbert.fusion)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.model.mmbert.fusion, optimizer, lr=1e-3)


def test_finetuning_callback_of_a_run_that_resumes(folder: Path, tmp_path: Path) -> None:
    """Weights that were frozen at the best checkpoint are in it, and a resumed run trains what was unfrozen."""

    def trained(**more: Any) -> mmbert.RunResult:
        options = run_options(folder, tmp_path, callbacks=[UnfreezeFusion()])
        options["trainer"] |= {"max_epochs": 3}
        return mmbert.fit(**options, checkpoint={"every_n_steps": 5}, name="run", **more)

    run = trained()
    checkpoint = torch.load(run.folder / "checkpoints/step=5.ckpt", weights_only=True)
    assert any(name.startswith("model.mmbert.fusion.") for name in checkpoint["state_dict"])
    trace = (run.folder / "trace.csv").read_text()
    trained(resume=run.folder / "checkpoints/step=5.ckpt")
    assert (run.folder / "trace.csv").read_text() == trace


def test_finetuning_callback_with_a_cached_encoder_is_refused(folder: Path, tmp_path: Path) -> None:
    options = run_options(folder, tmp_path, callbacks=[UnfreezeFusion()])
    with pytest.raises(UsageError, match=r"UnfreezeFusion could unfreeze the image encoder, .* set data\.cache=null"):
        mmbert.fit(**options, optim={"freeze_image": "all"})


def test_own_train_dataloaders(folder: Path) -> None:
    """Images of uint8 are normalized once, whoever loads them, and the schedule counts the loader's batches."""
    data = data_of(folder)
    seen: dict[str, list[torch.Tensor]] = {"own": [], "data module": []}
    loaders: dict[str, dict[str, Any]] = {
        "own": {"train_dataloaders": DataLoader(data.train_samples, 3, collate_fn=data.collate)},
        "data module": {"datamodule": data},
    }
    for name, keywords in loaders.items():
        module = module_of(data)
        module.model.register_forward_pre_hook(
            lambda _, __, inputs, name=name: seen[name].append(inputs["pixel_values"]), with_kwargs=True
        )
        trainer = L.Trainer(**OPTIONS, max_epochs=1, limit_val_batches=0)
        trainer.fit(module, **keywords)
        assert module.total_steps() == trainer.global_step == (4 if name == "own" else 3)
    own, ours = (torch.cat(images) for images in seen.values())
    assert own.dtype == ours.dtype == torch.float32 and own.min() < -0.9
    assert sorted(own.mean(dim=(1, 2, 3)).tolist()) == pytest.approx(sorted(ours.mean(dim=(1, 2, 3)).tolist()))


def test_own_batches_of_the_processor(folder: Path) -> None:
    """Batches without mmbert's own keys: inputs of the processor with labels."""
    data = data_of(folder)
    batch = dict(tiny_processor()(text=["a red cat", "two dogs"], images=[Image.new("RGB", (16, 16))] * 2))
    labelled: Any = DataLoader([{**batch, "match_labels": torch.tensor([1, 0])}] * 2, batch_size=None)  # pyright: ignore
    trainer = L.Trainer(**OPTIONS, max_epochs=1, limit_val_batches=0)
    module = module_of(data)
    before = weights(module)
    trainer.fit(module, labelled)
    assert trainer.global_step == 2 and changed_parts(before, weights(module)) == {"heads", "backbone"}
    with pytest.raises(UsageError, match="no loss of a batch with input_ids, attention_mask, pixel_values: labels"):
        L.Trainer(**OPTIONS, max_epochs=1, limit_val_batches=0).fit(
            module_of(data),
            DataLoader([batch], batch_size=None),  # pyright: ignore
        )


def test_own_validation_dataloaders(folder: Path) -> None:
    data = data_of(folder)
    trainer = L.Trainer(**OPTIONS, max_epochs=1)
    trainer.fit(module_of(data), data.train_dataloader(), data.val_dataloader())
    assert "val/mlm_loss" in trainer.callback_metrics
    own = DataLoader(data.train_samples, 4, collate_fn=data.collate)
    for call in (
        lambda: L.Trainer(**OPTIONS, max_epochs=1).fit(module_of(data), data.train_dataloader(), own),
        lambda: L.Trainer(**OPTIONS).test(module_of(data), own, verbose=False),
    ):
        with pytest.raises(UsageError, match=r"dataloaders of your own for (val|test): .* pass datamodule=data"):
            call()


def test_model_checkpoint_of_a_run_has_a_folder_of_its_own(folder: Path, tmp_path: Path) -> None:
    callback = ModelCheckpoint(monitor="val/mlm_loss", filename="{step}")
    run = mmbert.fit(**run_options(folder, tmp_path, callbacks=[callback]))
    assert {p.name for p in (run.folder / "model_checkpoints").glob("*.ckpt")} == {"step=3.ckpt"}
    assert {p.name for p in (run.folder / "checkpoints").glob("*.ckpt")} == {"step=3.ckpt", "best-step=3.ckpt"}


def test_model_checkpoint_and_resume_with_a_plain_trainer(folder: Path, tmp_path: Path) -> None:
    data = data_of(folder)
    options = {**OPTIONS, "enable_checkpointing": True, "max_epochs": 2}
    whole = module_of(data)
    checkpoint = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    L.Trainer(**options, callbacks=[checkpoint]).fit(whole, datamodule=data)
    again = module_of(data_of(folder), seed=1)
    trainer = L.Trainer(**options, callbacks=[ModelCheckpoint(tmp_path / "again")])
    trainer.fit(again, datamodule=again._data, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert trainer.global_step == 6
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())


def test_profiler_prints_its_table_once(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    quiet_lightning()  # as the command line does
    mmbert.fit(**run_options(folder, tmp_path, profiler="simple"))
    printed = capfd.readouterr()
    reports = re.findall(r"(\w+) Profiler Report", printed.out + printed.err)
    assert reports == ["FIT", "VALIDATE", "TEST"] and "run_training_batch" in printed.err


def test_common_callbacks_of_a_plain_trainer(folder: Path) -> None:
    data, logger = data_of(folder), StubLogger()
    stopping = EarlyStopping("val/mlm_loss", patience=1, min_delta=100.0)
    options = {**OPTIONS, "logger": logger, "log_every_n_steps": 1}
    trainer = L.Trainer(**options, max_epochs=9, callbacks=[stopping, LearningRateMonitor("step")])
    trainer.fit(module_of(data), datamodule=data)
    assert trainer.current_epoch == 2 and trainer.should_stop


def test_finetuning_with_several_processes_is_refused() -> None:
    trainer: Any = SimpleNamespace(callbacks=[UnfreezeFusion()], world_size=2)
    with pytest.raises(UsageError, match="UnfreezeFusion with 2 processes: DDP does not average"):
        validate_callbacks(trainer, OptimOptions())
