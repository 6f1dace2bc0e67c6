"""Parity of imported checkpoints: a model of transformers with random weights is saved, imported and compared."""

from pathlib import Path
from typing import Any

import torch
from tiny import randomize, tiny_tokenizer
from torch import Tensor, nn

import mmbert
from mmbert.inference.importing import import_checkpoint

LIMIT = 1e-5
"""Largest allowed difference of an output in fp32."""


def import_model(theirs: Any, folder: Path, **options: Any) -> Any:
    """Draw the weights of a model of transformers anew, save it, import it, and load what was written."""
    randomize(theirs)
    for module in theirs.modules():  # their padding rows are zero, and ours are never read
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            nn.init.zeros_(module.weight[module.padding_idx])
    theirs.eval().save_pretrained(folder / "theirs")
    return import_folder(folder, **options)


def import_folder(folder: Path, **options: Any) -> Any:
    """Import the checkpoint in `folder`/theirs to `folder`/own and load it."""
    tokenizer = options.pop("tokenizer", None)
    if tokenizer is None:
        tiny_tokenizer().save_pretrained(folder / "tokenizer")
        tokenizer = str(folder / "tokenizer")
    account = import_checkpoint(str(folder / "theirs"), folder / "own", tokenizer=tokenizer, **options)
    assert not account.is_partial or options.get("partial")
    return mmbert.load(folder / "own", device="cpu").model


def texts(size: int = 4, length: int = 8, *, vocabulary: int = 40, pad: int = 0, first: int = 5) -> dict[str, Tensor]:
    """Random texts of different length, padded at the end."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(first, vocabulary, (size, length), generator=generator)
    mask = torch.ones_like(input_ids)
    for row in range(size):
        mask[row, length - row :] = 0 if row else 1
    return {"input_ids": torch.where(mask.bool(), input_ids, pad), "attention_mask": mask}


def images(size: int = 4, side: int = 16) -> Tensor:
    """Random normalised images."""
    return torch.randn(size, 3, side, side, generator=torch.Generator().manual_seed(1))


def difference(own: Tensor | None, theirs: Tensor | None, mask: Tensor | None = None) -> float:
    """Largest absolute difference, at the positions of `mask` where there is one."""
    assert own is not None and theirs is not None and own.shape == theirs.shape
    if mask is not None:
        own, theirs = own[mask.bool()], theirs[mask.bool()]
    assert theirs.std() > 1e-4, "the outputs are all alike, so they show nothing"
    return (own - theirs).abs().max().item()
