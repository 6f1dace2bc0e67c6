"""Foils: accuracy from hand-made scores, ties, blank and shuffled images."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranking import tiny_model
from tiny import tiny_examples, tiny_processor

from mmbert.data.readers.foils import Foil
from mmbert.errors import UsageError
from mmbert.evaluation import foils as module
from mmbert.evaluation.foils import foil_metrics, shuffled_images

TEXTS = [("a red cat", "a blue cat"), ("a dog", "a bird"), ("the street", "the tree"), ("a car", "A car")]


@pytest.fixture
def foils(tmp_path: Path) -> list[Foil]:
    """Three images, the first with two records; both texts of the last record have the same token ids."""
    images = [example.image for example in tiny_examples(tmp_path, [("x",)] * 3)]
    images = [images[i] for i in (0, 0, 1, 2)]
    kinds = ["attribute", "object", "object", "same"]
    return [
        Foil(image, *texts, kind, "f.json", f"f.json:{i}")  # pyright: ignore
        for i, (image, texts, kind) in enumerate(zip(images, TEXTS, kinds, strict=True))
    ]


def test_accuracy_with_hand_made_scores(foils: list[Foil], monkeypatch: pytest.MonkeyPatch) -> None:
    # Distinct texts: 0 a red cat, 1 a blue cat, 2 a dog, 3 a bird, 4 the street, 5 the tree, 6 a car. Image 3: blank.
    table = torch.tensor(
        [
            [2.0, 1.0, 1.0, 1.0, 0.0, 0.0, 5.0],  # cat: a hit; dog and bird tie: a miss
            [0.0, 1.0, 3.0, 1.0, 2.0, 1.0, 5.0],  # street: a hit
            [0.0, 1.0, 3.0, 1.0, 1.0, 2.0, 5.0],
            [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 5.0],
        ]
    )
    monkeypatch.setattr(module, "_scores", lambda model, encoded, pairs, scorer: table[pairs[:, 0], pairs[:, 1]])
    first, second = foils[0].image, foils[2].image
    monkeypatch.setattr(module, "shuffled_images", lambda *_: [second, second, first, None])
    assert foil_metrics(tiny_model(), tiny_processor(), foils) == {
        "attribute": {"count": 1, "accuracy": 1.0, "blank": 1.0, "shuffled": 0.0},
        "object": {"count": 2, "accuracy": 0.5, "blank": 0.0, "shuffled": 0.5},
        "same": {"count": 1, "accuracy": 0.0, "blank": 0.0, "shuffled": None},
        "overall": {"count": 4, "accuracy": 0.5, "blank": 0.25, "shuffled": 1 / 3},
    }


@pytest.mark.parametrize("scorer", ["itm", "itc"])
@torch.no_grad()
def test_scores_are_those_of_each_pair_alone(scorer: str, foils: list[Foil]) -> None:
    model, processor = tiny_model(), tiny_processor()
    head: Any = model.objectives[scorer]

    def score(image: Path, text: str) -> float:
        prepared = processor(text=text, images=image)
        words = model.mmbert.encode_text(prepared["input_ids"], prepared["attention_mask"])
        patches = model.mmbert.encode_image(prepared["pixel_values"])
        if scorer == "itc":
            return float(head.embed_text(words)[0] @ head.embed_image(patches)[0])
        return float(head.score(model.mmbert.fuse(words, patches).pooled))

    metrics = foil_metrics(model, processor, foils, scorer=scorer, batch_size=2)
    hits = [score(foil.image, foil.caption) > score(foil.image, foil.foil) for foil in foils[:3]]
    assert metrics["overall"]["accuracy"] == sum(hits) / 4
    shuffled = zip(foils, shuffled_images(foils, 0), strict=True)
    hits = [score(other, foil.caption) > score(other, foil.foil) for foil, other in shuffled][:3]
    assert metrics["overall"]["shuffled"] == sum(hits) / 4


def test_shuffled_image_is_another_one_of_the_same_file(foils: list[Foil]) -> None:
    more = [foil._replace(file="g.json") for foil in foils[:3]] + [foils[0]._replace(file="h.json")]
    for seed in range(20):
        other = shuffled_images(foils + more, seed)
        assert all(o != foil.image for o, foil in zip(other, foils + more, strict=True))
        assert other[0] == other[1], "records of one image get the same other image"
        assert set(other[4:7]) == {foils[0].image, foils[2].image} and other[7] is None
        assert other[:4] == shuffled_images(foils, seed), "other files make no difference"
    assert len({tuple(shuffled_images(foils, seed)) for seed in range(20)}) == 2


def test_scorer_without_its_objective_raises(foils: list[Foil]) -> None:
    with pytest.raises(UsageError, match="scorer='itc' for a model with the objectives itm; allowed are itm"):
        foil_metrics(tiny_model(objectives={"itm": 1.0}), tiny_processor(), foils, scorer="itc")
    with pytest.raises(UsageError, match="train one with itm, itc or both"):
        foil_metrics(tiny_model(objectives={"mlm": 1.0}), tiny_processor(), foils)
