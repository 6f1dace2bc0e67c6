"""transformers' `Trainer` trains the models, resumes from its checkpoints, and evaluates with a loss."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import inputs, randomize, tiny_batch, tiny_config
from torch import Tensor
from transformers import Trainer, TrainingArguments

from mmbert.model.modeling import HeadedModel, MMBertForPreTraining, MMBertForTask

pytestmark = pytest.mark.skipif(find_spec("accelerate") is None, reason="transformers' Trainer needs accelerate")
WITHOUT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def build(kind: str) -> tuple[HeadedModel, dict[str, Tensor], str]:
    """A model, a batch of mmbert's own collate, and the key of its labels."""
    batch = tiny_batch(4)
    if kind == "task":
        model = MMBertForTask(tiny_config(objectives={}, task="vqa", labels=["no", "yes"], **WITHOUT_DROPOUT))
        batch, key = {**inputs(batch), "label_scores": torch.eye(2).repeat(2, 1)}, "label_scores"
    else:
        model, key = MMBertForPreTraining(tiny_config(**WITHOUT_DROPOUT)), "mlm_labels"
    randomize(model)
    return model, batch, key


def trainer(kind: str, folder: Path, steps: int) -> Trainer:
    model, batch, key = build(kind)
    rows: Any = [{name: value[i] for name, value in batch.items()} for i in range(4)]
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=4, save_steps=5, eval_strategy="steps", eval_steps=5,
        label_names=[key], remove_unused_columns=False, lr_scheduler_type="constant", learning_rate=1e-3,
        logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip

    def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}

    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=collate)


@pytest.mark.parametrize("kind", ["pretraining", "task"])
def test_trainer_learns_evaluates_and_resumes(kind: str, tmp_path: Path) -> None:
    whole = trainer(kind, tmp_path / "whole", 10)
    whole.train()
    losses = [entry["eval_loss"] for entry in whole.state.log_history if "eval_loss" in entry]
    assert len(losses) == 2 and losses[1] < losses[0]
    resumed = trainer(kind, tmp_path / "resumed", 10)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-5"))
    assert resumed.state.global_step == 10
    assert whole.model is not None and resumed.model is not None
    expected = whole.model.state_dict()
    for name, value in resumed.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-4)
