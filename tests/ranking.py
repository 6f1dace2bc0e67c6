"""A tiny model with itm and itc, and captions to rank with it."""

from typing import Any

import torch
from tiny import randomize, tiny_config, tiny_processor

from mmbert.evaluation.encoding import EncodedCandidates, encode
from mmbert.evaluation.retrieval import Candidates
from mmbert.model.modeling import MMBertForPreTraining

CAPTIONS = [
    ("a red cat", "a cat on the tree", "two"),
    ("a dog sits in the street", "a red cat"),
    ("the bird",),
    ("two big blue cars on the right", "a small green tree and a red dog runs", "a  Red cat"),
    ("a car", "the street"),
    ("playing dogs in the green street",),
    ("a bird sits on the left car",),
]
"""7 images, 13 texts; "a red cat" occurs three times, once in other case and spacing."""
BOTH = {"itm": 1.0, "itc": {"embedding_size": 8}}


def tiny_model(fusion: str = "hybrid", **overrides: Any) -> MMBertForPreTraining:
    torch.manual_seed(0)
    model = MMBertForPreTraining(tiny_config(fusion=fusion, **{"objectives": BOTH, **overrides})).eval()
    randomize(model)
    return model


def encoded_with(model: MMBertForPreTraining, candidates: Candidates, **options: Any) -> EncodedCandidates:
    return encode(model, tiny_processor(), candidates.images, candidates.texts, **options)
