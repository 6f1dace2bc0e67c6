"""`TrainingModule`: the report of a step that is not finite."""

from types import SimpleNamespace
from typing import Any

import torch

from mmbert.training.module import TrainingModule


def test_report_of_a_step_takes_parts_without_gradients() -> None:
    used, unused = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    used.grad = torch.tensor([3.0, 4.0])
    groups = [{"params": [used], "name": "text/0"}, {"params": [unused], "name": "fusion/0"}]
    module: Any = SimpleNamespace(
        _data=SimpleNamespace(train_samples=SimpleNamespace(examples=[])),
        _indices=[],
        _since_step=[{"mlm": torch.tensor(float("nan"))}],
        trainer=SimpleNamespace(global_step=4, current_epoch=1),
    )
    facts: Any = TrainingModule._facts(module, torch.optim.SGD(groups, lr=0.1))
    assert facts["step"] == 5 and facts["gradient_norms_after_clipping"] == {"text/0": 5.0}
