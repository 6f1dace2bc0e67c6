"""Boxes of the objective boxes: reading them, joining them with images, and moving them with augmentation."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_examples, tiny_processor

from mmbert.data.boxes import ImageBoxes, match_boxes, place_boxes, read_boxes
from mmbert.data.datamodule import PairsDataModule
from mmbert.data.options import DataOptions, check_options
from mmbert.data.samples import Augmentation, Placement, augment
from mmbert.errors import DataError, UsageError
from mmbert.model.objectives.boxes import patches_of_boxes
from mmbert.model.tokens import NO_BOX, NOT_LABELLED

CAPTIONS = [("a red cat",), ("two dogs",), ("a blue bird",)]


def instances(**changes: Any) -> dict[str, Any]:
    """Two images of 16 x 16 pixels: a cat over the left half and a dog over the lower quarter of image 0."""
    boxes = [{"image_id": 0, "category_id": 7, "bbox": [0, 0, 8, 16]}]
    boxes.append({"image_id": 0, "category_id": 3, "bbox": [0, 12.0, 16, 4]})
    return {
        "images": [{"id": i, "file_name": f"train/{i}.png", "width": 16, "height": 16} for i in range(2)],
        "annotations": boxes,
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}, {"id": 9, "name": "tree"}],
        **changes,
    }


def written(folder: Path, content: dict[str, Any], name: str = "instances.json") -> Path:
    file = folder / name
    file.write_text(json.dumps(content))
    return file


def matched(folder: Path, content: dict[str, Any]) -> tuple[list[ImageBoxes], dict[str, float]]:
    """Boxes of three images, which have other ids than the file: their names count."""
    examples, file = tiny_examples(folder, CAPTIONS), written(folder, content)
    return match_boxes(examples, read_boxes([file]), tiny_processor().load, place=str(file))


def test_boxes_are_joined_by_id_or_name_with_the_fractions_that_they_cover(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of two images cats cover a half of one, and dogs a quarter; image 1 has no box and image 2 no entry."""
    boxes, covered = matched(tmp_path, instances())
    assert covered == {"cat": 0.25, "dog": 0.125}, "no tree"
    assert boxes[0].corners.tolist() == [[0, 0, 0.5, 1], [0, 0.75, 1, 1]] and boxes[0].classes.tolist() == [0, 1]
    assert boxes[1].corners.shape == (0, 4) and boxes[1].classes.tolist() == []
    assert boxes[2].classes.tolist() == [NOT_LABELLED]
    assert "1 of 3 training images are not in" in caplog.text and "(first: test:2)" in caplog.text
    by_id = instances(images=[{"id": "image 1", "file_name": "other.png", "width": 16, "height": 16}])
    by_id["annotations"] = [{"image_id": "image 1", "category_id": 9, "bbox": [4, 4, 4, 4]}]
    boxes, covered = matched(tmp_path, by_id)
    assert covered == {"tree": 1 / 16} and boxes[1].corners.tolist() == [[0.25, 0.25, 0.5, 0.5]]


def test_several_files_are_read(tmp_path: Path) -> None:
    image = {"id": 5, "file_name": "5.png", "width": 4, "height": 2}
    second = written(tmp_path, instances(images=[image], annotations=[]), "second.json")
    assert [*read_boxes([written(tmp_path, instances()), second])] == ["0", "1", "5"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"annotations": [{"image_id": 0, "category_id": 7, "bbox": [9, 0, 8.5, 16]}]},
            r"\[9, 0, 8\.5, 16\] lies outs",
        ),
        ({"annotations": [{"image_id": 0, "category_id": 7, "bbox": [0, 0, -1, 2]}]}, "none of a size below 0"),
        ({"annotations": [{"image_id": 0, "category_id": 7, "bbox": [0, 0, 2]}]}, r"bbox .*expected \[left, top"),
        ({"annotations": [{"image_id": 0, "category_id": 7, "bbox": [0, 0, "2", 2]}]}, r"expected \[left, top"),
        ({"annotations": [{"image_id": 0, "category_id": 8, "bbox": [0, 0, 2, 2]}]}, r"category_id 8 is no category's"),
        ({"annotations": [{"image_id": 2, "category_id": 7, "bbox": [0, 0, 2, 2]}]}, r"image_id '2' is no image's id"),
        ({"annotations": [{"image_id": 0, "caption": "a cat"}]}, r"annotations\[0\].*no key 'category_id'"),
        ({"categories": [{"id": 7, "name": "cat"}, {"id": 7, "name": "dog"}]}, r"categories\[1\].*'dog', again"),
        ({"images": [{"id": 0, "file_name": "0.png", "width": 0, "height": 16}]}, r"images\[0\].*a size of 0 x 16"),
        ({"images": [{"id": 0, "file_name": "0.png", "width": 8, "height": 8}] * 2}, r"images\[1\].*each id once"),
        ({"images": [{"id": 0, "file_name": "0.png", "width": 16, "height": 24}]}, r"16 x 24 for an image of 16 x 16"),
        ({"images": [{"id": 3, "file_name": "3.png", "width": 16, "height": 16}], "annotations": []}, "no box of any"),
        ({"annotations": []}, r"no box of any of the 3 training images, such as '0\.png' with the id 'image 0'"),
    ],
)
def test_bad_boxes_are_reported_with_their_place(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        matched(tmp_path, instances(**changes))


def test_box_may_lie_a_pixel_outside_and_an_image_may_be_a_smaller_copy(tmp_path: Path) -> None:
    """As COCO's boxes are rounded; the images have 16 x 16 pixels, their entry 64 x 64."""
    images = [{"id": 0, "file_name": "0.png", "width": 64, "height": 64}]
    boxes = [{"image_id": 0, "category_id": 7, "bbox": [32, -1, 32.5, 33]}]
    found, _ = matched(tmp_path, instances(images=images, annotations=boxes))
    assert found[0].corners.tolist() == [[0.5, -1 / 64, 64.5 / 64, 0.5]]


# --- augmentation --------------------------------------------------------------------------------------------------


def test_boxes_follow_crop_and_mirror_by_hand() -> None:
    """The kept part is the right half and the lower three quarters; then left and right are exchanged."""
    boxes = ImageBoxes(np.array([[0.5, 0.25, 0.75, 1.0], [0.25, 0.0, 0.625, 0.5]], np.float32), np.array([0, 1]))
    placement = Placement(left=0.5, top=0.25, width=0.5, height=0.75)
    moved = [[0, 0, 0.5, 1], [-0.5, -1 / 3, 0.25, 1 / 3]]
    np.testing.assert_allclose(place_boxes(boxes, placement).corners, moved, rtol=1e-6)
    mirrored = place_boxes(boxes, placement._replace(is_mirrored=True))
    np.testing.assert_allclose(mirrored.corners, [[0.5, 0, 1, 1], [0.75, -1 / 3, 1.5, 1 / 3]], rtol=1e-6)
    assert mirrored.classes is boxes.classes and place_boxes(boxes, Placement()) is boxes


@pytest.mark.parametrize("seed", range(6))
def test_boxes_are_where_augmentation_puts_the_pixels(seed: int) -> None:
    """A white rectangle in a black image of 60 x 96, resized to a square: its bright pixels are the oracle."""
    image = torch.zeros(3, 60, 96, dtype=torch.uint8)
    image[:, 24:36, 40:64] = 255
    boxes = ImageBoxes(np.array([[40 / 96, 24 / 60, 64 / 96, 36 / 60]], np.float32), np.array([0]))
    settings = tiny_processor(image_size=64).image_settings
    augmentation = Augmentation(crop=0.6, flip=True)
    pixels, placement = augment(image, augmentation, settings, np.random.default_rng(seed), may_mirror=True)
    bright = (pixels[0] > 127).nonzero()
    (top, left), (bottom, right) = bright.min(dim=0).values.tolist(), (bright.max(dim=0).values + 1).tolist()
    found = place_boxes(boxes, placement).corners[0].clip(0, 1) * 64
    assert found.tolist() == pytest.approx([left, top, right, bottom], abs=1.0)


def test_patches_of_a_box_are_those_whose_center_it_covers_or_that_hold_its_center() -> None:
    """A grid of 2 x 4 patches, whose centers are at 1/8, 3/8, 5/8, 7/8 and 1/4, 3/4."""
    corners = torch.tensor(
        [
            [0.0, 0.0, 0.4, 1.0],  # the two columns on the left
            [0.3, 0.2, 0.7, 0.3],  # centers 3/8 and 5/8 of the first row
            [0.76, 0.9, 0.8, 0.95],  # none, but it is in the last patch
            [0.9, 0.0, 1.6, 0.2],  # none, and its center is outside
            [-0.5, 0.5, 1.5, 2.0],  # the second row
        ]
    )
    expected = [[1, 1, 0, 0, 1, 1, 0, 0], [0, 1, 1, 0, 0, 0, 0, 0], [0] * 7 + [1], [0] * 8, [0] * 4 + [1] * 4]
    assert patches_of_boxes(corners[None], 2, 4)[0].int().tolist() == expected


# --- data module ---------------------------------------------------------------------------------------------------


def module(folder: Path, **options: Any) -> PairsDataModule:
    """Three images with captions, of which the last two are mirrored or not."""
    records = [{"image": f"{i}.png", "caption": caption} for i, (caption,) in enumerate(CAPTIONS)]
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (folder / "train.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    settings: dict[str, Any] = {"boxes": str(written(folder, instances())), **options}
    data = DataOptions(
        format="jsonl", annotations={"train": str(folder / "train.jsonl")}, images=str(folder), batch_size=3, **settings
    )
    return PairsDataModule(data, tiny_processor(), seed=0)


def test_batch_has_the_boxes_of_each_image_padded(tmp_path: Path) -> None:
    data = module(tmp_path)
    assert "boxes" not in data.collate([data.train_samples[0, 0]])
    assert data.use_boxes() == {"cat": 0.25, "dog": 0.125}
    batch = data.collate([data.train_samples[0, i] for i in range(3)])
    assert batch["boxes"].tolist() == [[[0, 0, 0.5, 1], [0, 0.75, 1, 1]], [[0] * 4] * 2, [[0] * 4] * 2]
    assert batch["box_classes"].tolist() == [[0, 1], [NO_BOX] * 2, [NOT_LABELLED, NO_BOX]]
    assert data.collate([data.train_samples[0, 1]])["boxes"].shape == (1, 0, 4)


def test_samples_of_the_objective_boxes_are_augmented_with_their_image(tmp_path: Path) -> None:
    data = module(tmp_path, flip=True)
    data.use_boxes()
    plain = data.processor.pixel_values(tmp_path / "0.png")
    seen = set()
    for epoch in range(8):
        sample = data.train_samples[epoch, 0]
        is_mirrored = not torch.equal(sample.pixel_values, plain)
        assert sample.boxes.corners[0].tolist() == ([0.5, 0, 1, 1] if is_mirrored else [0, 0, 0.5, 1])
        seen.add(is_mirrored)
    assert seen == {True, False}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"boxes": None}, r"objectives\.boxes needs data\.boxes: name the file"),
        ({"views": 2, "flip": True}, r"data\.views=2: the cache does not know where its views have the boxes"),
    ],
)
def test_boxes_that_cannot_be_followed_are_an_error(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        module(tmp_path, **options).use_boxes()


def test_boxes_are_for_pretraining(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with pytest.raises(UsageError, match=r"data\.boxes='b\.json' is for pretraining"):
        check_options(DataOptions(annotations="a", images="i", boxes="b.json"), task="vqa")
