"""`Muon` against the singular value decomposition, `torch.optim.Muon` and `torch.optim.AdamW`."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_batch, tiny_config
from torch import Tensor, nn

from mmbert.errors import UsageError
from mmbert.model.fusion import FUSIONS
from mmbert.model.modeling import MMBertForPreTraining
from mmbert.training.module import TrainingModule
from mmbert.training.muon import Muon, orthogonalize
from mmbert.training.optim import build_optimizer, parameter_groups
from mmbert.training.options import OptimOptions
from mmbert.training.sharding import fsdp_strategy


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(16, 16), (8, 24), (24, 8)])
def test_orthogonalized_matrices_have_singular_values_of_about_1(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrices = seeded(3, *shape)
    found = orthogonalize(matrices.to(dtype))
    assert found.dtype == dtype
    found = found.float()
    u, _, vt = torch.linalg.svd(matrices, full_matrices=False)
    singular = (u.mT @ found @ vt.mT).diagonal(dim1=1, dim2=2)  # in the basis of the input: the directions are kept
    assert found.shape == matrices.shape
    assert singular.min() > 0.4 and singular.max() < 1.3
    assert torch.equal(orthogonalize(torch.zeros(1, 4, 4)), torch.zeros(1, 4, 4))


def test_steps_equal_those_of_torch() -> None:
    """Matrices as in `torch.optim.Muon` up to its bfloat16, all else exactly as in AdamW."""
    ours = [nn.Parameter(seeded(*shape)) for shape in ((8, 8), (8, 8), (16, 8), (8,))]
    reference = [nn.Parameter(p.detach().clone()) for p in ours]
    groups: list[dict[str, Any]] = [
        {"params": ours[:3], "lr": 0.1, "weight_decay": 0.2, "muon": True},
        {"params": ours[3:], "lr": 0.05, "weight_decay": 0.0},
    ]
    optimizer = Muon(groups, betas=(0.9, 0.98))
    others = [
        torch.optim.Muon(reference[:3], lr=0.1, weight_decay=0.2, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(reference[3:], lr=0.05, weight_decay=0.0, betas=(0.9, 0.98), fused=True),
    ]
    for step in range(5):
        for i, (mine, other) in enumerate(zip(ours, reference, strict=True)):
            mine.grad = seeded(*mine.shape, seed=10 * step + i)
            other.grad = mine.grad.clone()
        for each in (optimizer, *others):
            each.step()
    assert torch.equal(ours[3], reference[3])
    for mine, other in zip(ours[:3], reference[:3], strict=True):
        assert (mine - other).abs().max() < 0.02 < (mine - seeded(*mine.shape)).abs().max()


def test_restored_optimizer_continues_bit_for_bit() -> None:
    torch.manual_seed(0)
    model = MMBertForPreTraining(tiny_config(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    options = OptimOptions(name="muon", lr=1e-2, muon_lr=2e-2)

    def steps(model: MMBertForPreTraining, optimizer: Any, schedule: Any, numbers: range) -> None:
        for number in numbers:
            optimizer.zero_grad()
            model(**tiny_batch(seed=number), generator=torch.Generator().manual_seed(number)).loss.backward()
            optimizer.step()
            schedule.step()

    optimizer, schedule = build_optimizer(model, options, 6)
    steps(model, optimizer, schedule, range(3))
    restored = copy.deepcopy(model)
    again, its_schedule = build_optimizer(restored, options, 6)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    its_schedule.load_state_dict(schedule.state_dict())
    steps(model, optimizer, schedule, range(3, 6))
    steps(restored, again, its_schedule, range(3, 6))
    for (name, value), other in zip(model.named_parameters(), restored.parameters(), strict=True):
        assert torch.equal(value, other), name


@pytest.mark.parametrize("fusion", FUSIONS)
def test_matrices_of_layers_are_muons_and_the_rest_adamws(fusion: str) -> None:
    model = MMBertForPreTraining(tiny_config(fusion=fusion))
    names = {id(p): n for n, p in model.named_parameters()}
    groups = parameter_groups(model, OptimOptions(name="muon", lr=2.0, muon_lr=3.0, image_lr_factor=0.5))
    muon = {names[id(p)]: g["lr"] for g in groups if g.get("muon") for p in g["params"]}
    adamw = {names[id(p)]: g["lr"] for g in groups if not g.get("muon") for p in g["params"]}
    assert {*muon, *adamw} == {*names.values()} and not {*muon} & {*adamw}
    assert muon["mmbert.image_encoder.vit.blocks.0.attn.qkv.weight"] == 1.5
    assert muon["mmbert.text_encoder.bert.encoder.layer.0.attention.self.query.weight"] == 3.0
    assert any("fusion" in name for name in muon)
    for part in ("embeddings", "patch_embed", "objectives", "bias", "norm"):
        assert not any(part in name.lower() for name in muon), part


def test_sharded_matrices_are_refused() -> None:
    module: Any = SimpleNamespace(
        trainer=SimpleNamespace(strategy=fsdp_strategy(2, 1)), optim_options=OptimOptions(name="muon")
    )
    with pytest.raises(
        UsageError, match=r"optim\.name=muon needs whole matrices, but trainer\.strategy=model_parallel"
    ):
        TrainingModule.configure_model(module)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "muom"}, "optim.name='muom'; allowed are adamw, muon. Did you mean 'muon'"),
        ({"muon_lr": 0.0}, "optim.muon_lr=0.0: must be above 0"),
        ({"first_stage": "ngrams"}, "first_stage=ngrams with first_stage_steps=0: name an objective and 1 or more"),
        ({"first_stage_steps": 5}, "first_stage=None with first_stage_steps=5"),
    ],
)
def test_wrong_options_are_errors(options: dict, message: str) -> None:
    with pytest.raises(UsageError) as error:
        OptimOptions(**options).check()
    assert message in str(error.value)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.bfloat16), ("32-true", torch.float32)])
def test_matrices_are_orthogonalized_in_the_precision_of_the_run(precision: str, dtype: torch.dtype) -> None:
    model = MMBertForPreTraining(tiny_config())
    module: Any = SimpleNamespace(
        trainer=SimpleNamespace(precision=precision),
        model=model,
        optim_options=OptimOptions(name="muon"),
        total_steps=lambda: 10,
    )
    assert TrainingModule.configure_optimizers(module)["optimizer"].dtype == dtype
