"""What a step of each strategy costs, and the budgets that follow: `python -m mmbert.compare.calibration OUT`.

In a process of its own, so that models of all strategies add nothing to the memory of an arm. Every strategy is built
as its arms build it, and its costs are counted on the first training batches; weights don't matter.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities import move_data_to_device

from mmbert.compare.budget import Shape, match_parameters, share_out, told
from mmbert.compare.cost import count_parameters, first_batches, flops_per_step, parameters, synchronize
from mmbert.compare.plan import PRETRAIN, Comparison, Stage, comparison_from
from mmbert.errors import UsageError
from mmbert.evaluation.retrieval import choose_scorer
from mmbert.model.configuration import MMBertConfig
from mmbert.model.initialization import quiet_transformers
from mmbert.model.modeling import MMBertForPreTraining
from mmbert.runtime.files import atomic_write_text
from mmbert.runtime.import_policy import allow_import_from_cwd
from mmbert.runtime.terminal import report_user_errors, set_up_logging
from mmbert.training.fit import TrainingRun
from mmbert.training.optim import build_optimizer
from mmbert.training.run_options import parse_run, to_arguments

COUNTED = 20
"""Training batches whose FLOPs are counted."""
TIMED = 20
"""Optimizer steps that are timed, after two that are not."""


class Step(NamedTuple):
    """What a training step of one stage costs."""

    flops: float
    seconds: float


class Counted(NamedTuple):
    """A strategy's fusion part, and what a step of each stage costs with it."""

    shape: Shape
    steps: dict[str, Step]


def calibrate(comparison: Comparison, allow_import: list[str], known: Mapping[str, Any]) -> dict[str, Any]:
    """Strategy -> its budget, the steps of each stage, and the options that make its fusion part fit the budget.

    Args:
        comparison: What is compared.
        allow_import: Modules that strategies may come from.
        known: What was found before; times are not measured again.
    """
    torch.set_num_threads(comparison.threads)
    solved = matched_options(comparison, allow_import) if comparison.match == "parameters" else {}
    counted: dict[str, Counted] = {}
    for strategy in comparison.names:
        differences, before = json.loads(json.dumps(comparison.differences(strategy))), known.get(strategy, {})
        if before.get("differences") == differences and before["options"] == solved.get(strategy, {}):
            steps = {stage: Step(*cost) for stage, cost in before["costs"].items()}
            counted[strategy] = Counted(Shape(*before["shape"]), steps)
        else:
            counted[strategy] = count(comparison, {**differences, **solved.get(strategy, {})}, allow_import)
    shared = {
        stage: share_out(
            comparison.match,
            {name: found.shape for name, found in counted.items()},
            {name: found.steps[stage].flops for name, found in counted.items()},
            steps=comparison.stages[stage].steps,
            reference=comparison.reference,
            seconds={name: found.steps[stage].seconds for name, found in counted.items()},
        )
        for stage in comparison.stages
    }
    found = {}
    for strategy in comparison.names:
        own = {stage: budgets[strategy] for stage, budgets in shared.items()}
        first = own[PRETRAIN]
        found[strategy] = {
            "stages": {stage: budget.steps for stage, budget in own.items()},
            "options": solved.get(strategy, {}),
            "weights": {stage: budget.training_flops for stage, budget in own.items()},
            "summary": told(first, {stage: budget for stage, budget in own.items() if stage != PRETRAIN}),
            "differences": comparison.differences(strategy),
            "shape": counted[strategy].shape,
            "costs": counted[strategy].steps,
            "budget": {
                **first._asdict(),
                "training_flops": sum(budget.training_flops for budget in own.values()),
                "missed_by": max((budget.missed_by for budget in own.values()), key=abs),
                **(
                    {"seconds_per_step": counted[strategy].steps[PRETRAIN].seconds}
                    if comparison.match == "time"
                    else {}
                ),
                **{f"{stage}/steps": budget.steps for stage, budget in own.items() if stage != PRETRAIN},
            },
        }
    return found


def prepared(comparison: Comparison, options: Mapping[str, Any], allow_import: list[str]) -> TrainingRun:
    """The parts of a strategy's pretraining."""
    return prepare_stage(comparison.pretrain, {**options, "seed_everything": comparison.seeds[0]}, allow_import)


def prepare_stage(stage: Stage, options: Mapping[str, Any], allow_import: list[str]) -> TrainingRun:
    """The parts of a training with more options on top of its own, built and not started."""
    for module in allow_import:
        allow_import_from_cwd(module)
    arguments = to_arguments(stage.run, {**stage.options, **options})
    return TrainingRun(parse_run(arguments), dry=True)


def matched_options(comparison: Comparison, allow_import: list[str]) -> dict[str, dict[str, int]]:
    """Strategy -> options that set the depth and width which bring its model to the parameters of the reference."""
    configs = {
        name: prepared(comparison, comparison.differences(name), allow_import).parts.model.config
        for name in comparison.names
    }
    shapes = match_parameters(
        {name: _depth_and_width(config) for name, config in configs.items()},
        lambda name, layers, width: count_parameters(configs[name], configs[name].fusion, layers, width),
        reference=comparison.reference,
    )
    return {
        name: {"model.fusion_layers": shape.fusion_layers, "model.intermediate_size": shape.intermediate_size}
        for name, shape in shapes.items()
    }


def _depth_and_width(config: MMBertConfig) -> tuple[int, int]:
    return config.fusion_layers, config.intermediate_size or 4 * config.hidden_size


def count(comparison: Comparison, options: Mapping[str, Any], allow_import: list[str]) -> Counted:
    """What the stages of one strategy cost."""
    run = prepared(comparison, options, allow_import)
    _check_retrieval(comparison, run)
    _check_fractions(comparison, run)
    found = {PRETRAIN: step_cost(run, comparison)}
    with tempfile.TemporaryDirectory() as folder:
        if comparison.finetune:
            with quiet_transformers():
                run.parts.model.save_pretrained(folder)
            run.parts.processor.save_pretrained(folder)
        for name, stage in comparison.stages.items():
            if name == PRETRAIN:
                continue
            tuned = prepare_stage(stage, {"model.pretrained": folder}, allow_import)
            found[name] = step_cost(tuned, comparison)
    model = run.parts.model
    return Counted(Shape(*_depth_and_width(model.config), parameters(model).total), found)


def _check_retrieval(comparison: Comparison, run: TrainingRun) -> None:
    """Refuses before the training what could not be ranked after it."""
    model, splits, asked = run.parts.model, run.parts.data.examples, comparison.retrieval
    if asked.images and isinstance(model, MMBertForPreTraining):
        choose_scorer(model, asked.scorer)
        if not splits.get(asked.split):
            raise UsageError(f"retrieval.split='{asked.split}'; the data has {', '.join(splits)}.")


def _check_fractions(comparison: Comparison, run: TrainingRun) -> None:
    """Refuses a share of the training pairs that fills no batch."""
    count, batch, share = (
        len(run.parts.data.examples["train"]),
        run.options.sections.data.batch_size,
        min(comparison.fractions),
    )
    if round(share * count) < batch:
        raise UsageError(
            f"fractions={comparison.fractions}: {share:g} of {count:,} training pairs are {round(share * count):,}, "
            f"fewer than data.batch_size={batch}."
        )


def step_cost(run: TrainingRun, comparison: Comparison) -> Step:
    """Counts FLOPs of an optimizer step; times it only where times are to be equal."""
    model, data = run.parts.model, run.parts.data
    model.train()
    accumulated = int(run.options.config.trainer.accumulate_grad_batches)
    flops = flops_per_step(model, first_batches(data, COUNTED)) * accumulated
    if comparison.match != "time":
        return Step(flops, 0.0)
    device = run.trainer.strategy.root_device
    model.to(device)  # pyright: ignore[reportArgumentType]
    optimizer, _ = build_optimizer(model, run.options.sections.optim, TIMED + 2)
    seconds = []
    precision = str(run.trainer.precision)
    kind = torch.bfloat16 if precision.startswith("bf16") else torch.float16
    with torch.autocast(device.type, kind, enabled=precision.endswith("mixed")):
        for batch in first_batches(data, TIMED + 2):
            batch = move_data_to_device(batch, device)
            synchronize(device)
            started = time.perf_counter()
            loss = model(batch, generator=torch.Generator().manual_seed(0)).loss
            assert loss is not None
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            synchronize(device)
            seconds.append(time.perf_counter() - started)
    return Step(flops, statistics.median(seconds[2:]) * accumulated)


def start(out: Path) -> None:
    """Reads OUT/plan.json, writes OUT/budgets.json."""
    set_up_logging()
    with report_user_errors():
        plan, file = json.loads((out / "plan.json").read_text()), out / "budgets.json"
        stored = json.loads(file.read_text()) if file.is_file() else {}
        known = stored["strategies"] if stored.get("budget_inputs") == plan["budget_inputs"] else {}
        found = calibrate(comparison_from(plan["comparison"]), plan["allow_import"], known)
        atomic_write_text(
            file,
            json.dumps({"budget_inputs": plan["budget_inputs"], "strategies": {**known, **found}}, indent=2) + "\n",
        )


if __name__ == "__main__":
    start(Path(sys.argv[1]))
