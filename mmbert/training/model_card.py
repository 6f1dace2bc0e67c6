"""Model card of a run: README.md beside the weights, in the format of the Hugging Face hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmbert.metrics.outcomes import ItemOutcomes
from mmbert.model.configuration import MMBertConfig
from mmbert.model.options import ModelOptions

PIPELINE_TAGS = {"vqa": "visual-question-answering", "itc": "zero-shot-image-classification", "mlm": "fill-mask"}
"""Task or objective -> the hub's name for it; the first that a model has is named."""

LIMITS = """\
- One run with one seed: the intervals hold for other items of the same data, not for other seeds.
- The model knows what its training data show. Captions collected from people or the web carry their stereotypes, and
  scores of pairs and words can repeat them. No metric above measures that; `mmbert evaluate bias` probes one aspect.
- Scores are not calibrated outside of the data above, and texts in other languages than its own were not tested."""

OUT_OF_SCOPE = """\
Identifying people, judging their character, health, origin or beliefs, surveillance, and decisions about people without
review by a person. Facts: the model ranks and classifies texts and images and does not know what is true."""


def write_model_card(
    folder: Path,
    *,
    name: str,
    config: MMBertConfig,
    options: ModelOptions,
    data: Mapping[str, Any],
    seed: int,
    metrics: Mapping[str, Any],
    outcomes: Mapping[str, Mapping[str, ItemOutcomes]],
) -> None:
    """Write README.md into the folder of a saved model.

    Args:
        folder: RUN/model.
        name: Title.
        config: The model's configuration.
        options: Of the model; name the pretrained weights it started from.
        data: Facts of the data, such as `annotations`.
        seed: Of the run.
        metrics: The content of metrics.json; empty before the test.
        outcomes: Test split -> metric -> outcomes, for the intervals.
    """
    heads = [config.task] if config.task else [*config.objective_options()]
    tag = next((PIPELINE_TAGS[head] for head in PIPELINE_TAGS if head in heads), None)
    header = ["---", "library_name: mmbert", "tags: [mmbert, image-text]"]
    header += [f"pipeline_tag: {tag}"] if tag else []
    labels = f" over {len(config.labels)} labels" if config.labels else ""
    sizes = f"{config.fusion_layers} layers, width {config.hidden_size}"
    encoders = f"{config.text_layers} text layers and {config.image_layers} image layers"
    images = f"`{config.image_model}`, {config.image_size} px"
    model = (
        f"`{config.fusion}` fusion ({sizes}) after {encoders} ({images}); heads: {', '.join(map(str, heads))}{labels}."
    )
    facts = {key: value for key, value in data.items() if value not in (None, {}, [], "")}
    sections = {
        "Model": model,
        "Initialization": _initialization(options),
        "Training data": "\n".join(f"- {key}: {_shown(value)}" for key, value in facts.items()) or "Not recorded.",
        "Metrics": _metrics(metrics, outcomes),
        "Seed and cost": _cost(metrics, seed),
        "Use": '```python\nimport mmbert\n\nmodel = mmbert.load("path/of/this/folder")\n```',
        "Limits": LIMITS,
        "Out-of-scope uses": OUT_OF_SCOPE,
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    card = "\n".join([*header, "---", "", f"# {name}", "", body, ""])
    (folder / "README.md").write_text(card, encoding="utf-8")


def confidence_interval(outcomes: ItemOutcomes) -> tuple[float, float] | None:
    """Compute the 95 % interval of a mean over items, those of one image counted as one cluster.

    The standard error is cluster-robust, with the factor C / (C - 1) for C images; None for fewer than two images.
    """
    values, images = np.asarray(outcomes.values, dtype=np.float64), np.asarray(outcomes.images)
    _, cluster = np.unique(images, return_inverse=True)
    count = int(cluster.max()) + 1 if len(cluster) else 0
    if count < 2:
        return None
    mean = float(values.mean())
    sums = np.bincount(cluster, values - mean)
    error = float(np.sqrt((sums**2).sum() * count / (count - 1)) / len(values))
    return mean - 1.96 * error, mean + 1.96 * error


def _initialization(options: ModelOptions) -> str:
    adapters = "" if options.lora is None else f"\n\nTrained with LoRA adapters ({_shown(options.lora)}), merged."
    return _sources(options) + adapters


def _sources(options: ModelOptions) -> str:
    if options.pretrained is not None:
        return (
            f"Encoders, fusion and heads of the same name: mmbert model {_shown(options.pretrained)}; the rest random."
        )
    sources = {"Text encoder": options.text_pretrained, "Image encoder": options.image_pretrained}
    return "\n".join(f"- {part}: {'random' if source is None else _shown(source)}" for part, source in sources.items())


def _metrics(metrics: Mapping[str, Any], outcomes: Mapping[str, Mapping[str, ItemOutcomes]]) -> str:
    rows = [(name, value) for name, value in metrics.items() if not name.startswith(("run/", "train/"))]
    rows = [(name, value) for name, value in rows if isinstance(value, int | float)]
    if not rows:
        return "Not tested yet."
    lines = ["| metric | value | 95 % interval |", "|---|---|---|"]
    for name, value in rows:
        split, _, metric = name.partition("/")
        found = outcomes.get(split, {}).get(metric)
        interval = None if found is None else confidence_interval(found)
        shown = "" if interval is None else f"{max(0.0, interval[0]):.4g} to {min(1.0, interval[1]):.4g}"
        lines.append(f"| {name} | {value:.4g} | {shown} |")
    return "\n".join(lines)


def _cost(metrics: Mapping[str, Any], seed: int) -> str:
    keys = {
        "run/parameters": "parameters", "run/steps": "optimizer steps", "run/samples_seen": "samples seen",
        "run/training_seconds": "seconds of training", "run/peak_memory_bytes": "bytes of memory at the peak",
        "run/precision": "precision",
    }  # fmt: skip
    lines = [f"- seed: {seed}"]
    for key, text in keys.items():
        if key in metrics:
            value = metrics[key]
            lines.append(f"- {text}: {f'{value:,.0f}' if isinstance(value, int | float) else value}")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    """Format a value of the options; of an absolute path only its last part, as the rest is the trainer's machine."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_shown(entry)}" for key, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    text = str(value)
    return f"`{Path(text).name if Path(text).is_absolute() else text}`"
