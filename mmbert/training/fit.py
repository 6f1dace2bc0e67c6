"""`mmbert.fit`: a training run as a function."""

import os
import signal
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from mmbert.data.options import DataOptions
from mmbert.errors import UsageError
from mmbert.evaluation.options import EvaluationOptions
from mmbert.model.options import ModelOptions
from mmbert.runtime.allowed_imports import allow_import as allow_modules
from mmbert.runtime.isolation import isolated_process_state
from mmbert.runtime.signals import StopSignals
from mmbert.training.options import CheckpointOptions, OptimOptions
from mmbert.training.result import RunResult
from mmbert.training.run import TrainingRun
from mmbert.training.run_options import flatten_sections, parse_run, to_arguments


def fit(
    config: str | os.PathLike[str] | None = None,
    *,
    model: Mapping[str, Any] | ModelOptions | None = None,
    data: Mapping[str, Any] | DataOptions | None = None,
    optim: Mapping[str, Any] | OptimOptions | None = None,
    evaluation: Mapping[str, Any] | EvaluationOptions | None = None,
    checkpoint: Mapping[str, Any] | CheckpointOptions | None = None,
    trainer: Mapping[str, Any] | None = None,
    name: str | None = None,
    seed: int | None = None,
    threads: int | None = None,
    resume: str | os.PathLike[str] | None = None,
    allow_import: Sequence[str] = (),
    handle_signals: bool = False,
) -> RunResult:
    """Train a model, test its best checkpoint and write the run's folder, as `mmbert fit` does.

    Works in notebooks and outside the main thread; runs in one process don't affect each other.

    Args:
        config: A YAML file or the name of a preset (`mmbert configs` lists them); None: defaults.
        model: Options on top of the configuration, as in its section `model`: a mapping, or `ModelOptions`, whose
            fields count where they differ from their default.
        data: The same for `data`.
        optim: The same for `optim`.
        evaluation: The same for `evaluation`.
        checkpoint: The same for `checkpoint`.
        trainer: Keyword arguments of `lightning.Trainer`; callbacks and loggers may be objects.
        name: The run's folder below `trainer["default_root_dir"]` ("runs"); a taken name gets "-2".
        seed: Seed of everything random in the run.
        threads: CPU threads that compute; None: the cores that the loader leaves.
        resume: "auto" resumes the run of that name, a path resumes from that checkpoint.
        allow_import: Modules of yours that the configuration names classes of.
        handle_signals: Take SIGTERM, SIGINT and SIGUSR1: finish the step, save, and exit with their code. Main thread
            only.

    Raises:
        UsageError: An option that is unknown, or a value that is not allowed.
        DataError: Something is wrong with a file of the data.
        NotFiniteError: The loss is not finite any more.
    """
    sections = {"model": model, "data": data, "optim": optim, "evaluation": evaluation, "checkpoint": checkpoint}
    options, objects = flatten_sections({**sections, "trainer": trainer})
    top = {"name": name, "seed_everything": seed, "threads": threads, "resume": resume}
    options |= {key: value for key, value in top.items() if value is not None}
    allow_modules(*allow_import)
    if handle_signals and threading.current_thread() is not threading.main_thread():
        raise UsageError("handle_signals=True: Python takes signals in the main thread only.")
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        with isolated_process_state():
            parsed = parse_run(to_arguments(config, options), trainer_objects=objects)
            if handle_signals:
                with StopSignals() as stop:
                    return TrainingRun(parsed, stop=stop).fit()
            return TrainingRun(parsed).fit()
    except SystemExit as stopped:
        if isinstance(stopped.__context__, KeyboardInterrupt):  # Lightning turns Ctrl-C into an exit with code 1
            raise KeyboardInterrupt from None
        raise
    finally:
        if threading.current_thread() is threading.main_thread() and interrupt is not None:
            signal.signal(signal.SIGINT, interrupt)  # which Lightning ignores after Ctrl-C
