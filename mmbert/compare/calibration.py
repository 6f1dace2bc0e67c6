"""Compute the budgets of all strategies from the cost of a training step: `python -m mmbert.compare.calibration OUT`.

It runs in a separate process, so that the models of all strategies don't count for the memory of an arm. Every
strategy is built as in its arms, and its cost is counted on the first training batches; weights have no effect on it.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from mmbert.compare.budget import Shape, allocate_budgets, describe_budget, match_parameters
from mmbert.compare.cost import (
    cached_batches,
    count_parameters,
    first_batches,
    flops_per_cached_image,
    flops_per_step,
    parameters,
    synchronize,
)
from mmbert.compare.folder import stored_budgets
from mmbert.compare.plan import PRETRAIN, TOWERS, Comparison, Stage, comparison_from
from mmbert.compare.towers import check_start, tower_comparison
from mmbert.data.datamodule import PairsDataModule
from mmbert.data.teacher_vectors import zero_vectors
from mmbert.errors import UsageError
from mmbert.evaluation.retrieval import choose_scorer
from mmbert.inference.capabilities import objectives_of
from mmbert.model.configuration import MMBertConfig
from mmbert.model.initialization import quiet_transformers
from mmbert.model.modeling import MMBertForPreTraining
from mmbert.model.objectives import Objective
from mmbert.runtime.files import atomic_write_text
from mmbert.runtime.import_policy import allow_import_from_cwd
from mmbert.runtime.terminal import report_user_errors, set_up_logging
from mmbert.training.encoder_caching import is_cached
from mmbert.training.optim import build_optimizer
from mmbert.training.run import TrainingRun
from mmbert.training.run_options import parse_run, to_arguments

COUNTED_BATCHES = 20
"""Training batches whose FLOPs are counted."""
TIMED_STEPS = 20
"""Optimizer steps that are timed, after two for warm-up."""


class StepCost(NamedTuple):
    """Cost of a training step of one stage."""

    flops: float
    seconds: float
    first_steps: int = 0
    """Optimizer steps of its first stage (`optim.first_stage`)."""
    first_flops: float = 0.0
    """FLOPs of one of these."""
    once_flops: float = 0.0
    """FLOPs of filling the encoder cache with the training images (`cached_encoder`)."""


class StrategyCost(NamedTuple):
    """Shape of a strategy's fusion module, and the cost of a step of each stage."""

    shape: Shape
    steps: dict[str, StepCost]


def calibrate(comparison: Comparison, allow_import: list[str], known: Mapping[str, Any]) -> dict[str, Any]:
    """Compute strategy -> budget, steps of each stage, and the options that match its size to the budget.

    The towers, if there are any, have an entry too.

    Args:
        comparison: The comparison.
        allow_import: Modules that strategies may be imported from.
        known: Stored result of an earlier call; its times are not measured again.
    """
    torch.set_num_threads(comparison.threads)
    towers = None
    if comparison.has_towers:
        alone = tower_comparison(comparison)
        towers = build_pretraining(alone, alone.strategy_options(TOWERS), allow_import).parts
    matched = match_options(comparison, allow_import) if comparison.match == "parameters" else {}
    costs: dict[str, StrategyCost] = {}
    for strategy in comparison.names:
        differences = json.loads(json.dumps(comparison.strategy_options(strategy)))
        before = known.get(strategy, {})
        if before.get("differences") == differences and before["options"] == matched.get(strategy, {}):
            steps = {stage: StepCost(*cost) for stage, cost in before["costs"].items()}
            costs[strategy] = StrategyCost(Shape(*before["shape"]), steps)
        else:
            run = build_pretraining(comparison, {**differences, **matched.get(strategy, {})}, allow_import)
            if towers is not None:
                check_start(strategy, run.parts, towers)
            costs[strategy] = measure_strategy(comparison, run, allow_import)
    allocated = {
        stage: allocate_budgets(
            comparison.match,
            {name: found.shape for name, found in costs.items()},
            {name: found.steps[stage].flops for name, found in costs.items()},
            steps=comparison.stages[stage].steps,
            reference=comparison.reference,
            seconds={name: found.steps[stage].seconds for name, found in costs.items()},
            first_steps=max(found.steps[stage].first_steps for found in costs.values()),
            first_flops=max(found.steps[stage].first_flops for found in costs.values()),
            once_flops={name: found.steps[stage].once_flops for name, found in costs.items()},
        )
        for stage in comparison.stages
    }
    found = {}
    for strategy in comparison.names:
        own = {stage: budgets[strategy] for stage, budgets in allocated.items()}
        first = own[PRETRAIN]
        found[strategy] = {
            "stages": {stage: budget.steps for stage, budget in own.items()},
            "options": matched.get(strategy, {}),
            "weights": {stage: budget.training_flops for stage, budget in own.items()},
            "summary": describe_budget(first, {stage: budget for stage, budget in own.items() if stage != PRETRAIN}),
            "differences": comparison.strategy_options(strategy),
            "shape": costs[strategy].shape,
            "costs": costs[strategy].steps,
            "budget": {
                **first._asdict(),
                "training_flops": sum(budget.training_flops for budget in own.values()),
                "missed_by": max((budget.missed_by for budget in own.values()), key=abs),
                **({"seconds_per_step": costs[strategy].steps[PRETRAIN].seconds} if comparison.match == "time" else {}),
                **{f"{stage}/steps": budget.steps for stage, budget in own.items() if stage != PRETRAIN},
            },
        }
    return found | (calibrate(tower_comparison(comparison), allow_import, known) if comparison.has_towers else {})


def build_pretraining(comparison: Comparison, options: Mapping[str, Any], allow_import: list[str]) -> TrainingRun:
    """Build the pretraining run of a strategy, without starting it."""
    return build_stage(comparison.pretrain, {**options, "seed_everything": comparison.seeds[0]}, allow_import)


def build_stage(stage: Stage, options: Mapping[str, Any], allow_import: list[str]) -> TrainingRun:
    """Build the training run of a stage with further options, without starting it."""
    for module in allow_import:
        allow_import_from_cwd(module)
    arguments = to_arguments(stage.run, {**stage.options, **options})
    return TrainingRun(parse_run(arguments), dry=True)


def match_options(comparison: Comparison, allow_import: list[str]) -> dict[str, dict[str, int]]:
    """Find strategy -> options of depth and width at which its model has the parameters of the reference."""
    configs = {
        name: build_pretraining(comparison, comparison.strategy_options(name), allow_import).parts.model.config
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


def measure_strategy(comparison: Comparison, run: TrainingRun, allow_import: list[str]) -> StrategyCost:
    """Measure the cost of a step of each stage of one strategy, whose pretraining is `run`."""
    check_evaluations(comparison, run.parts.model, run.parts.data.examples)
    _check_fractions(comparison, run)
    found = {PRETRAIN: measure_step(run, comparison)}
    with tempfile.TemporaryDirectory() as folder:
        if comparison.finetune:
            with quiet_transformers():
                run.parts.model.save_pretrained(folder)
            run.parts.processor.save_pretrained(folder)
        for name, stage in comparison.stages.items():
            if name == PRETRAIN:
                continue
            found[name] = measure_step(build_stage(stage, {"model.pretrained": folder}, allow_import), comparison)
    model = run.parts.model
    return StrategyCost(Shape(*_depth_and_width(model.config), parameters(model).total), found)


def check_evaluations(comparison: Comparison, model: Any, splits: Mapping[str, Sequence[Any]]) -> None:
    """Raise before the training if an evaluation after it is impossible.

    Args:
        comparison: The comparison.
        model: The untrained model of one strategy.
        splits: Split -> examples of the pretraining data.

    Raises:
        UsageError: A split without examples, or a score that the model's objectives do not train.
    """
    if not isinstance(model, MMBertForPreTraining):
        return
    retrieval, shares = comparison.retrieval, comparison.shares
    if retrieval.images:
        choose_scorer(model, retrieval.scorer)
    if shares.pairs:
        objectives_of(model, "pretrain", f"shares.target={shares.target}", shares.target)
    sizes = {"retrieval": (retrieval.images, retrieval.split), "shares": (shares.pairs, shares.split)}
    for section, (size, split) in sizes.items():
        if size and not splits.get(split):
            raise UsageError(f"{section}.split='{split}'; the data has {', '.join(splits)}.")


def _check_fractions(comparison: Comparison, run: TrainingRun) -> None:
    """Raise on a fraction of the training pairs that is smaller than a batch."""
    count, batch, fraction = (
        len(run.parts.data.examples["train"]),
        run.options.sections.data.batch_size,
        min(comparison.fractions),
    )
    if round(fraction * count) < batch:
        raise UsageError(
            f"fractions={comparison.fractions}: {fraction:g} of {count:,} training pairs are "
            f"{round(fraction * count):,}, fewer than data.batch_size={batch}."
        )


def measure_step(run: TrainingRun, comparison: Comparison) -> StepCost:
    """Count the FLOPs of an optimizer step, and time it if the comparison matches times."""
    model, data = run.parts.model, run.parts.data
    if run.teacher is not None:
        assert isinstance(data, PairsDataModule)
        data.train_samples.teacher = zero_vectors
    model.train()
    accumulated = int(run.options.config.trainer.accumulate_grad_batches)
    cached = comparison.cached_encoder and _charges_cache(run)

    def batches(count: int) -> Iterator[dict[str, Tensor]]:
        found = first_batches(data, count)
        return cached_batches(model, found) if cached else found

    images = {request for request in data.train_samples.cache_requests()} if cached else ()
    once_flops = float(flops_per_cached_image(model) * len(images)) if cached else 0.0
    momentum = run.module.momentum
    if momentum is not None:
        momentum.start()
    flops = flops_per_step(model, batches(COUNTED_BATCHES), momentum=momentum) * accumulated
    optim, first_flops = run.options.sections.optim, 0.0
    if optim.first_stage is not None:
        assert isinstance(model, MMBertForPreTraining)
        _check_first_stage(model, optim.first_stage)
        first_flops = flops_per_step(model, batches(COUNTED_BATCHES), only=optim.first_stage) * accumulated
    if comparison.match != "time":
        return StepCost(flops, 0.0, optim.first_stage_steps, first_flops, once_flops)
    device = run.trainer.strategy.root_device
    model.to(device)  # pyright: ignore[reportArgumentType]
    optimizer, _ = build_optimizer(model, run.options.sections.optim, TIMED_STEPS + 2)
    if momentum is not None:
        momentum.start()  # anew, on the device
    seconds = []
    precision = str(run.trainer.precision)
    kind = torch.bfloat16 if precision.startswith("bf16") else torch.float16
    with torch.autocast(device.type, kind, enabled=precision.endswith("mixed")):
        for batch in batches(TIMED_STEPS + 2):
            batch = move_data_to_device(batch, device)
            synchronize(device)
            started = time.perf_counter()
            soft = {} if momentum is None else {"soft_targets": momentum.soft_targets(batch, step=0)}
            loss = model(**batch, generator=torch.Generator().manual_seed(0), **soft).loss
            assert loss is not None
            loss.backward()
            optimizer.step()
            if momentum is not None:
                momentum.update()
            optimizer.zero_grad()
            synchronize(device)
            seconds.append(time.perf_counter() - started)
    timed = statistics.median(seconds[2:]) * accumulated
    return StepCost(flops, timed, optim.first_stage_steps, first_flops, once_flops)


def _charges_cache(run: TrainingRun) -> bool:
    """Return whether a stage has a frozen image encoder, whose cache its arms read.

    Raises:
        UsageError: It is frozen, but its options allow no cache.
    """
    data, encoder = run.parts.data.options, run.parts.model.mmbert.image_encoder
    if encoder.frozen == "none":
        return False
    if not is_cached(run.parts.model.mmbert, data):
        raise UsageError(
            f"cached_encoder=true, but data.cache={data.cache or 'null'} with data.crop={data.crop}, "
            f"data.flip={str(data.flip).lower()} and data.views={data.views or 'null'} keeps no outputs of this frozen "
            "image encoder; leave cached_encoder out, or set data.cache, or data.views where images are augmented."
        )
    run.parts.data.train_samples.views = data.views or 0
    return True


def _check_first_stage(model: MMBertForPreTraining, name: str) -> None:
    """Raise where the cost of a first stage depends on the fusion, which all strategies would have to take equally."""
    objective = model.objectives[name]
    assert isinstance(objective, Objective)
    if any(any(reads) for reads in objective.reads.values()):
        raise UsageError(
            f"optim.first_stage='{name}' reads the fusion, so its cost differs between strategies; a comparison takes "
            "ngrams, boxes, mim or itc as its first stage."
        )


def main(out: Path) -> None:
    """Read OUT/plan.json and write OUT/budgets.json."""
    set_up_logging()
    with report_user_errors():
        plan, file = json.loads((out / "plan.json").read_text(encoding="utf-8")), out / "budgets.json"
        stored = stored_budgets(out)
        known = stored["strategies"] if stored.get("budget_inputs") == plan["budget_inputs"] else {}
        found = calibrate(comparison_from(plan["comparison"]), plan["allow_import"], known)
        content = {"budget_inputs": plan["budget_inputs"], "strategies": {**known, **found}}
        atomic_write_text(file, json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
