"""Whatever a batch holds, losses and gradients are finite numbers."""

import pytest
import torch
from tiers import tier
from tiny import CLS, MASK, SEP, VOCAB, tiny_config

from mmbert.model.fusion import FUSIONS
from mmbert.model.modeling import MMBertForPreTraining
from mmbert.model.tokens import IGNORE_INDEX, NO_TEXT

BATCHES = tier(40, 1000)  # for each strategy
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def any_batch(seed: int) -> dict[str, torch.Tensor]:
    """1 to 6 rows, maybe all padding, maybe without a mask, of one image or caption, with images of any range."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    size, length = int(draw(1, 7)), int(draw(1, 17))
    lengths = draw(0, length + 1, size)
    mask = (torch.arange(length) < lengths[:, None]).long()
    input_ids = draw(5, VOCAB, size, length) * mask
    input_ids[:, 0] = torch.where(lengths > 0, CLS, 0)
    input_ids[torch.arange(size), (lengths - 1).clamp(min=0)] = torch.where(lengths > 0, SEP, 0)
    share = float(draw(0, 3)) / 2  # nothing, half or all of what is no special token
    chosen = (torch.rand(size, length, generator=generator) < share) & (input_ids > 4)
    scale = 10.0 ** int(draw(-6, 4))
    images = torch.randn(size, 3, 16, 16, generator=generator) * scale
    keys = draw(0, int(draw(1, 6)), size)
    return {
        "index": torch.arange(size),
        "input_ids": input_ids,
        "attention_mask": mask,
        "mlm_input_ids": torch.where(chosen, MASK, input_ids),
        "mlm_labels": torch.where(chosen, input_ids, IGNORE_INDEX),
        "pixel_values": images,
        "image_key": keys,
        "text_key": keys * 7 % 3,
        "image_text_keys": torch.stack([keys * 7 % 3, torch.full_like(keys, NO_TEXT)], dim=1),
    }


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_any_batch_gives_finite_losses_and_gradients(fusion: str, precision: str) -> None:
    torch.manual_seed(0)
    objectives = {"mlm": 1.0, "itm": {"negatives": "hard"}, "itc": {"embedding_size": 8}, "rtd": 1.0, "mim": 1.0}
    layers = {"text_layers": 2, "image_layers": 2, "fusion_layers": 2}
    model = MMBertForPreTraining(tiny_config(fusion=fusion, objectives=objectives, **layers)).train()
    sizes, empty = set(), 0
    for seed in range(BATCHES):
        batch = any_batch(seed)
        sizes.add(len(batch["index"]))
        empty += bool((batch["attention_mask"].sum(dim=1) == 0).any())
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=AUTOCAST.get(precision), enabled=precision in AUTOCAST):
            output = model(**batch, generator=torch.Generator().manual_seed(seed))
        assert output.loss.isfinite(), (seed, output)
        output.loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), (seed, name)
    assert 1 in sizes and empty > BATCHES // 10, "batches of one row and rows of padding were met"
