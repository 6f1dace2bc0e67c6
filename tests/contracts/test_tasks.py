"""Contract of every task under every fusion strategy, with zero, one and two images per text."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import randomize, tiny_batch, tiny_config, tiny_examples, tiny_processor

from mmbert.data.labelled_samples import CollateLabelled, LabelledSamples, shuffled_images
from mmbert.data.readers.labelled import LabelledExample
from mmbert.errors import UsageError
from mmbert.evaluation.tasks import TaskEvaluation
from mmbert.model.fusion import FUSIONS
from mmbert.model.initialization import build_model
from mmbert.model.modeling import MMBertForTask
from mmbert.model.options import ModelOptions
from mmbert.model.tasks import TASKS
from mmbert.training import assembly
from mmbert.training.optim import parameter_groups
from mmbert.training.options import OptimOptions

LABELS = ["no", "yes", "maybe"]
every_task = pytest.mark.parametrize("task", TASKS)
every_fusion = pytest.mark.parametrize("fusion", FUSIONS)
every_option = pytest.mark.parametrize(
    ("task", "options"),
    [("vqa", {"loss": "sigmoid"}), ("vqa", {"loss": "softmax"}), ("decision", {"initial_bias": "prior"})],
)
images_each = pytest.mark.parametrize("images", [0, 1, 2])


def model_of(
    task: str, fusion: str = "hybrid", images: int = 1, options: dict[str, Any] | None = None
) -> MMBertForTask:
    torch.manual_seed(0)
    config = tiny_config(task=task, fusion=fusion, labels=LABELS, num_images=images, task_options=options)
    model = MMBertForTask(config).eval()
    randomize(model)
    return model


def batch_of(images: int, size: int = 4, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    batch = tiny_batch(size, dtype=dtype)
    batch = {k: batch[k] for k in ("index", "input_ids", "attention_mask")} | {
        "label_scores": torch.eye(3, dtype=dtype).repeat(size, 1)[:size]
    }
    if images:
        generator = torch.Generator().manual_seed(1)
        batch["pixel_values"] = torch.randn(size * images, 3, 16, 16, generator=generator, dtype=dtype)
    return batch


@every_task
@every_fusion
@images_each
def test_every_head_weight_and_the_text_get_gradients(task: str, fusion: str, images: int) -> None:
    model = model_of(task, fusion, images)
    output = model(**batch_of(images))
    output.loss.backward()
    assert output.loss.isfinite() and output.objectives[task].logits.shape == (4, 3)
    for name, parameter in model.named_parameters():
        if name.startswith("task."):
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert model.mmbert.word_embeddings.grad.abs().sum() > 0
    image_grads = [p.grad for p in model.mmbert.image_encoder.parameters()]
    assert (images > 0) == any(g is not None and g.abs().sum() > 0 for g in image_grads)


@every_task
@images_each
def test_rows_do_not_depend_on_their_batch(task: str, images: int) -> None:
    model = model_of(task, images=images).double()
    full = batch_of(images, dtype=torch.float64)
    logits = model(**full).objectives[task].logits
    for row in range(4):
        alone = {k: v[row : row + 1] for k, v in full.items() if k != "pixel_values"}
        if images:
            alone["pixel_values"] = full["pixel_values"][row * images : (row + 1) * images]
        torch.testing.assert_close(model(**alone).objectives[task].logits[0], logits[row], rtol=0, atol=1e-12)


@every_task
def test_second_image_counts_and_the_order_of_images_too(task: str) -> None:
    model, batch = model_of(task, images=2), batch_of(2)
    first = model(**batch).objectives[task].logits
    other = {**batch, "pixel_values": batch["pixel_values"].clone()}
    other["pixel_values"][1] += 1.0
    changed = (model(**other).objectives[task].logits != first).any(dim=1)
    assert changed.tolist() == [True, False, False, False]


@every_task
def test_saving_and_loading_keeps_labels_and_bits(task: str, tmp_path: Path) -> None:
    model, batch = model_of(task, images=2), batch_of(2)
    model.save_pretrained(tmp_path)
    loaded = MMBertForTask.from_pretrained(tmp_path).eval()
    assert loaded.task.labels == LABELS and loaded.config.num_images == 2 and loaded.config.task == task
    assert torch.equal(loaded(**batch).objectives[task].logits, model(**batch).objectives[task].logits)


@every_option
def test_saving_and_loading_keeps_options_and_loss(task: str, options: dict[str, Any], tmp_path: Path) -> None:
    model, batch = model_of(task, options=options), batch_of(1)
    model.save_pretrained(tmp_path)
    loaded = MMBertForTask.from_pretrained(tmp_path).eval()
    assert loaded.config.task_options == options and loaded.task.label_loss is model.task.label_loss
    assert torch.equal(loaded(**batch).loss, model(**batch).loss)


@every_task
def test_config_saved_before_there_were_options_has_the_defaults(task: str, tmp_path: Path) -> None:
    model = model_of(task)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    saved.pop("task_options", None)
    (tmp_path / "config.json").write_text(json.dumps(saved))
    loaded = MMBertForTask.from_pretrained(tmp_path)
    assert loaded.task.label_loss is model.task.label_loss
    assert type(loaded.task.label_loss).__name__ == {"vqa": "SigmoidLoss", "decision": "SoftmaxLoss"}[task]


@every_task
def test_unknown_option_is_rejected_and_every_allowed_one_exists(task: str) -> None:
    with pytest.raises(UsageError, match=r"has no option 'initial_bia'.* Did you mean 'initial_bias'\?") as error:
        model_of(task, options={"initial_bia": "prior"})
    allowed = re.findall(r"allowed are ([\w, ]+)\.", str(error.value))[0].split(", ")
    choices = {"initial_bias", "head"} | ({"loss"} if task == "vqa" else set())
    assert set(allowed) == choices | {"head_norm_eps"}
    with pytest.raises(UsageError, match=r"task_options\.head_norm_eps='zeros': must be a number above 0"):
        model_of(task, options={"head_norm_eps": "zeros"})
    for option in sorted(choices):
        with pytest.raises(UsageError, match=rf"task_options\.{option}='zeros'; allowed are") as error:
            model_of(task, options={option: "zeros"})
        for value in re.findall(r"allowed are ([\w, ]+)\.", str(error.value))[0].split(", "):
            assert model_of(task, options={option: value}).config.task_options == {option: value}
    with pytest.raises(UsageError, match=r"Did you mean 'zero'\?"):
        model_of(task, options={"initial_bias": "zeros"})
    with pytest.raises(UsageError, match=r"task_options=\{'initial_bias': 'zero'\} without a task; .* vqa, decision"):
        tiny_config(task_options={"initial_bias": "zero"})


PRIOR = [{0: 1.0}, {1: 1.0}, {1: 1.0}, {1: 1.0}, {2: 1.0}, {2: 1.0}]
"""Label scores: one example of "no", three of "yes" and two of "maybe"."""


def prior_batch(images: int) -> dict[str, torch.Tensor]:
    return {**batch_of(images, size=6), "label_scores": torch.eye(3)[[0, 1, 1, 1, 2, 2]]}


@every_option
@every_fusion
@images_each
def test_first_loss_is_the_entropy_of_the_labels(task: str, options: dict[str, Any], fusion: str, images: int) -> None:
    """Within 2 %, as the weights of the head stay as drawn."""
    torch.manual_seed(0)
    config = tiny_config(task=task, fusion=fusion, labels=LABELS, num_images=images, task_options=options)
    model, batch = MMBertForTask(config).eval(), prior_batch(images)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model.task.start_at_prior(PRIOR)
    assert [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])] == [
        "task.head.3.bias"
    ]
    shares = [1 / 6, 3 / 6, 2 / 6]
    entropy = -sum(p * math.log(p) for p in shares)
    if options.get("loss") == "sigmoid":
        entropy -= sum((1 - p) * math.log(1 - p) for p in shares)
    assert expected == pytest.approx(entropy, rel=1e-9)
    assert model(**batch).loss.item() == pytest.approx(entropy, rel=0.02)
    blank = {k: torch.zeros_like(v) if k == "pixel_values" else v for k, v in batch.items()}
    for inputs in (batch, blank):
        logits = model(**inputs).objectives[task].logits
        assert logits.argmax(dim=-1).tolist() == [1] * 6, "the most frequent label"
        torch.testing.assert_close(model.task.probabilities(logits), torch.tensor([shares] * 6), rtol=0, atol=0.1)


@every_option
def test_only_sigmoids_have_a_loss_without_a_known_label(task: str, options: dict[str, Any]) -> None:
    model, batch = model_of(task, options=options), batch_of(1)
    known = {key: value[:3] for key, value in batch.items()}
    batch["label_scores"][3] = 0
    output, alone = model(**batch).objectives[task], model(**known).objectives[task]
    sigmoid = options.get("loss") == "sigmoid"
    assert model.task.has_target({}) == sigmoid and model.task.has_target({0: 1.0})
    assert (len(output.targets), int(output.left_out)) == ((4, 0) if sigmoid else (3, 1))
    torch.testing.assert_close(output.logits[:3], alone.logits)
    if not sigmoid:
        torch.testing.assert_close(output.loss, alone.loss)


@every_task
def test_only_new_heads_start_at_the_prior(task: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A folder's head of the same labels is trained; one of other labels only has the same shape."""
    caplog.set_level("INFO", logger="mmbert")
    data: Any = SimpleNamespace(train_samples=SimpleNamespace(scores=PRIOR))

    def started(model: MMBertForTask, pretrained: str | None) -> bool:
        caplog.clear()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        assembly._start_new_head_at_prior(model, pretrained, data)
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert changed in (set(), {"task.head.3.bias"})
        assert bool(changed) == ("is the prior of 3 labels in 6 training examples" in caplog.text)
        return bool(changed)

    assert started(model_of(task), None)
    assert not started(model_of(task, options={"initial_bias": "zero"}), None)
    model = model_of(task)
    model.save_pretrained(tmp_path)
    assert not started(model, str(tmp_path))
    assert started(MMBertForTask(tiny_config(task=task, labels=["a", "b", "c"])), str(tmp_path))
    assert started(model_of(task, images=2), str(tmp_path))


@every_task
def test_head_for_other_labels_is_not_loaded(task: str, tmp_path: Path) -> None:
    model = model_of(task)
    model.save_pretrained(tmp_path)
    for labels in (LABELS, ["a", "b", "c"]):
        built = build_model(ModelOptions(pretrained=str(tmp_path), task=task), labels=labels)
        for name, value in built.state_dict().items():
            is_head = name.startswith("task.")
            assert torch.equal(value, model.state_dict()[name]) == (labels == LABELS or not is_head), name


def test_head_is_evaluated_with_the_options_of_its_training(tmp_path: Path) -> None:
    model_of("vqa", options={"loss": "softmax"}).save_pretrained(tmp_path)
    for options, raises in (({"loss": "softmax"}, False), (None, True)):
        start = ModelOptions(pretrained=str(tmp_path), task="vqa", task_options=options)
        built = build_model(start, labels=LABELS).config
        if raises:
            with pytest.raises(UsageError, match=r"task_options=None, but .* trained with \{'loss': 'softmax'\}"):
                assembly.validate_heads(start, built)
        else:
            assembly.validate_heads(start, built)


@every_task
def test_head_has_its_own_learning_rate_and_every_parameter_one_group(task: str) -> None:
    model = model_of(task)
    groups = parameter_groups(model, OptimOptions(lr=1e-3, head_lr_factor=10))
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    heads = {id(p) for group in groups if group["lr"] == pytest.approx(1e-2) for p in group["params"]}
    assert heads == {id(p) for p in model.task.parameters()}


def labelled(folder: Path, size: int = 7) -> list[LabelledExample]:
    files = [e.image for e in tiny_examples(folder, [("a cat",)] * 3)]
    texts = ("a red cat", "the dog runs", "two cats and a big dog in the street")
    return [
        LabelledExample((files[i % 3],), texts[i % 2] if i % 3 else texts[2], (LABELS[i % 2],) * 10, i, "val", f"f:{i}")
        for i in range(size)
    ]


def evaluation(task: str, folder: Path, size: int, order: list[int]) -> TaskEvaluation:
    examples = labelled(folder)
    scores = [TASKS[task].scores(e.answers, {label: i for i, label in enumerate(LABELS)}) for e in examples]
    processor = tiny_processor()
    samples = LabelledSamples(examples, scores, processor, seed=0, augmentation=None)
    found = TaskEvaluation(model_of(task), samples, TASKS[task].priors(examples, scores))
    collate = CollateLabelled(processor.pad_token_id, len(LABELS))
    for first in range(0, len(order), size):
        batch = collate([samples[i] for i in order[first : first + size]])
        for key in ("pixel_values", "wrong_pixel_values"):
            batch[key] = processor.image_settings.normalize(batch[key])
        found.step(batch)
    return found


@every_task
def test_results_do_not_depend_on_batches_order_or_repeats(task: str, tmp_path: Path) -> None:
    full = evaluation(task, tmp_path, 7, list(range(7)))
    for size, order in ((1, list(range(7))), (3, [6, 2, 0, 1, 5, 3, 4]), (4, [0, 1, 2, 3, 4, 5, 6, 6, 0])):
        other = evaluation(task, tmp_path, size, order)
        assert other.predictions() == full.predictions()
        assert other.metrics() == pytest.approx(full.metrics(), rel=1e-5)
    kinds = {"accuracy", "accuracy_blank", "accuracy_shuffled", "accuracy_no_text"}
    expected = {"loss", *kinds, "prior_majority", "prior_text", "ceiling"}
    assert {f"{task}_{name}" for name in expected} <= set(full.metrics())
    assert full.metrics()[f"{task}_ceiling"] == 1.0
    items = full.outcomes()
    assert set(items) == {f"{task}_{name}" for name in kinds}
    for name, found in items.items():
        assert sum(found.values) / len(found.values) == pytest.approx(full.metrics()[name], abs=1e-12)
        assert found.images == [0, 1, 2, 0, 1, 2, 0], "three images take turns"


@every_task
def test_without_text_only_the_image_counts(task: str, tmp_path: Path) -> None:
    """Examples 0, 3 and 6 share an image, and have different texts of different lengths."""
    judged = evaluation(task, tmp_path, 3, list(range(7)))
    results, model = judged.merged_predictions(), model_of(task)
    empty = torch.tensor([[2, 3]])  # [CLS] [SEP]
    batch = {
        "input_ids": torch.tensor([[2, 9, 8, 3, 0], [2, 7, 3, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]),
    }
    with torch.no_grad():
        expected = model.mmbert.encode_text(empty).rows(torch.tensor([0, 0]))
        assert torch.equal(judged._empty(batch).hidden_states, expected.hidden_states)
    image = tiny_processor().pixel_values(labelled(tmp_path)[0].image)[None]
    text = model.mmbert.encode_text(empty)
    image = model.mmbert.encode_image(tiny_processor().image_settings.normalize(image))
    label = int(model.task.logits(model.task.pooled(model.mmbert, text, image)).argmax())
    assert [results[i].no_text for i in (0, 3, 6)] == [label] * 3


def test_shuffled_images_differ_and_are_the_same_for_all_texts_of_an_image(tmp_path: Path) -> None:
    examples = labelled(tmp_path, 30)
    wrong = shuffled_images(examples, seed=0)
    by_image: dict[object, set[object]] = {}
    for example, other in zip(examples, wrong, strict=True):
        assert examples[other].images != example.images
        by_image.setdefault(example.images, set()).add(examples[other].images)
    assert all(len(others) == 1 for others in by_image.values())
    assert shuffled_images(examples[:1], seed=0).tolist() == [0]
