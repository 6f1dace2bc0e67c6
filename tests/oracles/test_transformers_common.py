"""What the common model tests of transformers check, for each family of strategies and each kind of head.

A test here has the name of transformers' test. `NOT_APPLICABLE` lists those that do not apply, each with its reason.
"""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCAB, inputs, randomize, tiny_batch, tiny_config
from torch import Tensor

from mmbert.model.auto_classes import MMBertForQuestionAnswering
from mmbert.model.modeling import MMBertForPreTraining, MMBertModel

NOT_APPLICABLE = {
    "test_inputs_embeds": "texts are given as input_ids, as word embeddings alone have no masked tokens to count",
    "test_inputs_embeds_matches_input_ids": "as test_inputs_embeds",
    "test_tied_weights_keys": "no weights are tied: the MLM head reads the word embeddings when it is called",
    "test_tie_model_weights": "as test_tied_weights_keys",
    "test_load_save_without_tied_weights": "as test_tied_weights_keys",
    "test_resize_embeddings_untied": "as test_tied_weights_keys",
    "test_feed_forward_chunking": "the fusion layers have no chunking: their sequences are a caption and an image long",
    "test_problem_types": "the loss of a task is an option of its configuration, task_options.loss",
    "test_load_with_mismatched_shapes": "a head of other labels is another model; model.pretrained keeps what fits",
    "test_generate": "encoders generate no text; so are all tests of GenerationTesterMixin",
    "test_past_key_values_format": "as test_generate",
    "test_eager_matches_sdpa_inference": "the attention kernel follows from the device, and contracts/ compares both",
    "test_flash_attn_2_inference_equivalence": "no flash-attention package is used",
    "test_flex_attention_with_grads": "no flex attention is used",
    "test_model_parallelism": "several GPUs train with DDP or FSDP2, see tests/runs/test_processes.py",
    "test_disk_offload_safetensors": "needs accelerate, which mmbert does not use",
    "test_cpu_offload": "as test_disk_offload_safetensors",
    "test_can_use_device_map": "as test_disk_offload_safetensors",
    "test_bc_torch_dtype": "there are no saved models of older versions",
    "test_custom_4d_attention_mask": "masks say which tokens are padding; every real token is visible",
    "test_keep_in_fp32_modules": "no module needs fp32: logits and losses are computed in fp32 by the heads",
}

LABELS = torch.full((4, 8), -100).index_fill(1, torch.tensor([1]), 7)
HEADS: dict[type, dict[str, Any]] = {
    MMBertModel: {},
    MMBertForPreTraining: {"labels": LABELS, "match_labels": torch.tensor([1, 0, 1, 0]), "return_loss": True},
    MMBertForQuestionAnswering: {"labels": torch.tensor([0, 1, 1, 0])},
}
every_model = pytest.mark.parametrize("cls", HEADS)
every_head = pytest.mark.parametrize("cls", [cls for cls, labels in HEADS.items() if labels])
every_family = pytest.mark.parametrize("fusion", ["early", "late", "hybrid"])
BATCH = inputs(tiny_batch())


def built(cls: Any, fusion: str, **overrides: Any) -> Any:
    torch.manual_seed(0)
    model = cls(tiny_config(fusion=fusion, labels=["no", "yes"], **overrides)).eval()
    randomize(model)
    return model


def assert_equal(first: Any, second: Any, tolerance: float = 0.0) -> None:
    """Compare outputs, tuples or tensors."""
    if isinstance(first, Tensor):
        torch.testing.assert_close(first, second, rtol=0, atol=tolerance)
    elif first is not None:
        pairs = zip(*(x.to_tuple() if hasattr(x, "to_tuple") else x for x in (first, second)), strict=True)
        for a, b in pairs:
            assert_equal(a, b, tolerance)


def test_reasons_are_given_for_what_is_left_out() -> None:
    assert all(name.startswith("test_") and len(reason) > 10 for name, reason in NOT_APPLICABLE.items())
    assert not NOT_APPLICABLE.keys() & globals().keys()


@every_model
@every_family
def test_save_load(cls: Any, fusion: str, tmp_path: Path) -> None:
    """Also test_save_load_keys_to_ignore, test_can_use_safetensors, test_from_pretrained_no_checkpoint."""
    model = built(cls, fusion)
    model.save_pretrained(tmp_path)
    loaded, report = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_equal(loaded.eval()(**BATCH), model(**BATCH))
    assert_equal(
        cls.from_pretrained(None, config=model.config, state_dict=model.state_dict()).eval()(**BATCH), loaded(**BATCH)
    )


@every_model
@every_family
def test_determinism(cls: Any, fusion: str) -> None:
    model = built(cls, fusion)
    assert_equal(model(**BATCH), model(**BATCH))


@every_model
def test_forward_signature(cls: Any) -> None:
    names = [*inspect.signature(cls.forward).parameters]
    assert names[1] == cls.main_input_name == "input_ids"
    assert {"attention_mask", "token_type_ids", "pixel_values", "output_attentions", "output_hidden_states"} < {*names}


@every_model
@every_family
def test_model_outputs_equivalence(cls: Any, fusion: str) -> None:
    model = built(cls, fusion)
    options = {**HEADS[cls], "output_hidden_states": True, "output_attentions": True}
    assert_equal(model(**BATCH, **options, return_dict=False), model(**BATCH, **options))


@every_model
@every_family
def test_hidden_states_output(cls: Any, fusion: str) -> None:
    """Also test_attention_outputs and test_config_attn_output: by argument and by configuration."""
    model = built(cls, fusion)
    assert "hidden_states" not in model(**BATCH) and "attentions" not in model(**BATCH)
    by_argument = model(**BATCH, output_hidden_states=True, output_attentions=True)
    model.config.output_hidden_states = True
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    by_configuration = model(**BATCH)
    layers = {"early": (1, 1), "late": (0, 0), "hybrid": (2, 4)}[fusion]
    assert len(by_argument.hidden_states) == 3 + layers[0] and len(by_argument.attentions) == 2 + layers[1]
    assert_equal(by_argument, by_configuration)


@every_model
@every_family
def test_retain_grad_hidden_states_attentions(cls: Any, fusion: str) -> None:
    model = built(cls, fusion)
    output = model(**BATCH, output_hidden_states=True, output_attentions=True)
    kept = [output.hidden_states[0], output.attentions[0]]
    for tensor in kept:
        tensor.retain_grad()
    output[0].flatten()[0].backward()
    assert all(tensor.grad is not None for tensor in kept)


@every_head
@every_family
def test_training(cls: Any, fusion: str) -> None:
    """Also test_training_gradient_checkpointing: the same gradients; every parameter that a loss depends on has one."""
    gradients = []
    for checkpointing in (False, True):
        model = built(cls, fusion, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**BATCH, **HEADS[cls]).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(gradient, checkpointed[name], rtol=0, atol=1e-6)
    lacking = {name for name, p in model.named_parameters() if p.requires_grad} - plain.keys()
    assert not [name for name in lacking if "absent_" not in name and "pooler" not in name]


@every_model
@every_family
def test_batching_equivalence(cls: Any, fusion: str) -> None:
    model = built(cls, fusion)
    together = model(**BATCH)
    alone = model(**{name: value[:1] for name, value in BATCH.items()})
    for name in together:
        if not name.startswith("logits_per_"):  # those are over the pairs of the batch
            assert_equal(together[name][:1], alone[name], tolerance=1e-5)


@every_model
def test_resize_tokens_embeddings(cls: Any) -> None:
    """Also test_model_get_set_embeddings."""
    model = built(cls, "hybrid")
    before = model.get_input_embeddings().weight.detach().clone()
    assert model.resize_token_embeddings(VOCAB + 10) is model.get_input_embeddings()
    assert model.config.vocab_size == VOCAB + 10
    assert torch.equal(model.get_input_embeddings().weight[:VOCAB], before)
    ids = BATCH["input_ids"].index_fill(1, torch.tensor([1]), VOCAB + 9)
    assert model(**{**BATCH, "input_ids": ids})[0].isfinite().all()
    model.resize_token_embeddings(VOCAB)
    assert torch.equal(model.get_input_embeddings().weight, before)


@every_model
@every_family
def test_initialization(cls: Any, fusion: str) -> None:
    """Also test_model_base_model_prefix."""
    model = cls(tiny_config(fusion=fusion, labels=["no", "yes"]))
    assert all(p.isfinite().all() and abs(p.mean()) < 1.1 for p in model.parameters() if p.numel() > 1)
    assert isinstance(model.base_model, MMBertModel)


@every_model
def test_model_weights_reload_in_half_precision(cls: Any, tmp_path: Path) -> None:
    """transformers: test_can_load_with_dtype."""
    built(cls, "hybrid").save_pretrained(tmp_path)
    model = cls.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(**BATCH)[0].isfinite().all()


@every_model
def test_config_is_saved_with_its_class(cls: Any, tmp_path: Path) -> None:
    """transformers: test_config."""
    model = built(cls, "hybrid")
    model.save_pretrained(tmp_path)
    assert cls.config_class.from_pretrained(tmp_path).architectures == [cls.__name__]
